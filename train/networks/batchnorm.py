"""BatchNorm in its variants: none at all, statistics that stand still, statistics of all ranks, batches shuffled over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cmacc.shards.order import rank_places

_GROUP_WIDTH = 16
"""Channels of a group, at least: the best width of table 3 in arXiv 1803.08494."""
_MOST_GROUPS = 32


def _replace(module: nn.Module, make: Callable[[_BatchNorm], nn.Module]) -> None:
    """Put `make(layer)` in the place of each BatchNorm inside `module`."""
    for parent in tuple(module.modules()):
        for name, child in tuple(parent.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(parent, name, make(child))


def to_group_norm(module: nn.Module) -> None:
    """Replace every BatchNorm inside `module` by a fresh GroupNorm (arXiv 1803.08494), which couples no two clips."""

    def make(layer: _BatchNorm) -> nn.GroupNorm:
        width = layer.num_features
        groups = max(g for g in range(1, _MOST_GROUPS + 1) if g == 1 or (width % g == 0 and width // g >= _GROUP_WIDTH))
        return nn.GroupNorm(groups, width, eps=layer.eps)

    _replace(module, make)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm layers normalise as ever, but move scratch copies of their running statistics and counters.

    So nothing is counted twice where a batch passes twice, and a compiled module needs no second graph.
    """
    layers = [(m, dict(m.named_buffers(recurse=False))) for m in module.modules() if isinstance(m, _BatchNorm)]
    try:
        for layer, buffers in layers:
            for name, buffer in buffers.items():
                setattr(layer, name, buffer.clone())
        yield
    finally:
        for layer, buffers in layers:
            for name, buffer in buffers.items():
                setattr(layer, name, buffer)


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all ranks. Each rank's output depends on it, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorm(_BatchNorm):
    """BatchNorm of the global batch, of however many rows each rank holds, on a CPU, which torch's own refuses.

    In a backward pass every rank gets the gradient of the sum of all ranks' losses with respect to its rows; of weight and bias,
    its rows' part. Ranks must be at the same layer at the same time: all of them encode, or none.
    """

    def forward(self, input: Tensor) -> Tensor:
        alone = not (dist.is_initialized() and dist.get_world_size() > 1)
        if alone or not self.training or self.momentum is None:
            return super().forward(input)
        # Each rank's mean and squared deviations from it, at its place: sums of squares would cancel.
        variance, mean = torch.var_mean(input.float(), [d for d in range(input.ndim) if d != 1], correction=0)
        place = (torch.arange(dist.get_world_size()) == dist.get_rank()).float()[:, None]
        own = torch.cat((mean, variance, torch.tensor([input.numel() / self.num_features])))
        means, variances, counts = _Sum.apply(place * own).split([self.num_features, self.num_features, 1], 1)
        count = counts.detach().sum()
        mean = (counts * means).sum(0) / count
        variance = (counts * (variances + (means - mean).square())).sum(0) / count
        self._remember(mean.detach(), variance.detach() * count / (count - 1))
        scale = self.weight * (variance + self.eps).rsqrt()
        shape = [1, -1] + [1] * (input.ndim - 2)
        return input * scale.to(input.dtype).view(shape) + (self.bias - mean * scale).to(input.dtype).view(shape)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any will do."""

    @torch.no_grad()
    def _remember(self, mean: Tensor, unbiased: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum or 0.0)
        self.running_var.lerp_(unbiased, self.momentum or 0.0)


def to_sync(module: nn.Module) -> None:
    """Let every BatchNorm inside `module` take its statistics over all ranks. The state_dict keeps its names."""
    kind = nn.SyncBatchNorm if any(p.is_cuda for p in module.parameters()) else SyncBatchNorm

    def make(layer: _BatchNorm) -> nn.Module:
        new = kind(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        new.weight, new.bias = layer.weight, layer.bias
        for name, buffer in layer.named_buffers(recurse=False):
            setattr(new, name, buffer)
        return new.train(layer.training)

    _replace(module, make)


def shuffle(rows: Tensor, permutation: Tensor) -> Tensor:
    """Exchange the rows of a global batch, so that place i holds what was at `permutation[i]`.

    rows: this rank's (places `rank_places(len(permutation), rank, world)`), (m, ...). permutation: of the whole batch's places,
    int64 on the CPU, the same on every rank. Returns as many rows. No gradient passes. Raises ValueError for another m.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    size = len(permutation)
    mine = permutation[rank_places(size, rank, world)]
    if len(rows) != len(mine):
        raise ValueError(f"rank {rank} of {world} holds {len(mine)} rows of a batch of {size}, not {len(rows)}")
    # Rows travel sorted by rank and, between two ranks, by the place they go to.
    wanted = [permutation[rank_places(size, other, world)] for other in range(world)]
    sent = [places[places % world == rank] // world for places in wanted]
    outgoing = rows.detach()[torch.cat(sent).to(rows.device)].contiguous()
    incoming = torch.empty_like(outgoing[:1]).expand(len(mine), *rows.shape[1:]).contiguous()
    dist.all_to_all_single(incoming, outgoing, [int((mine % world == r).sum()) for r in range(world)], [len(s) for s in sent])
    came = torch.cat([(mine % world == r).nonzero()[:, 0] for r in range(world)])
    return incoming[came.argsort().to(rows.device)]


def unshuffle(rows: Tensor, permutation: Tensor) -> Tensor:
    """Undo `shuffle`: the row at place i goes to `permutation[i]`."""
    return shuffle(rows, permutation.argsort())
