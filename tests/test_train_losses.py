"""InfoNCE against a loop in float64: both directions, all kinds of negatives, masks, chance and accuracy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from train_data import unit

from cmacc.train.contrast.losses import info_nce
from cmacc.train.contrast.objective import Memory, ObjectiveConfig, Queries, choose, contrast
from cmacc.train.contrast.rings import Entries


def oracle(
    query: torch.Tensor, positive: torch.Tensor, others: list[list[torch.Tensor]], tau: float
) -> tuple[float, float, float]:
    """(loss, accuracy, chance), row by row, in Python's floats. others: the negatives of each row."""
    losses, hits, chances = [], [], []
    for q, k, negatives in zip(query.tolist(), positive.tolist(), others, strict=True):
        own, *rest = (sum(a * b for a, b in zip(q, x, strict=True)) / tau for x in (k, *(n.tolist() for n in negatives)))
        losses.append(-math.log(math.exp(own) / (math.exp(own) + sum(math.exp(r) for r in rest))))
        hits.append(all(own > r for r in rest))
        chances.append(math.log(1 + len(rest)))
    return float(np.mean(losses)), float(np.mean(hits)), float(np.mean(chances))


def negatives_of(
    positive: torch.Tensor, dictionary: torch.Tensor, allowed: torch.Tensor, others: torch.Tensor | None
) -> list[list[torch.Tensor]]:
    rows = range(len(positive))
    return [
        [dictionary[j] for j in range(len(dictionary)) if allowed[i, j]]
        + [positive[j] for j in rows if others is not None and others[i, j] and j != i]
        for i in rows
    ]


def some_others(kind: str, size: int) -> torch.Tensor | None:
    """Which clips of the batch serve as negatives of which."""
    if kind == "none":
        return None
    return torch.rand(size, size, generator=torch.Generator().manual_seed(8)) < {"all": 1.0, "some": 0.5}[kind]


@pytest.mark.parametrize("others", ["none", "some", "all"])
@pytest.mark.parametrize("share_allowed", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("size", "entries", "tau"), [(1, 1, 0.5), (5, 9, 0.1), (6, 3, 0.7)])
def test_info_nce_is_the_formula(size: int, entries: int, tau: float, share_allowed: float, others: str) -> None:
    query, dictionary = unit(size, 8, seed=1), unit(entries, 8, seed=3)
    positive = torch.nn.functional.normalize(query + 0.3 * unit(size, 8, seed=2), dim=1)
    allowed = torch.rand(size, entries, generator=torch.Generator().manual_seed(4)) < share_allowed
    batch = some_others(others, size)
    parts = info_nce(query, positive, dictionary, allowed, tau, batch)
    loss, accuracy, chance = oracle(query, positive, negatives_of(positive, dictionary, allowed, batch), tau)
    assert parts.loss.item() == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert parts.accuracy.item() == pytest.approx(accuracy)
    assert parts.chance.item() == pytest.approx(chance, rel=1e-6)


@pytest.mark.parametrize("others", ["none", "some", "all"])
def test_gradients_are_the_formulas_own(others: str) -> None:
    """dL/dq_i = (sum_j p_ij x_j - k_i) / (tau M), x over all terms; a masked entry gets none."""
    tau, query, positive, dictionary = 0.2, unit(4, 6, seed=5), unit(4, 6, seed=6), unit(7, 6, seed=7)
    allowed = torch.ones(4, 7, dtype=torch.bool)
    allowed[:, 2] = False
    batch = some_others(others, 4)
    leaves = [t.clone().requires_grad_() for t in (query, positive, dictionary)]
    info_nce(*leaves, allowed, tau, batch).loss.backward()
    expected = np.zeros((4, 6))
    for i, negatives in enumerate(negatives_of(positive, dictionary, allowed, batch)):
        terms = torch.stack([positive[i], *negatives]).double().numpy()
        p = np.exp(terms @ query[i].double().numpy() / tau)
        expected[i] = (p / p.sum() @ terms - terms[0]) / tau / 4
    assert np.allclose(leaves[0].grad.numpy(), expected, atol=1e-6)
    assert leaves[2].grad[2].abs().sum() == 0
    assert (leaves[2].grad.abs().sum(1) > 0).sum() == 6


