"""Key encoders: slow copies of the query encoders."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def key_encoder(query: M) -> M:
    """A copy of `query` that takes no gradient."""
    return copy.deepcopy(query).requires_grad_(False)


@torch.no_grad()
def momentum_update(key: nn.Module, query: nn.Module, momentum: float) -> None:
    """theta_k <- m theta_k + (1 - m) theta_q for every parameter, in one fused call (arXiv 1911.05722, eq. 2).

    BatchNorm buffers are not averaged: the key encoder runs in training mode and keeps running statistics of its own
    forward passes, as MoCo's does.
    """
    torch._foreach_lerp_(list(key.parameters()), list(query.parameters()), 1 - momentum)
