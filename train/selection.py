"""Choosing negatives: k-means++ seeding over gradient embeddings, and the uniform baseline.

A selector is `select(queries, pool, allowed, count, generator) -> indices`; a new one is one function here.
Nothing in a selector waits for the host, so on a GPU the picks queue up behind the forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmacc.train.gradients import GRADIENT_FORMS, GradientFactors, GradientForm, gradient_factors

NOTHING_LEFT = -1


class Selector(Protocol):
    def select(self, queries: Tensor, pool: Tensor, allowed: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """`count` distinct indices into `pool` where `allowed`, int64 (count,); -1 once nothing allowed is left.

        queries: (M, d); pool: (N, d); allowed: (N,) bool.
        """
        ...


@dataclass(frozen=True)
class KMeansPlusPlus:
    """Active selection: D^2 sampling over gradient embeddings, seeding only, no Lloyd iterations (METHOD: CM-ACC step 2).

    pseudo_tau: temperature of the pseudo-labels. Its own knob: with unit vectors and 0.7 every residual has norm 0.99
    and "uncertainty" is constant. first: `norm` starts from the largest gradient (BADGE), `uniform` from any candidate.
    """

    pseudo_tau: float = 0.1
    form: GradientForm = "badge"
    first: Literal["norm", "uniform"] = "norm"

    def __post_init__(self) -> None:
        if not self.pseudo_tau > 0:
            raise ValueError(f"selector.pseudo_tau is {self.pseudo_tau}; give a temperature above 0, 0.07 to 0.2 works")
        if self.form not in GRADIENT_FORMS:
            raise ValueError(f"selector.form is {self.form!r}; use one of {', '.join(GRADIENT_FORMS)}")
        if self.first not in ("norm", "uniform"):
            raise ValueError(f"selector.first is {self.first!r}; use norm or uniform")

    @torch.no_grad()
    def select(self, queries: Tensor, pool: Tensor, allowed: Tensor, count: int, generator: torch.Generator) -> Tensor:
        factors = gradient_factors(pool, queries, self.pseudo_tau, self.form)
        return kmeans_plus_plus(factors, allowed, count, generator, first=self.first)


@dataclass(frozen=True)
class Uniform:
    """Random baseline: distinct candidates, all equally likely."""

    @torch.no_grad()
    def select(self, queries: Tensor, pool: Tensor, allowed: Tensor, count: int, generator: torch.Generator) -> Tensor:
        scores = torch.rand(len(pool), generator=generator, device=pool.device).masked_fill(~allowed, -1.0)
        best = scores.topk(min(count, len(pool)))
        picks = best.indices.masked_fill(best.values < 0, NOTHING_LEFT)
        return torch.nn.functional.pad(picks, (0, count - len(picks)), value=NOTHING_LEFT)


def kmeans_plus_plus(
    factors: GradientFactors, allowed: Tensor, count: int, generator: torch.Generator, first: str = "norm"
) -> Tensor:
    """k-means++ seeding (Arthur & Vassilvitskii 2007): each next centre n with probability D(n)^2 / sum D^2, D the
    distance to the nearest centre so far. Where every D is 0, uniform over what is not yet chosen.

    Returns int64 (count,), distinct, -1 once nothing allowed is left.
    """
    free = allowed.clone()
    norms = factors.squared_norm()
    nearest = torch.full_like(norms, torch.inf)
    draws = torch.rand(count, generator=generator, device=norms.device, dtype=torch.float64)
    picks = []
    for i in range(count):
        if i:
            weight = nearest
        elif first == "norm":
            weight = (norms == norms.masked_fill(~free, -1.0).max()).to(norms.dtype)
        else:
            weight = torch.zeros_like(norms)
        pick = _draw(weight, free, draws[i])
        picks.append(torch.where(free.any(), pick, NOTHING_LEFT))
        free = free & (torch.arange(len(free), device=free.device) != pick)
        nearest = torch.minimum(nearest, factors.squared_distance(pick, norms))
    return torch.stack(picks)


def pick_diverse(vectors: NDArray[np.float32], count: int, seed: int) -> NDArray[np.int64]:
    """Positions of `count` distinct vectors (n, d) that cover all of them, int64, in the order picked: k-means++ seeding.

    The first is drawn uniformly. On a GPU if there is one; cost is count * n * d.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    left = torch.from_numpy(vectors).to(device)
    factors = GradientFactors(left, torch.ones(len(left), 1, device=device))  # g = left (x) 1: distances are those of the vectors
    generator = torch.Generator(device).manual_seed(seed)
    allowed = torch.ones(len(left), dtype=torch.bool, device=device)
    return kmeans_plus_plus(factors, allowed, min(count, len(left)), generator, first="uniform").cpu().numpy()


def _draw(weight: Tensor, free: Tensor, u: Tensor) -> Tensor:
    """One index with probability weight / sum(weight) over `free`, uniform where all weights are 0. u: 0-d in [0, 1).

    By the inverse of the cumulative sum in float64: torch.multinomial waits for the host and is limited to 2^24 entries.
    """
    weight = torch.where(free, weight, 0.0).double()
    weight = torch.where(weight.sum() > 0, weight, free.double())
    cumulative = weight.cumsum(0)
    index = torch.searchsorted(cumulative, u * cumulative[-1], right=True)
    return index.clamp_max(len(weight) - 1)
