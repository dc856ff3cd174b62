"""InfoNCE with a dictionary of negatives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossParts:
    """One direction's loss. loss: scalar with gradient. accuracy: share of rows whose positive scores highest, a tie
    is no hit. chance: mean over rows of ln(terms in the denominator), what a blind encoder scores. All nats or shares,
    scalars."""

    loss: Tensor
    accuracy: Tensor
    chance: Tensor


def info_nce(
    query: Tensor, positive: Tensor, negatives: Tensor, allowed: Tensor, tau: float, others: Tensor | None = None
) -> LossParts:
    """-log( e^{q.k+/tau} / (e^{q.k+/tau} + sum_j e^{q.D_j/tau}) ), mean over the batch (arXiv 1807.03748, 1911.05722).

    query, positive: (M, d), L2-normalised; negatives: (K, d); allowed: (M, K) bool, False where entry j may not serve
    row i (slot empty, or the same source video). others: (M, M) bool, True where the positive of row j is a negative of row i,
    too; None: none is.
    """
    rows = torch.arange(len(query), device=query.device)
    terms = 1 + allowed.sum(1)
    if others is not None:
        others = others.logical_or(torch.eye(len(rows), dtype=torch.bool, device=rows.device))
        matched = (query @ positive.T).masked_fill(~others, -math.inf)
        target, terms = rows, terms + others.sum(1) - 1
    else:
        matched = (query * positive).sum(1, keepdim=True)
        target = torch.zeros_like(rows)
    logits = torch.cat([matched, (query @ negatives.T).masked_fill_(~allowed, -math.inf)], 1).float().div_(tau)
    scores = logits.detach()
    return LossParts(
        loss=torch.nn.functional.cross_entropy(logits, target),
        accuracy=((scores >= scores.gather(1, target[:, None])).sum(1) == 1).float().mean(),
        chance=terms.float().log().mean(),
    )
