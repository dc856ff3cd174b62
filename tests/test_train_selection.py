"""Selectors: the law of D^2 sampling by chi-square tests, and what may never be picked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from train_data import unit

from cmacc.train.gradients import GRADIENT_FORMS, GradientFactors, GradientForm
from cmacc.train.selection import NOTHING_LEFT, KMeansPlusPlus, Selector, Uniform, kmeans_plus_plus

LEFT, RIGHT = 3 * unit(7, 4, seed=1) * torch.linspace(0.5, 1.5, 7)[:, None], unit(7, 3, seed=2)
ALLOWED = torch.tensor([True, True, False, True, True, True, True])
OUTER = np.stack([np.outer(a, b).ravel() for a, b in zip(LEFT.double().numpy(), RIGHT.double().numpy(), strict=True)])
SELECTORS = [KMeansPlusPlus(), KMeansPlusPlus(first="uniform"), KMeansPlusPlus(form="prototype"), Uniform()]


def tally(draw: Callable[[torch.Generator], torch.Tensor], times: int) -> Counter[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(7)
    return Counter(tuple(draw(generator).tolist()) for _ in range(times))


def squared(a: int, b: int) -> float:
    return float(((OUTER[a] - OUTER[b]) ** 2).sum())


def law(picks: tuple[int, ...], first: str) -> float:
    """Probability of these picks in this order: k-means++ seeding as its paper has it."""
    candidates = [n for n in range(7) if ALLOWED[n]]
    largest = max(candidates, key=lambda n: (OUTER[n] ** 2).sum())
    p = 1 / len(candidates) if first == "uniform" else float(picks[0] == largest)
    for i in range(1, len(picks)):
        nearest = {n: min(squared(n, c) for c in picks[:i]) for n in candidates}
        p *= nearest[picks[i]] / sum(nearest.values())
    return p


@pytest.mark.parametrize(("first", "count"), [("norm", 2), ("norm", 3), ("uniform", 2)])
def test_the_law_of_d2_sampling(first: str, count: int) -> None:
    """All ordered picks together: second ones, and third ones given the first two."""
    times = 4000
    found = tally(lambda g: kmeans_plus_plus(GradientFactors(LEFT, RIGHT), ALLOWED, count, g, first=first), times)
    expected = {picks: times * law(picks, first) for picks in permutations(range(7), count) if ALLOWED[list(picks)].all()}
    expected = {picks: n for picks, n in expected.items() if n > 0}
    assert set(found) <= set(expected)
    assert sum(expected.values()) == pytest.approx(times)
    often = [picks for picks, n in expected.items() if n >= 5]
    rare = [picks for picks, n in expected.items() if n < 5]
    counts = [*(found[p] for p in often), sum(found[p] for p in rare)]
    wanted = [*(expected[p] for p in often), sum(expected[p] for p in rare)]
    if not rare:
        counts, wanted = counts[:-1], wanted[:-1]
    assert chisquare(counts, wanted).pvalue > 1e-3


def test_the_first_centre_has_the_largest_gradient() -> None:
    queries, pool = unit(6, 8, seed=3), unit(50, 8, seed=4)
    norms = []
    for u in pool.double():
        p = torch.softmax(queries.double() @ u / 0.1, 0)
        p[p.argmax()] -= 1
        norms.append(float(p.norm()))
    allowed = torch.ones(50, dtype=torch.bool)
    for _ in range(10):
        best = max((n for n in range(50) if allowed[n]), key=lambda n: norms[n])
        assert KMeansPlusPlus().select(queries, pool, allowed, 1, torch.Generator()).tolist() == [best]
        allowed[best] = False


@pytest.mark.parametrize("select", [KMeansPlusPlus(first="uniform"), Uniform()])
def test_uniform_means_uniform(select: Selector) -> None:
    queries, pool, allowed = unit(3, 8, seed=5), unit(12, 8, seed=6), torch.arange(12) % 4 != 1
    found = tally(lambda g: select.select(queries, pool, allowed, 1, g), 3000)
    assert set(found) == {(n,) for n in range(12) if n % 4 != 1}
    assert chisquare(list(found.values())).pvalue > 1e-3


def test_the_uniform_selector_draws_ordered_pairs_alike() -> None:
    allowed = torch.tensor([True, False, True, True, True, False, True])
    found = tally(lambda g: Uniform().select(LEFT, torch.zeros(7, 4), allowed, 2, g), 4000)
    assert set(found) == set(permutations((0, 2, 3, 4, 6), 2))
    assert chisquare(list(found.values())).pvalue > 1e-3


@pytest.mark.parametrize("form", GRADIENT_FORMS)
@pytest.mark.parametrize("size", [5, 9])
def test_a_pool_of_copies_is_drawn_from_uniformly(size: int, form: GradientForm) -> None:
    """Every D is 0: uniform over those not yet chosen, whatever the last bits of the sums say."""
    queries, pool = unit(8, 16, seed=7), unit(1, 16, seed=0).repeat(size, 1)
    select = KMeansPlusPlus(form=form, first="uniform")
    found = tally(lambda g: select.select(queries, pool, torch.ones(size, dtype=torch.bool), 2, g), 2000)
    assert set(found) == set(permutations(range(size), 2))
    assert chisquare(list(found.values())).pvalue > 1e-3


@pytest.mark.parametrize("form", GRADIENT_FORMS)
def test_copies_of_a_chosen_candidate_wait_for_the_others(form: GradientForm) -> None:
    queries, kinds = unit(8, 16, seed=8), unit(4, 16, seed=9)
    pool = kinds.repeat_interleave(50, 0)
    select, generator = KMeansPlusPlus(form=form), torch.Generator().manual_seed(1)
    for _ in range(50):
        picks = select.select(queries, pool, torch.ones(200, dtype=torch.bool), 6, generator)
        assert sorted((picks[:4] // 50).tolist()) == [0, 1, 2, 3]
        assert len(set(picks.tolist())) == 6


@pytest.mark.parametrize("select", SELECTORS)
@pytest.mark.parametrize("form", ["plain", "half allowed", "few allowed"])
def test_picks_are_distinct_and_allowed(select: Selector, form: str) -> None:
    generator = torch.Generator().manual_seed(2)
    for trial in range(30):
        queries, pool = unit(5, 8, seed=trial), unit(40, 8, seed=100 + trial)
        allowed = torch.rand(40, generator=generator) < {"plain": 1.0, "half allowed": 0.5, "few allowed": 0.2}[form]
        picks = select.select(queries, pool, allowed, 8, generator)
        assert picks.dtype == torch.int64
        assert picks.shape == (8,)
        there = [p for p in picks.tolist() if p != NOTHING_LEFT]
        assert len(set(there)) == len(there) == min(8, int(allowed.sum()))
        assert all(allowed[p] for p in there)


@pytest.mark.parametrize("select", SELECTORS)
@pytest.mark.parametrize(("size", "free", "count"), [(6, 4, 9), (6, 6, 6), (6, 0, 3), (3, 3, 5), (1, 1, 2)])
def test_nothing_left_is_said(select: Selector, size: int, free: int, count: int) -> None:
    picks = select.select(unit(2, 8), unit(size, 8, seed=1), torch.arange(size) < free, count, torch.Generator()).tolist()
    assert sorted(picks[:free]) == list(range(free))
    assert picks[free:] == [NOTHING_LEFT] * (count - min(free, count))


@pytest.mark.parametrize("select", SELECTORS)
def test_the_generator_alone_decides(select: Selector) -> None:
    queries, pool, allowed = unit(5, 8), unit(60, 8, seed=1), torch.ones(60, dtype=torch.bool)
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    first = select.select(queries, pool, allowed, 10, generator)
    torch.rand(5)  # the global generator has no say
    second = select.select(queries, pool, allowed, 10, generator)
    generator.set_state(state)
    assert torch.equal(select.select(queries, pool, allowed, 10, generator), first)
    assert not torch.equal(second, first)


@pytest.mark.parametrize("change", [{"pseudo_tau": 0.0}, {"form": "last"}, {"first": "any"}])
def test_a_wrong_option_is_named(change: dict[str, object]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=rf"selector\.{name} is .*; (give|use) "):
        KMeansPlusPlus(**change)  # type: ignore[arg-type]
