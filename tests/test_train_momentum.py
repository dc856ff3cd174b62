"""Key encoders: slow copies, every parameter by the formula, none by a gradient."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from train_data import unit

from cmacc.train.encoders import EncoderConfig, build_encoders
from cmacc.train.loader import Batch
from cmacc.train.model import CrossModal
from cmacc.train.momentum import key_encoder, momentum_update
from cmacc.train.objective import ObjectiveConfig

CONFIG = EncoderConfig(video="small", audio="small", width=8, hidden=8)


def encoders(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """The small audio encoder twice, with different weights everywhere."""
    torch.manual_seed(seed)
    query = build_encoders(CONFIG)[1]
    key = key_encoder(query)
    with torch.no_grad():
        for p in query.parameters():
            p.add_(torch.randn_like(p))
    return key, query


def batch(size: int = 4, seed: int = 0) -> Batch:
    ids = torch.arange(size)
    return Batch(unit(size, 3, 4, 24, 24, seed=seed), unit(size, 1, 16, 20, seed=seed), ids, ids, ids)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 0.999])
def test_the_formula(momentum: float) -> None:
    key, query = encoders()
    before = copy.deepcopy(key)
    momentum_update(key, query, momentum)
    for (name, new), old, q in zip(key.named_parameters(), before.parameters(), query.parameters(), strict=True):
        expected = momentum * old.detach().double().numpy() + (1 - momentum) * q.detach().double().numpy()
        assert np.allclose(new.detach().numpy(), expected, rtol=1e-6, atol=1e-6), name
        assert (new != old).all(), f"{name} stays in places"


def test_it_converges_to_a_query_that_stands_still() -> None:
    """The public prototype copies one row over the whole tensor; rows would be alike here."""
    key, query = encoders()
    for _ in range(200):
        momentum_update(key, query, 0.9)
    for (name, k), q in zip(key.named_parameters(), query.parameters(), strict=True):
        assert torch.allclose(k, q, atol=1e-5), name
    weight = key.head[0].weight
    assert (weight - weight[:1]).abs()[1:].max() > 0.1


def test_batch_norm_keeps_statistics_of_its_own() -> None:
    """Buffers are not averaged: an update leaves them, a forward pass of the key encoder in training mode moves them."""
    key, query = encoders()
    with torch.no_grad():
        query(unit(4, 1, 16, 20))
    before = {name: buffer.clone() for name, buffer in key.named_buffers()}
    assert any((buffer != before[name]).any() for name, buffer in query.named_buffers())
    momentum_update(key, query, 0.5)
    assert all(torch.equal(buffer, before[name]) for name, buffer in key.named_buffers())
    with torch.no_grad():
        key(unit(4, 1, 16, 20, seed=1))
    assert all((buffer != before[name]).any() for name, buffer in key.named_buffers())


def test_no_gradient_and_no_shared_storage() -> None:
    key, query = encoders()
    mine, its = ({t.data_ptr() for t in (*e.parameters(), *e.buffers()) if t.numel()} for e in (key, query))
    assert not mine & its
    assert not any(p.requires_grad for p in key.parameters())
    assert all(p.requires_grad for p in query.parameters())


def test_a_step_moves_key_encoders_by_momentum_alone() -> None:
    model = CrossModal(CONFIG, ObjectiveConfig(dictionary=8, pool=8, momentum=0.75, queue="fifo", negatives="batch+dictionary"))
    pairs = ((model.key_video, model.video), (model.key_audio, model.audio))
    learned = {id(p) for p in model.learned()}
    assert learned == {id(p) for _, query in pairs for p in query.parameters()}
    optimiser = torch.optim.SGD(model.learned(), lr=1.0)
    old = [copy.deepcopy(key) for key, _ in pairs]
    result, q_video, _, k_video, k_audio = model(batch(), 0, torch.Generator())
    assert q_video.requires_grad
    assert not k_video.keys.requires_grad
    assert not k_audio.keys.requires_grad
    result.loss.backward()
    assert all(p.grad is None for key, _ in pairs for p in key.parameters())
    optimiser.step()
    model.after_step(result, k_video, k_audio)
    for before, (key, query) in zip(old, pairs, strict=True):
        for o, k, q in zip(before.parameters(), key.parameters(), query.parameters(), strict=True):
            assert torch.allclose(k, 0.75 * o + 0.25 * q, atol=1e-6)


def test_batch_negatives_alone_have_no_key_encoders_at_work() -> None:
    """Keys are the other modality's queries, with gradient, and nothing is remembered."""
    model = CrossModal(CONFIG, ObjectiveConfig(negatives="batch", dictionary=8, pool=8))
    before = {name: t.clone() for name, t in model.state_dict().items() if name.startswith(("key_", "memory."))}
    result, q_video, q_audio, k_video, k_audio = model(batch(), 0, torch.Generator())
    assert k_video.keys is q_video
    assert k_audio.keys is q_audio
    result.loss.backward()
    model.after_step(result, k_video, k_audio)
    after = model.state_dict()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert all(p.grad is not None for p in model.learned())
