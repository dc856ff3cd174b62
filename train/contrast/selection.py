"""Choosing negatives among candidates: one interface, and what stands behind it by name.

A selector is `select(asking, pools, allowed, count, generator) -> indices`, both directions in one call; a new one is one
class here. On a GPU nothing in a selector waits for the host, so the picks queue up behind the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmacc.train.contrast.gradients import GradientFactors, GradientForm, gradient_factors
from cmacc.train.contrast.seeding import NOTHING_LEFT, First, greedy_kmeans_plus_plus, k_center, kmeans_plus_plus

Select = Literal["kmeans++", "greedy", "k-center", "uncertainty", "random", "fifo"]
SELECTORS = ("kmeans++", "greedy", "k-center", "uncertainty", "random", "fifo")


class Asking(NamedTuple):
    """Whoever picks: the queries of one modality, (M, d), and, for the form last_layer, what their last linear layer was
    given, (M, h)."""

    queries: Tensor
    last: Tensor | None = None


class Selector(Protocol):
    def select(
        self, asking: Sequence[Asking], pools: Sequence[Tensor], allowed: Tensor, count: int, generator: torch.Generator
    ) -> Tensor:
        """For each of the D directions `count` distinct rows of its pool where `allowed`, int64 (D, count); -1 at the end
        once nothing allowed is left.

        asking, pools: D each; pools: (N, d), of one size. allowed: (D, N) bool.
        """
        ...


SEEDINGS = {"kmeans++": kmeans_plus_plus, "greedy": greedy_kmeans_plus_plus, "k-center": k_center}


@dataclass(frozen=True)
class Seeding:
    """Active selection: seeding over gradient embeddings, no Lloyd iterations (METHOD: CM-ACC step 2; `seeding` has the laws).

    by: `kmeans++`, `greedy` or `k-center`. pseudo_tau: temperature of the pseudo-labels. Its own knob: with unit vectors and
    0.7 every residual has norm 0.99 and "uncertainty" is constant. form: of the gradient, see `gradients`. first: `norm`
    starts from the largest gradient (BADGE), `uniform` from any candidate.
    """

    by: Literal["kmeans++", "greedy", "k-center"] = "kmeans++"
    pseudo_tau: float = 0.1
    form: GradientForm = "badge"
    first: First = "norm"

    @torch.no_grad()
    def select(
        self, asking: Sequence[Asking], pools: Sequence[Tensor], allowed: Tensor, count: int, generator: torch.Generator
    ) -> Tensor:
        factors = (  # one direction after the other, so that one's residuals are in memory at a time
            gradient_factors(pool, who.queries, self.pseudo_tau, self.form, who.last)
            for who, pool in zip(asking, pools, strict=True)
        )
        return SEEDINGS[self.by](factors, allowed, count, generator, self.first)


@dataclass(frozen=True)
class Uncertainty:
    """The largest gradients, whatever they have in common; of equal ones the first."""

    pseudo_tau: float = 0.1
    form: GradientForm = "badge"

    @torch.no_grad()
    def select(
        self, asking: Sequence[Asking], pools: Sequence[Tensor], allowed: Tensor, count: int, generator: torch.Generator
    ) -> Tensor:
        norms = [
            gradient_factors(pool, who.queries, self.pseudo_tau, self.form, who.last).norms
            for who, pool in zip(asking, pools, strict=True)
        ]
        return _highest(torch.stack(norms), allowed, count)


@dataclass(frozen=True)
class Uniform:
    """Random baseline: distinct candidates, all equally likely."""

    @torch.no_grad()
    def select(
        self, asking: Sequence[Asking], pools: Sequence[Tensor], allowed: Tensor, count: int, generator: torch.Generator
    ) -> Tensor:
        scores = torch.rand(allowed.shape, generator=generator, device=allowed.device, dtype=torch.float64)
        return _highest(scores, allowed, count)


def make_selector(name: Select, pseudo_tau: float, form: GradientForm, first: First) -> Selector:
    """By name; `fifo` picks nothing, so there is none."""
    if name == "uncertainty":
        return Uncertainty(pseudo_tau, form)
    if name == "random":
        return Uniform()
    if name == "fifo":
        raise ValueError("selector fifo picks nothing from a pool; use another one")
    return Seeding(name, pseudo_tau, form, first)


def pick_diverse(vectors: NDArray[np.float32], count: int, seed: int) -> NDArray[np.int64]:
    """Positions of `count` distinct vectors (n, d) that cover all of them, int64, in the order picked: k-means++ seeding.

    The first is drawn uniformly. On a GPU if there is one. The vectors are read once in a while, not for each pick.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    left = torch.from_numpy(vectors).to(device)
    factors = GradientFactors.of(left, torch.ones(len(left), 1, device=device))  # so that distances are those of the vectors
    generator = torch.Generator(device).manual_seed(seed)
    allowed = torch.ones(1, len(left), dtype=torch.bool, device=device)
    return kmeans_plus_plus([factors], allowed, min(count, len(left)), generator, "uniform", looks=True)[0].cpu().numpy()


def _highest(scores: Tensor, allowed: Tensor, count: int) -> Tensor:
    """The `count` highest scores >= 0 where allowed, (D, count), of equal ones the first; -1 once nothing is left."""
    ordered = scores.masked_fill(~allowed, -1.0).sort(dim=1, descending=True, stable=True)
    picks = ordered.indices.masked_fill(ordered.values < 0, NOTHING_LEFT)[:, :count]
    return torch.nn.functional.pad(picks, (0, count - picks.shape[1]), value=NOTHING_LEFT)
