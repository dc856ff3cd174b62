"""Gradient embeddings of candidates, rank one and never materialised.

A candidate key u_n meets the M queries of the batch: p_n = softmax_j(u_n . q_j / tau), pseudo-label y_n = argmax_j,
residual R_n = p_n - onehot(y_n). Its gradient embedding is an outer product of two short vectors, kept as the pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

GradientForm = Literal["badge", "last_layer", "prototype"]
GRADIENT_FORMS = ("badge", "last_layer", "prototype")
ROUNDING = 8
"""A squared distance below so many units in the last place of the two norms is 0. Measured: copies come to 5.3 at most."""
_CELLS = 1 << 20
"""Of a product over the whole pool at once: what stands between two operations stays in the cache, and memory small."""


@dataclass(frozen=True)
class GradientFactors:
    """g_n = left_n (x) right_n for N candidates. left: (N, a), right: (N, b), float32 or wider. norms: |g_n|^2, (N,)."""

    left: Tensor
    right: Tensor
    norms: Tensor

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> GradientFactors:
        norms = torch.linalg.vector_norm(left, dim=1) * torch.linalg.vector_norm(right, dim=1)
        return cls(left, right, norms.square())

    def __len__(self) -> int:
        return len(self.norms)

    def rows(self, index: Tensor | slice) -> GradientFactors:
        return GradientFactors(self.left[index], self.right[index], self.norms[index])

    def squared_distances(self, centres: GradientFactors) -> Tensor:
        """|g_n - g_c|^2 = |g_n|^2 + |g_c|^2 - 2 (left_n . left_c)(right_n . right_c), 0 where rounding is all it is, (N, C).

        The expansion cancels badly in half precision: keep the factors in float32.
        """
        both = self.norms[:, None] + centres.norms
        cross = (self.left @ centres.left.T).mul_(self.right @ centres.right.T)
        squared = torch.sub(both, cross, alpha=2)
        # Copies of a centre must get 0, not the last bits of two sums: D^2 sampling would choose among them by those.
        return squared.masked_fill_(squared <= both.mul_(ROUNDING * torch.finfo(both.dtype).eps), 0)

    def nearest(self, centres: GradientFactors) -> Tensor:
        """Squared distance to the nearest of `centres`, (N,)."""
        most = max(1, _CELLS // max(1, len(centres)))
        parts = (slice(at, at + most) for at in range(0, len(self), most))
        return torch.cat([self.rows(part).squared_distances(centres).amin(1) for part in parts])


def residuals(candidates: Tensor, queries: Tensor, pseudo_tau: float) -> Tensor:
    """R = p - onehot(argmax p), (N, M), float32. candidates: (N, d); queries: (M, d); both L2-normalised."""
    queries = (queries.float() / pseudo_tau).T
    found = torch.empty(len(candidates), queries.shape[1], device=queries.device)
    most = max(1, _CELLS // max(1, len(queries.T)))
    for keys, r in zip(candidates.split(most), found.split(most), strict=True):
        p = torch.softmax(keys.float() @ queries, dim=1, out=r)
        p.scatter_add_(1, p.argmax(1, keepdim=True), p.new_full((1, 1), -1.0).expand(len(p), 1))
    return found


def gradient_factors(
    candidates: Tensor, queries: Tensor, pseudo_tau: float, form: GradientForm = "badge", last: Tensor | None = None
) -> GradientFactors:
    """Gradient embeddings of `candidates` (N, d) under `queries` (M, d): gradients of the pseudo-labelled cross-entropy.

    badge: g_n = R_n (x) u_n, with respect to a last layer whose rows are the queries (arXiv 1906.03671, up to 1 / pseudo_tau).
    last_layer: g_n = u_n (x) sum_j R_nj z_j, with respect to the last linear layer of the encoder that made the queries out of
    `last` = z (M, h), up to 1 / pseudo_tau; exact only for q_j = W z_j, which leaves the L2 normalisation out. prototype:
    g_n = R_n Q / pseudo_tau, with respect to the candidate itself, (d,).
    Raises ValueError for last_layer without `last`.
    """
    r = residuals(candidates, queries, pseudo_tau)
    if form == "badge":
        return GradientFactors.of(r, candidates.float())
    if form == "last_layer":
        if last is None:
            raise ValueError("objective.form is last_layer, but no input of the last layer was given; give it, or use badge")
        return GradientFactors.of(r @ last.float(), candidates.float())
    return GradientFactors.of(r @ (queries.float() / pseudo_tau), torch.ones_like(r[:, :1]))
