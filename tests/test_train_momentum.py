"""Key encoders: slow copies, every parameter by the formula, none by a gradient."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from train_data import TINY, unit

from cmacc.train.contrast.objective import ObjectiveConfig
from cmacc.train.loading.loader import Batch
from cmacc.train.model import CrossModal
from cmacc.train.networks.encoders import EncoderConfig, build_encoders
from cmacc.train.networks.momentum import key_encoder, momentum_update
from cmacc.train.running.distributed import World
from cmacc.train.step import TrainingStep

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


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 1.5, math.nan])
def test_a_momentum_that_never_moves_or_flies_off_is_refused(momentum: float) -> None:
    key, query = encoders()
    with pytest.raises(ValueError, match=r"momentum is \S+; give 0 or more, below 1"):
        momentum_update(key, query, momentum)


def test_other_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="has other parameters than the query encoder; make it by key_encoder"):
        momentum_update(encoders()[0], build_encoders(CONFIG)[0], 0.5)


def test_nothing_is_cloned() -> None:
    """Every weight keeps its memory and layout, and the update allocates none."""
    key, query = encoders()
    before = [(p.data_ptr(), p.stride()) for p in key.parameters()]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        momentum_update(key, query, 0.5)
    assert [(p.data_ptr(), p.stride()) for p in key.parameters()] == before
    assert sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages()) < min(p.nbytes for p in key.parameters())


class Wrapped(nn.Module):
    """As DistributedDataParallel holds its module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_wrapped_and_compiled_modules_are_the_same_to_it() -> None:
    key, query = encoders()
    plain = copy.deepcopy(key)
    momentum_update(plain, query, 0.5)
    query.compile(backend="eager")
    query(unit(4, 1, 16, 20))
    momentum_update(key, Wrapped(query), 0.5)
    for (name, p), expected in zip(key.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, expected), name


def step_of(negatives: str) -> tuple[CrossModal, TrainingStep]:
    objective = ObjectiveConfig(dictionary=8, candidates=8, momentum=0.75, selector="fifo", negatives=negatives)  # type: ignore[arg-type]
    config = replace(TINY, encoders=CONFIG, objective=objective, loader=replace(TINY.loader, batch=len(batch().ids)))
    model = CrossModal(CONFIG, objective)
    return model, TrainingStep(config, model, config.optimiser.build(model.learned().values()), World())


def test_a_step_moves_key_encoders_by_momentum_alone() -> None:
    model, step = step_of("batch+dictionary")
    pairs = ((model.key_video, model.video), (model.key_audio, model.audio))
    learned = {id(p) for p in model.learned().values()}
    assert learned == {id(p) for _, query in pairs for p in query.parameters()}
    old = [copy.deepcopy(key) for key, _ in pairs]
    stepped = step(batch(), 0)
    assert stepped.ok
    assert all(p.grad is not None for p in model.learned().values())
    assert all(p.grad is None for key, _ in pairs for p in key.parameters())
    for before, (key, query) in zip(old, pairs, strict=True):
        for o, k, q in zip(before.parameters(), key.parameters(), query.parameters(), strict=True):
            assert torch.allclose(k, 0.75 * o + 0.25 * q, atol=1e-6)
            assert not torch.equal(o, q)


def test_batch_negatives_alone_have_no_key_encoders_at_work() -> None:
    """Keys are the other modality's queries, with gradient, and nothing is remembered."""
    model, step = step_of("batch")
    before = {name: t.clone() for name, t in model.state_dict().items() if name.startswith(("key_", "memory."))}
    stepped = step(batch(), 0)
    assert torch.equal(stepped.k_video.keys, stepped.queries.video)
    assert torch.equal(stepped.k_audio.keys, stepped.queries.audio)
    after = model.state_dict()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert all(p.grad is not None for p in model.learned().values())