@pytest.mark.parametrize("batch", [False, True])
def test_a_blind_encoder_scores_chance_and_is_never_right(batch: bool) -> None:
    """All embeddings alike: the loss is the mean ln(terms), and a tie is no hit."""
    same = unit(1, 8)
    allowed = torch.arange(5)[None, :] < torch.arange(2, 6)[:, None]
    others = torch.ones(4, 4, dtype=torch.bool) if batch else None
    parts = info_nce(same.expand(4, 8), same.expand(4, 8), torch.zeros(5, 8) + same, allowed, 0.1, others)
    ln_terms = np.log([n + 1 + 3 * batch for n in (2, 3, 4, 5)]).mean()
    assert parts.loss.item() == pytest.approx(ln_terms, rel=1e-5)
    assert parts.chance.item() == pytest.approx(ln_terms, rel=1e-6)
    exact = torch.eye(8)[:1]  # dot products without rounding, so that all scores tie
    tied = info_nce(exact.expand(4, 8), exact.expand(4, 8), exact.expand(5, 8), allowed, 0.1, others)
    assert tied.accuracy == 0


@pytest.mark.parametrize("negatives", ["dictionary", "batch+dictionary", "batch"])
def test_both_directions_meet_the_other_modality(negatives: str) -> None:
    """L = L_va(q_v, k_a, D_a) + L_av(q_a, k_v, D_v); empty slots never count, nor what is of the query's own source."""
    config = ObjectiveConfig(negatives=negatives, selector="fifo", dictionary=7, candidates=5, tau=0.3)
    q_video, q_audio, k_video, k_audio, d_video, d_audio = (unit(n, 8, seed=n + s) for s, n in enumerate((4, 4, 4, 4, 6, 6)))
    sources = torch.tensor([10, 11, 12, 10])

    def entries(keys: torch.Tensor, ids: list[int], sources: torch.Tensor) -> Entries:
        return Entries(keys, torch.tensor(ids), sources, torch.zeros(len(ids), dtype=torch.int64), torch.tensor(ids))

    memory = Memory(config, 8)
    there = torch.tensor([20, 11, 21, 10, 10, 22])
    if negatives == "batch":
        d_video, d_audio, there = d_video[:0], d_audio[:0], there[:0]
    else:
        memory.dictionary_video.enqueue(entries(d_video, [50, 51, 52, 53, 54, 55], there))
        memory.dictionary_audio.enqueue(entries(d_audio, [50, 51, 52, 53, 54, 55], there.flip(0)))
    k_v, k_a = entries(k_video, [0, 1, 2, 3], sources), entries(k_audio, [0, 1, 2, 3], sources)
    queries = Queries(q_video, q_audio)
    result = contrast(queries, k_v, k_a, memory, config, choose(queries, k_v, k_a, memory, config, 0, torch.Generator()))
    batch = sources != sources[:, None] if negatives != "dictionary" else None
    v = oracle(q_video, k_audio, negatives_of(k_audio, d_audio, sources[:, None] != there.flip(0), batch), 0.3)
    a = oracle(q_audio, k_video, negatives_of(k_video, d_video, sources[:, None] != there, batch), 0.3)
    for parts, (loss, accuracy, chance) in ((result.video_to_audio, v), (result.audio_to_video, a)):
        assert parts.loss.item() == pytest.approx(loss, rel=1e-5)
        assert parts.accuracy.item() == pytest.approx(accuracy)
        assert parts.chance.item() == pytest.approx(chance, rel=1e-6)
    assert result.loss.item() == pytest.approx(v[0] + a[0], rel=1e-5)
