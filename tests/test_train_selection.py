"""Selectors: the same picks as the oracle's for each form of the gradient, and what may never be picked."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import pytest
import torch
from oracles import farthest_first, gradients, greedy_seeding, largest, rejection_seeding
from scipy.stats import chisquare
from train_data import unit

from cmacc.train.contrast.gradients import GRADIENT_FORMS, GradientForm
from cmacc.train.contrast.seeding import NOTHING_LEFT
from cmacc.train.contrast.selection import (
    SELECTORS,
    Asking,
    Seeding,
    Select,
    Selector,
    Uncertainty,
    Uniform,
    make_selector,
    pick_diverse,
)

CHOOSERS: list[Selector] = [
    Seeding(),
    Seeding("greedy", form="prototype"),
    Seeding("k-center", first="uniform"),
    Uncertainty(),
    Uniform(),
]
"""One of each."""


def chosen(
    selector: Selector, queries: torch.Tensor, pool: torch.Tensor, allowed: torch.Tensor, count: int, generator: torch.Generator
) -> torch.Tensor:
    """One direction alone."""
    return selector.select([Asking(queries)], [pool], allowed[None], count, generator)[0]


@pytest.mark.parametrize("form", GRADIENT_FORMS)
@pytest.mark.parametrize("name", ["kmeans++", "greedy", "k-center", "uncertainty"])
def test_both_directions_against_the_oracle(name: Select, form: GradientForm) -> None:
    for seed in range(4):  # with the next one two trials of greedy leave the same, in real numbers
        asking = [Asking(unit(7, 8, seed=10 * seed + i), 2 * unit(7, 5, seed=10 * seed + i + 2)) for i in (0, 1)]
        pools = [unit(50, 8, seed=10 * seed + 4), unit(50, 8, seed=10 * seed + 5)]
        allowed = torch.rand(2, 50, generator=torch.Generator().manual_seed(seed)) < 0.8
        generator, again = (torch.Generator().manual_seed(seed) for _ in range(2))
        found = make_selector(name, 0.2, form, "norm").select(asking, pools, allowed, 8, generator)
        assert (found.dtype, found.shape) == (torch.int64, (2, 8))
        draws = torch.rand(2, 8, 4, generator=again, dtype=torch.float64).numpy() if name == "greedy" else (None, None)
        for who, pool, free, u, picks in zip(asking, pools, allowed.numpy(), draws, found.tolist(), strict=True):
            g = gradients(pool, who.queries, 0.2, form, who.last)
            if name == "kmeans++":
                assert picks == rejection_seeding(g, free, 8, again, "norm")
            elif name == "greedy":
                assert picks == greedy_seeding(g, free, 8, u, "norm")
            else:
                assert picks == (largest(g, free, 8) if name == "uncertainty" else farthest_first(g, free, 8, 0.0, "norm"))


def test_every_name_but_fifo_has_a_selector() -> None:
    assert [type(make_selector(name, 0.1, "badge", "norm")).__name__ for name in SELECTORS if name != "fifo"] == [
        *3 * ["Seeding"], "Uncertainty", "Uniform",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="fifo picks nothing"):
        make_selector("fifo", 0.1, "badge", "norm")


def test_the_first_centre_has_the_largest_gradient() -> None:
    queries, pool = unit(6, 8, seed=3), unit(50, 8, seed=4)
    norms = (gradients(pool, queries, 0.1, "badge") ** 2).sum(1)
    allowed = torch.ones(50, dtype=torch.bool)
    for _ in range(10):
        best = max((n for n in range(50) if allowed[n]), key=lambda n: norms[n])
        assert chosen(Seeding(), queries, pool, allowed, 1, torch.Generator()).tolist() == [best]
        allowed[best] = False


def test_uncertainty_takes_the_first_of_equal_ones() -> None:
    queries, pool = unit(6, 8, seed=3), unit(3, 8, seed=4)
    order = (gradients(pool, queries, 0.1, "badge") ** 2).sum(1).argsort()[::-1]
    picks = chosen(Uncertainty(), queries, pool.repeat(200, 1), torch.arange(600) >= 3, 400, torch.Generator())
    expected = [n for kind in order for n in range(3, 600) if n % 3 == kind]
    assert picks.tolist() == expected[:400]


@pytest.mark.parametrize("select", [Seeding(first="uniform"), Uniform()])
def test_uniform_means_uniform(select: Selector) -> None:
    queries, pool, allowed = unit(3, 8, seed=5), unit(12, 8, seed=6), torch.arange(12) % 4 != 1
    generator = torch.Generator().manual_seed(7)
    found = Counter(int(chosen(select, queries, pool, allowed, 1, generator)) for _ in range(2000))
    assert set(found) == {n for n in range(12) if n % 4 != 1}
    assert chisquare(list(found.values())).pvalue > 1e-3


def test_the_uniform_selector_draws_ordered_pairs_alike() -> None:
    allowed = torch.tensor([True, False, True, True, True, False, True])
    generator = torch.Generator().manual_seed(7)
    found = Counter(tuple(chosen(Uniform(), unit(2, 4), torch.zeros(7, 4), allowed, 2, generator).tolist()) for _ in range(4000))
    assert set(found) == set(permutations((0, 2, 3, 4, 6), 2))
    assert chisquare(list(found.values())).pvalue > 1e-3


@pytest.mark.parametrize("form", GRADIENT_FORMS)
def test_a_pool_of_copies_is_drawn_from_uniformly(form: GradientForm) -> None:
    """Every D is 0: uniform over those not yet chosen, whatever the last bits of the sums say."""
    queries, pool, generator = unit(8, 16, seed=7), unit(1, 16, seed=0).repeat(5, 1), torch.Generator().manual_seed(7)
    select, who = Seeding(form=form, first="uniform"), [Asking(queries, unit(8, 4, seed=1))]
    allowed = torch.ones(1, 5, dtype=torch.bool)
    found = Counter(tuple(select.select(who, [pool], allowed, 2, generator)[0].tolist()) for _ in range(1000))
    assert set(found) == set(permutations(range(5), 2))
    assert chisquare(list(found.values())).pvalue > 1e-3


@pytest.mark.parametrize("form", GRADIENT_FORMS)
@pytest.mark.parametrize("by", ["kmeans++", "greedy", "k-center"])
def test_copies_of_a_chosen_candidate_wait_for_the_others(by: Select, form: GradientForm) -> None:
    who, kinds = [Asking(unit(8, 16, seed=8), unit(8, 4, seed=1))], unit(4, 16, seed=9)
    pool, generator = kinds.repeat_interleave(50, 0), torch.Generator().manual_seed(1)
    select = make_selector(by, 0.1, form, "norm")
    for _ in range(20):
        picks = select.select(who, [pool], torch.ones(1, 200, dtype=torch.bool), 6, generator)[0]
        assert sorted((picks[:4] // 50).tolist()) == [0, 1, 2, 3]
        assert len(set(picks.tolist())) == 6


@pytest.mark.parametrize("select", CHOOSERS)
@pytest.mark.parametrize("form", ["plain", "half allowed", "few allowed"])
def test_picks_are_distinct_and_allowed(select: Selector, form: str) -> None:
    generator = torch.Generator().manual_seed(2)
    for trial in range(30):
        queries, pool = unit(5, 8, seed=trial), unit(40, 8, seed=100 + trial)
        allowed = torch.rand(40, generator=generator) < {"plain": 1.0, "half allowed": 0.5, "few allowed": 0.2}[form]
        picks = chosen(select, queries, pool, allowed, 8, generator)
        assert picks.dtype == torch.int64
        assert picks.shape == (8,)
        there = [p for p in picks.tolist() if p != NOTHING_LEFT]
        assert len(set(there)) == len(there) == min(8, int(allowed.sum()))
        assert all(allowed[p] for p in there)


@pytest.mark.parametrize("select", CHOOSERS)
@pytest.mark.parametrize(("size", "free", "count"), [(6, 4, 9), (6, 6, 6), (6, 0, 3), (3, 3, 5), (1, 1, 2)])
def test_nothing_left_is_said(select: Selector, size: int, free: int, count: int) -> None:
    picks = chosen(select, unit(2, 8), unit(size, 8, seed=1), torch.arange(size) < free, count, torch.Generator()).tolist()
    assert sorted(picks[:free]) == list(range(free))
    assert picks[free:] == [NOTHING_LEFT] * (count - min(free, count))


@pytest.mark.parametrize("select", [Seeding(), Seeding("greedy"), Seeding("k-center", first="uniform"), Uniform()])
def test_the_generator_alone_decides(select: Selector) -> None:
    queries, pool, allowed = unit(5, 8), unit(60, 8, seed=1), torch.ones(60, dtype=torch.bool)
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    first = chosen(select, queries, pool, allowed, 10, generator)
    torch.rand(5)  # the global generator has no say
    second = chosen(select, queries, pool, allowed, 10, generator)
    generator.set_state(state)
    assert torch.equal(chosen(select, queries, pool, allowed, 10, generator), first)
    assert not torch.equal(second, first)


def test_many_of_many_vectors_take_little_memory() -> None:
    """2,000 of 5,000: rounds of a bounded size. All are distinct, and each of 300 crowded places is met before any is full."""
    vectors = (unit(300, 8, seed=1).repeat_interleave(17, 0)[:5000] + 1e-3 * unit(5000, 8, seed=2)).numpy()
    picks = pick_diverse(vectors, 2000, seed=0)
    assert len(set(picks.tolist())) == 2000
    assert len(set((picks[:600] // 17).tolist())) == len(set((picks // 17).tolist())) == 295
