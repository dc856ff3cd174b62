"""Key encoders: slow copies of the query encoders."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def key_encoder(query: M) -> M:
    """A copy of `query` that takes no gradient."""
    return copy.deepcopy(query).requires_grad_(False)


@torch.no_grad()
def momentum_update(key: nn.Module, query: nn.Module, momentum: float) -> None:
    """theta_k <- m theta_k + (1 - m) theta_q for every parameter, in place, in one fused call (arXiv 1911.05722, eq. 2).

    Buffers are not averaged, whole numbers or not: the key encoder runs in training mode and keeps running statistics and
    counters of its own forward passes, as MoCo's does. `query` may be wrapped for several ranks or compiled: what counts is the
    order of parameters. Raises ValueError unless 0 <= m < 1, and for modules whose parameters do not pair.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}; give 0 or more, below 1")
    slow: list[Tensor] = list(key.parameters())
    fast: list[Tensor] = list(query.parameters())
    if [p.shape for p in slow] != [p.shape for p in fast]:
        raise ValueError("the key encoder has other parameters than the query encoder; make it by key_encoder(query)")
    torch._foreach_lerp_(slow, fast, 1 - momentum)
