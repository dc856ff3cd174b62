"""Ranks: which process this is, and what all of them know together. For one process every call costs nothing."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class DistributedConfig:
    """checksum_every: steps from one proof to the next that all ranks hold the same weights, dictionaries and pools; 0: never.
    timeout_s: for the others, once a rank is lost or stands still."""

    checksum_every: int = 100
    timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        if self.checksum_every < 0:
            raise ValueError(f"distributed.checksum_every is {self.checksum_every}; give a number of steps, or 0 for never")
        if not 0 < self.timeout_s < math.inf:
            raise ValueError(f"distributed.timeout_s is {self.timeout_s}; give a number of seconds above 0")


class RanksDisagree(Exception):
    """Ranks that should hold the same tensors do not; the sentence says which."""


@dataclass(frozen=True)
class World:
    """This process among `size`. hosts: a process group for what the hosts tell each other, beside the device's own."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    hosts: Any = None

    @property
    def leads(self) -> bool:
        """Whether this is the one that logs, evaluates and saves."""
        return self.rank == 0

    def gather(self, rows: Tensor, total: int) -> Tensor:
        """The global batch in its order, (total, ...), the same bits on every rank; without gradient.

        rows: this rank's, every size-th from its own. Ranks may have one row more or less than others.
        """
        if self.size == 1:
            return rows.detach()
        most = -(-total // self.size)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows.detach()
        gathered = rows.new_empty(self.size * most, *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, padded)
        return gathered.unflatten(0, (self.size, most)).transpose(0, 1).flatten(0, 1)[:total]

    def own(self, rows: Tensor) -> Tensor:
        """This rank's rows of a global batch."""
        return rows[self.rank :: self.size]

    def everywhere(self, ok: Tensor) -> Tensor:
        """Whether a 0-d bool is true on every rank; on the device, nothing waits for the host."""
        if self.size == 1:
            return ok
        least = ok.to(torch.int32)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return least.bool()

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Each flag: whether any rank raised it. Waits until every host has asked."""
        if self.size == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self.hosts)
        return [bool(each) for each in raised]

    def collect(self, thing: T) -> list[T]:
        """What each rank has, by rank, on every rank. For small things of the host."""
        if self.size == 1:
            return [thing]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, thing, group=self.hosts)
        return found

    def share(self, thing: T) -> T:
        """What rank 0 has."""
        if self.size == 1:
            return thing
        box = [thing]
        dist.broadcast_object_list(box, 0, group=self.hosts)
        return box[0]

    def follow(self, tensors: Sequence[Tensor]) -> None:
        """Take rank 0's values, in place."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.broadcast(flat, 0)
        for tensor, values in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(values.view_as(tensor))

    def prove_same(self, tensors: dict[str, Tensor], step: int) -> None:
        """Raises RanksDisagree when a tensor is not the same on all ranks, bit for bit. Waits for the device."""
        if self.size == 1:
            return
        sums = dict(zip(tensors, torch.stack([checksum(t) for t in tensors.values()]).tolist(), strict=True))
        for rank, others in enumerate(self.collect(sums)):
            different = [name for name in sums if others[name] != sums[name]]
            if different:
                raise RanksDisagree(
                    f"at step {step} ranks {self.rank} and {rank} hold different {different[0]} "
                    f"({len(different)} tensors differ); start again from the last checkpoint, "
                    "and look for a machine with a faulty or another kind of GPU"
                )


def checksum(tensor: Tensor) -> Tensor:
    """A 0-d int64 that tells other bits, or another order of rows, apart: rows' sums of bit patterns, weighted by place."""
    size = tensor.element_size()
    bits = tensor.detach().contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[size])
    rows = bits.reshape(len(bits) if bits.ndim > 1 else bits.numel(), -1).sum(1, dtype=torch.int64)
    return (rows * torch.arange(1, len(rows) + 1, device=rows.device)).sum()


@contextmanager
def joined(config: DistributedConfig) -> Iterator[World]:
    """The world that torchrun's environment variables tell of, or this process alone.

    NCCL between GPUs, gloo otherwise. A process group that stands already is used, and left standing. Raises ValueError where a
    machine has more ranks than GPUs.
    """
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0")) if size > 1 else 0
    if cuda and local >= (there := torch.cuda.device_count()):
        said = f"this machine has {there} GPU{'s' if there > 1 else ''}, and there is none for rank {local} of it"
        raise ValueError(f"{said}; give --ranks 0, or torchrun --nproc-per-node {there}")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size == 1:
        yield World(device=device)
        return
    begun = not dist.is_initialized()
    timeout = timedelta(seconds=config.timeout_s)
    if begun:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
    try:
        hosts = dist.new_group(backend="gloo", timeout=timeout)
        yield World(dist.get_rank(), size, device, hosts)
    finally:
        if begun:
            dist.destroy_process_group()
