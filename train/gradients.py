"""Gradient embeddings of candidates, rank one and never materialised.

A candidate key u_n meets the M queries of the batch: p_n = softmax_j(u_n . q_j / tau), pseudo-label y_n = argmax_j,
residual R_n = p_n - onehot(y_n). Its gradient embedding is an outer product of two short vectors, kept as the pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

GradientForm = Literal["badge", "prototype"]
GRADIENT_FORMS = ("badge", "prototype")
ROUNDING = 8
"""A squared distance below so many units in the last place of the two norms is 0. Measured: copies come to 5 at most."""


@dataclass(frozen=True)
class GradientFactors:
    """g_n = left_n (x) right_n for N candidates. left: (N, a), right: (N, b), float32 or wider."""

    left: Tensor
    right: Tensor

    def squared_norm(self) -> Tensor:
        """|g_n|^2 = |left_n|^2 |right_n|^2, (N,)."""
        return self.left.square().sum(1) * self.right.square().sum(1)

    def squared_distance(self, centre: Tensor, norms: Tensor) -> Tensor:
        """|g_n - g_c|^2 = |g_n|^2 + |g_c|^2 - 2 (left_n . left_c)(right_n . right_c), 0 where rounding is all it is, (N,).

        centre: index c, a 0-d tensor on the same device, so that nothing waits for the host. norms: `squared_norm()`.
        The expansion cancels badly in half precision: keep the factors in float32.
        """
        left, right = self.left.index_select(0, centre.view(1))[0], self.right.index_select(0, centre.view(1))[0]
        cross = (self.left @ left) * (self.right @ right)
        both = norms + norms.index_select(0, centre.view(1))
        squared = both - 2 * cross
        # Copies of the centre must get 0, not the last bits of two sums: D^2 sampling would choose among them by those.
        return squared.where(squared > ROUNDING * torch.finfo(squared.dtype).eps * both, 0)


def residuals(candidates: Tensor, queries: Tensor, pseudo_tau: float) -> Tensor:
    """R = p - onehot(argmax p), (N, M), float32. candidates: (N, d); queries: (M, d); both L2-normalised."""
    p = torch.softmax(candidates.float() @ queries.float().T / pseudo_tau, dim=1)
    return p - torch.nn.functional.one_hot(p.argmax(1), p.shape[1])


def gradient_factors(candidates: Tensor, queries: Tensor, pseudo_tau: float, form: GradientForm = "badge") -> GradientFactors:
    """Gradient embeddings of `candidates` (N, d) under `queries` (M, d).

    badge: g_n = R_n (x) u_n, the gradient of the pseudo-labelled cross-entropy with respect to a last layer whose
    rows are the queries (arXiv 1906.03671, up to 1 / pseudo_tau). prototype: g_n = R_n Q / pseudo_tau, its gradient
    with respect to the candidate itself, (d,).
    """
    r = residuals(candidates, queries, pseudo_tau)
    if form == "badge":
        return GradientFactors(r, candidates.float())
    return GradientFactors(r @ queries.float() / pseudo_tau, torch.ones_like(r[:, :1]))
