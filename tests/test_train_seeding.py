"""Seeding: the laws by chi-square over ordered picks, and the same picks as plain loops in float64 by the same draws."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from oracles import farthest_first, greedy_seeding, rejection_seeding
from scipy.stats import chisquare
from train_data import unit

from cmacc.train.contrast import seeding
from cmacc.train.contrast.gradients import GradientFactors
from cmacc.train.contrast.seeding import NOTHING_LEFT, First, greedy_kmeans_plus_plus, k_center, kmeans_plus_plus

SEVEN = torch.tensor([1.0, 0.5, 1.0, 1.5, 0.7, 1.2, 0.9])[:, None]
COPIES = torch.tensor([0, 1, 2, 2, 2, 3, 3])
ALLOWED = torch.tensor([True, True, False, True, True, True, True])


def problem(kind: str) -> GradientFactors:
    """Seven candidates, the third of them not allowed."""
    left, right = 3 * SEVEN * unit(7, 4, seed=1), unit(7, 3, seed=2)
    if kind == "clusters":
        left, right = left[COPIES] + 0.05 * unit(7, 4, seed=3), right[COPIES] + 0.05 * unit(7, 3, seed=4)
    elif kind == "copies":
        left, right = left[COPIES], right[COPIES]
    elif kind == "zeros":
        left = left * torch.tensor([1, 1, 1, 0, 0, 0, 1])[:, None]
    elif kind == "nothing but zeros":
        left = 0 * left
    return GradientFactors.of(left, right)


def materialised(factors: GradientFactors) -> np.ndarray:
    return np.stack([np.outer(a, b).ravel() for a, b in zip(factors.left.double(), factors.right.double(), strict=True)])


def law(g: np.ndarray, picks: tuple[int, ...], first: First) -> float:
    """Probability of these picks in this order: k-means++ seeding as its paper has it."""
    candidates = [n for n in range(len(g)) if ALLOWED[n]]
    largest = max(candidates, key=lambda n: (g[n] ** 2).sum())
    p = 1 / len(candidates) if first == "uniform" else float(picks[0] == largest)
    for i in range(1, len(picks)):
        left = [n for n in candidates if n not in picks[:i]]
        nearest = {n: min(((g[n] - g[c]) ** 2).sum() for c in picks[:i]) for n in left}
        total = sum(nearest.values())
        p *= nearest[picks[i]] / total if total else 1 / len(left)
    return p


@pytest.mark.parametrize(
    ("kind", "first", "count", "looks"),
    [("plain", "norm", 2, True), ("plain", "uniform", 2, True), ("plain", "norm", 4, True), ("clusters", "norm", 4, True),
     ("copies", "norm", 4, True), ("copies", "uniform", 3, True), ("zeros", "norm", 4, True),
     ("nothing but zeros", "uniform", 2, True), ("plain", "norm", 3, False), ("clusters", "norm", 3, False),
     ("copies", "norm", 4, False)],
)  # fmt: skip
def test_the_law_of_d2_sampling(kind: str, first: First, count: int, looks: bool) -> None:
    """All ordered picks together: second ones, third ones given the first two, and so on."""
    times, factors, generator = 2000 if looks else 500, problem(kind), torch.Generator().manual_seed(7)
    found = Counter(
        tuple(kmeans_plus_plus([factors], ALLOWED[None], count, generator, first, looks)[0].tolist()) for _ in range(times)
    )
    g = materialised(factors)
    expected = {picks: times * law(g, picks, first) for picks in permutations(range(7), count) if ALLOWED[list(picks)].all()}
    expected = {picks: n for picks, n in expected.items() if n > 0}
    assert set(found) <= set(expected)
    assert sum(expected.values()) == pytest.approx(times)
    often = [picks for picks, n in expected.items() if n >= 5]
    rare = [picks for picks, n in expected.items() if n < 5]
    counts = [*(found[p] for p in often), sum(found[p] for p in rare)]
    wanted = [*(expected[p] for p in often), sum(expected[p] for p in rare)]
    if not rare:
        counts, wanted = counts[:-1], wanted[:-1]
    assert chisquare(counts, wanted, sum_check=False).pvalue > 1e-3


def crowd(kind: str, size: int, seed: int) -> GradientFactors:
    """As `problem`, larger: no two distances are so near that float32 and float64 could disagree about a pick."""
    if kind == "plain":
        lengths = torch.linspace(0.5, 1.5, size).roll(seed)[:, None]
        return GradientFactors.of(lengths * unit(size, 6, seed=seed), unit(size, 5, seed=seed + 1))
    spread = 0.0 if kind == "copies" else 0.02
    which = torch.arange(size) % 4
    left, right = (SEVEN[:4] * unit(4, 6, seed=seed))[which], unit(4, 5, seed=seed + 1)[which]
    return GradientFactors.of(left + spread * unit(size, 6, seed=seed + 2), right + spread * unit(size, 5, seed=seed + 3))


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("first", ["norm", "uniform"])
@pytest.mark.parametrize("kind", ["plain", "clusters", "copies"])
def test_rejection_against_the_oracle(kind: str, first: First, looks: bool) -> None:
    """The same proposals, accepted by distances between materialised gradients; laws are renewed when they should be."""
    for seed in range(8):
        factors = [crowd(kind, 60, 10 * seed), crowd(kind, 60, 10 * seed + 5)]
        allowed = torch.rand(2, 60, generator=torch.Generator().manual_seed(seed)) < 0.8
        generator, again = (torch.Generator().manual_seed(seed) for _ in range(2))
        found = kmeans_plus_plus(factors, allowed, 10, generator, first, looks)
        for f, free, picks in zip(factors, allowed, found, strict=True):
            assert picks.tolist() == rejection_seeding(materialised(f), free.numpy(), 10, again, first, looks)


def test_without_looking_all_laws_may_be_needed_and_are_enough() -> None:
    """Twenty kinds of exact copies: all weights fall to nought at the twentieth pick."""
    which = torch.arange(2000) % 20
    factors = GradientFactors.of(unit(20, 8, seed=1)[which], unit(20, 8, seed=2)[which])
    for seed in range(5):
        draws = torch.Generator().manual_seed(seed)
        picks = kmeans_plus_plus([factors], torch.ones(1, 2000, dtype=torch.bool), 32, draws, looks=False)[0]
        assert sorted((picks[:20] % 20).tolist()) == list(range(20))
        assert len(set(picks.tolist())) == 32
        assert NOTHING_LEFT not in picks


@pytest.mark.parametrize("looks", [True, False])
def test_what_is_not_finite_is_never_picked(looks: bool) -> None:
    factors = crowd("plain", 30, 1)
    factors.left[5:25, 2], factors.left[3, 1] = float("nan"), float("inf")
    factors = GradientFactors.of(factors.left, factors.right)
    picks = kmeans_plus_plus([factors], torch.ones(1, 30, dtype=torch.bool), 12, torch.Generator().manual_seed(0), looks=looks)
    assert sorted(picks[0, :9].tolist()) == [0, 1, 2, 4, 25, 26, 27, 28, 29]
    assert picks[0, 9:].tolist() == [NOTHING_LEFT] * 3


def test_few_passes_settle_a_round() -> None:
    """Chains of conflicts, each of which needs a pass, are short: far shorter than PASSES where nobody looks."""
    longest = 0
    for kind in ("plain", "clusters"):
        factors = crowd(kind, 3000, 3)
        start = seeding._Law.bound(factors, torch.ones(3000, dtype=torch.bool), torch.tensor(0))
        _, conflict, welcome = start.propose(torch.tensor([0]), 600, torch.Generator().manual_seed(5))
        accepted, passes = welcome, 0
        while not torch.equal(accepted, better := seeding._pass(accepted, conflict, welcome)):
            accepted, passes = better, passes + 1
        one_by_one = torch.zeros(600, dtype=torch.bool)
        for t in range(600):
            one_by_one[t] = welcome[t] and not (one_by_one & conflict[:, t].bool()).any()
        assert torch.equal(accepted, one_by_one.float())
        longest = max(longest, passes)
    assert 2 <= longest <= seeding.PASSES // 2


@pytest.mark.parametrize("first", ["norm", "uniform"])
@pytest.mark.parametrize("kind", ["plain", "clusters", "copies"])
def test_greedy_against_the_oracle(kind: str, first: First) -> None:
    for seed in range(6):
        factors = [crowd(kind, 40, 10 * seed), crowd(kind, 40, 10 * seed + 5)]
        allowed = torch.rand(2, 40, generator=torch.Generator().manual_seed(seed)) < 0.8
        generator, again = (torch.Generator().manual_seed(seed) for _ in range(2))
        found = greedy_kmeans_plus_plus(factors, allowed, 7, generator, first)
        draws = torch.rand(2, 7, 3, generator=again, dtype=torch.float64).numpy()  # 2 + ln 7 trials
        for f, free, picks, u in zip(factors, allowed, found, draws, strict=True):
            expected = greedy_seeding(materialised(f), free.numpy(), 7, u, first)
            # Of copies any is as good: which one is decided by the last bits.
            same = (lambda n: n % 4) if kind == "copies" else (lambda n: n)
            assert [same(n) for n in picks[:4].tolist()] == [same(n) for n in expected[:4]]
            if kind != "copies":
                assert picks.tolist() == expected


def test_greedy_leaves_less_than_plain_seeding() -> None:
    factors, allowed = crowd("plain", 300, 1), torch.ones(1, 300, dtype=torch.bool)
    left = {}
    for by in (greedy_kmeans_plus_plus, kmeans_plus_plus):
        picks = [by([factors], allowed, 10, torch.Generator().manual_seed(seed))[0] for seed in range(20)]
        left[by] = np.mean([float(factors.nearest(factors.rows(p)).sum()) for p in picks])
    assert left[greedy_kmeans_plus_plus] < 0.99 * left[kmeans_plus_plus]


@pytest.mark.parametrize("first", ["norm", "uniform"])
@pytest.mark.parametrize("kind", ["plain", "clusters", "copies"])
def test_farthest_first_against_the_oracle(kind: str, first: First) -> None:
    for seed in range(6):
        factors = [crowd(kind, 40, 10 * seed), crowd(kind, 40, 10 * seed + 5)]
        allowed = torch.rand(2, 40, generator=torch.Generator().manual_seed(seed)) < 0.8
        generator, again = (torch.Generator().manual_seed(seed) for _ in range(2))
        found = k_center(factors, allowed, 7, generator, first)
        draws = torch.rand(2, 7, 1, generator=again, dtype=torch.float64).numpy()
        for f, free, picks, u in zip(factors, allowed, found, draws, strict=True):
            expected = farthest_first(materialised(f), free.numpy(), 7, u[0, 0], first)
            same = (lambda n: n % 4) if kind == "copies" else (lambda n: n)
            assert [same(n) for n in picks[:4].tolist()] == [same(n) for n in expected[:4]]
            if kind != "copies":
                assert picks.tolist() == expected
