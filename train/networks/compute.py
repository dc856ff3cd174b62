"""How the encoders are computed: precision, compiler, recomputation; copies to the device; garbage collection."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import MethodType, TracebackType
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmacc.train.loading.reader import Batch
from cmacc.train.networks.batchnorm import frozen_statistics, to_sync
from cmacc.train.networks.encoders import Encoder

Precision = Literal["auto", "float32", "bf16"]
Compile = Literal["auto", "on", "off"]
AcrossRanks = Literal["rank", "sync", "shuffled"]

COMPILER = "inductor"
"""torch.compile's backend."""


@dataclass(frozen=True)
class ComputeConfig:
    """precision: of the encoders; `auto` is bf16 autocast on CUDA and float32 elsewhere. compile: by torch.compile; `auto` on
    CUDA alone. micro_batch: clips that one rank encodes at once, 0 for all its clips. checkpointing: forget activations and
    compute them again in the backward pass, stage by stage of the backbone. batchnorm: statistics of each `rank` by itself; of
    all ranks (`sync`); or of each rank, but of a batch `shuffled` over the ranks for the key encoders (arXiv 1911.05722, 3.3).
    collect_every: steps between two garbage collections, on all ranks in the same step; 0 leaves it to Python.
    """

    precision: Precision = "auto"
    compile: Compile = "auto"
    micro_batch: int = 0
    checkpointing: bool = False
    batchnorm: AcrossRanks = "rank"
    collect_every: int = 500

    def __post_init__(self) -> None:
        for name, known in (
            ("precision", get_args(Precision)),
            ("compile", get_args(Compile)),
            ("batchnorm", get_args(AcrossRanks)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"compute.{name} is {getattr(self, name)!r}; use one of {', '.join(known)}")
        for name, unit in (("micro_batch", "clips, 0 for all at once"), ("collect_every", "steps, 0 to leave it to Python")):
            if getattr(self, name) < 0:
                raise ValueError(f"compute.{name} is {getattr(self, name)}; give a number of {unit}")

        if self.batchnorm == "sync" and self.micro_batch:
            raise ValueError(
                "compute.batchnorm is sync with a compute.micro_batch, but statistics of the whole batch need all of it at once; "
                "use micro_batch=0, or batchnorm=rank, or encoders.norm=group"
            )

    def bf16(self, device: torch.device) -> bool:
        return self.precision == "bf16" or (self.precision == "auto" and device.type == "cuda")

    def compiles(self, device: torch.device) -> bool:
        return self.compile == "on" or (self.compile == "auto" and device.type == "cuda")


def prepare(encoder: Encoder, config: ComputeConfig, device: torch.device, world_size: int = 1) -> None:
    """Make an encoder compute as `config` says, in place. Its state_dict keeps its names.

    Copies (`copy.deepcopy`) are not compiled: prepare each query and each key encoder, once, after it is on its device.
    """
    if config.batchnorm == "sync" and world_size > 1:
        to_sync(encoder)
    if config.checkpointing:
        for stage in encoder.stages:
            stage.forward = MethodType(_forget_and_recompute, stage)
    if config.compiles(device):
        # One code for query and key, training and evaluation, growing batches: at 8 graphs of it torch would quietly give up.
        from torch import _dynamo  # takes seconds, which who does not compile need not wait

        _dynamo.config.recompile_limit = max(_dynamo.config.recompile_limit, 64)
        # The backbone alone: it is the work, and `features` goes through it too.
        encoder.backbone.compile(backend=COMPILER)


def _forget_and_recompute(stage: nn.Module, x: Tensor) -> Tensor:
    """The forward pass of `stage`, done again when the backward pass comes to it. Counted once in BatchNorm's statistics."""
    forward = partial(type(stage).forward, stage)
    if torch.compiler.is_compiling():
        # It takes no contexts, nor needs one: in its graph the statistics are an output, which recomputation leaves out.
        y: Tensor = checkpoint(forward, x, use_reentrant=False)
    else:
        y = checkpoint(forward, x, use_reentrant=False, context_fn=lambda: (nullcontext(), frozen_statistics(stage)))
    return y


def autocast(config: ComputeConfig, device: torch.device) -> torch.autocast:
    """What the encoders run in: bf16 where the configuration says so, nothing otherwise."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.bf16(device))


class Collector:
    """Garbage collection in step: not whenever Python likes, which on many ranks is at many times, but each `every` steps.

    every: 0 leaves the automatic collection on. A context manager: on leaving, the automatic collection is as it was.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._automatic = gc.isenabled()

    def __enter__(self) -> Collector:
        self._automatic = gc.isenabled()
        if self.every:
            gc.disable()
        return self

    def at(self, step: int) -> None:
        if self.every and step % self.every == 0:
            gc.collect()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._automatic:
            gc.enable()


class OnDevice:
    """The batches of a loader, on the device. With CUDA they are copied on a stream of their own.

    No batch is taken ahead of its step, so that the loader's position stays what has been consumed: as the host does not wait
    for the device inside a step, it comes here while the step before is still being computed, and the copy runs beside it.
    """

    def __init__(self, batches: Iterable[Batch], device: torch.device) -> None:
        self._batches, self._device = iter(batches), device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        if self._stream is None:
            return batch.to(self._device)
        now = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            # Only from pinned memory does a copy run beside the host.
            pinned = {n: t if t is None or t.is_cuda else t.pin_memory() for n, t in vars(batch).items()}
            moved = Batch(**pinned).to(self._device)
        now.wait_stream(self._stream)
        for tensor in vars(moved).values():
            if tensor is not None:
                tensor.record_stream(now)
        return moved
