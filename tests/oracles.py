"""What seeding picks, said as plainly as can be: float64, materialised gradients, one candidate at a time."""

from __future__ import annotations

import numpy as np
import torch

from cmacc.train.contrast.seeding import LAWS, PROPOSALS

SAME = 1e-12
"""Squared distances below are nought: of copies."""


def gradients(
    candidates: torch.Tensor, queries: torch.Tensor, tau: float, form: str, last: torch.Tensor | None = None
) -> np.ndarray:
    """(N, ...) of each candidate, flat. See `gradient_factors`."""
    u, q = candidates.double().numpy(), queries.double().numpy()
    found = []
    for one in u:
        p = np.exp([(one @ other) / tau for other in q])
        p /= p.sum()
        p[int(np.argmax(p))] -= 1
        if form == "badge":
            found.append(np.outer(p, one).ravel())
        elif form == "last_layer":
            found.append(np.outer(one, sum(r * z for r, z in zip(p, last.double().numpy(), strict=True))).ravel())
        else:
            found.append(sum(r * each for r, each in zip(p, q, strict=True)) / tau)
    return np.array(found)


def drawn(weights: np.ndarray, u: float) -> int:
    """The index in whose part of the sum `u` falls."""
    sums = np.cumsum(weights)
    return int(np.argmax(sums > u * sums[-1]))


def nearest(g: np.ndarray, picks: list[int]) -> np.ndarray:
    found = np.min([((g - g[c]) ** 2).sum(1) for c in picks], axis=0)
    return np.where(found < SAME, 0, found)


def weights(g: np.ndarray, free: np.ndarray, picks: list[int]) -> np.ndarray:
    """D^2 of what may still be picked; all alike where that is nought."""
    may = free & ~np.isin(np.arange(len(g)), picks)
    found = np.where(may, nearest(g, picks), 0)
    return found if found.sum() > 0 else may.astype(float)


def first_pick(g: np.ndarray, free: np.ndarray, u: float, first: str) -> int:
    if first == "uniform":
        return drawn(free.astype(float), u)
    norms = np.where(free, (g**2).sum(1).round(6), -1)
    return int(np.argmax(norms))


def rejection_seeding(
    g: np.ndarray, free: np.ndarray, count: int, generator: torch.Generator, first: str, looks: bool = True
) -> list[int]:
    """Proposals from a law of earlier, each accepted with the probability that makes it D^2."""
    picks = [first_pick(g, free, float(torch.rand((), generator=generator, dtype=torch.float64)), first)]
    length = np.sqrt((g**2).sum(1))
    old, flat = np.where(free & (np.arange(len(g)) != picks[0]), (length + length[picks[0]]) ** 2, 0), False
    proposals = (3 if looks else PROPOSALS) * count
    wanted, rounds, accepted = min(count, int(free.sum())), 0, 0
    while len(picks) < wanted if looks else rounds < LAWS:
        if rounds and (not looks or accepted * 16 < proposals):
            now = weights(g, free, picks)
            old, flat = now, not np.where(free, nearest(g, picks), 0).any()
        rounds, accepted = rounds + 1, 0
        which, whether = torch.rand(2, proposals, generator=generator, dtype=torch.float64).tolist()
        for u, v in zip(which, whether, strict=True):
            n = drawn(old, u)
            now_of_n = float(n not in picks) if flat else nearest(g, picks)[n]
            if v * old[n] < now_of_n and len(picks) < wanted:
                picks.append(n)
                accepted += 1
    return picks + [-1] * (count - len(picks))


def greedy_seeding(g: np.ndarray, free: np.ndarray, count: int, draws: np.ndarray, first: str) -> list[int]:
    """draws: (count, trials)."""
    picks = [first_pick(g, free, draws[0, 0], first)]
    for u in draws[1:]:
        trials = [drawn(weights(g, free, picks), each) for each in u]
        picks.append(min(trials, key=lambda n: np.where(free, nearest(g, [*picks, n]), 0).sum().round(6)))
    return picks


def farthest_first(g: np.ndarray, free: np.ndarray, count: int, u: float, first: str) -> list[int]:
    picks = [first_pick(g, free, u, first)]
    while len(picks) < count:
        may = free & ~np.isin(np.arange(len(g)), picks)
        picks.append(int(np.argmax(np.where(may, nearest(g, picks), -1))))
    return picks


def largest(g: np.ndarray, free: np.ndarray, count: int) -> list[int]:
    norms = (g**2).sum(1)
    return sorted(np.flatnonzero(free).tolist(), key=lambda n: (-norms[n], n))[:count]
