"""What a run costs: clips a second, time spent waiting and selecting, memory."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch


class Waits(Protocol):
    """A loader: seconds that its consumer has waited for it."""

    @property
    def waited_s(self) -> float: ...


class Clock:
    """Counts since the last restart. Nothing in it waits for the device but `facts`.

    flops: of training on one clip. peak: FLOP/s that one device can do at most; both or neither, for `speed/mfu`. world: ranks.
    """

    def __init__(
        self, loader: Waits, device: torch.device, *, flops: float | None = None, peak: float | None = None, world: int = 1
    ) -> None:
        self._loader, self._device = loader, device
        self._mfu_of_clip = flops / (peak * world) if flops and peak else None
        self.restart()

    def restart(self) -> None:
        """After an evaluation, a checkpoint, a rollback: what went before is not counted."""
        self._clips, self._steps, self._waited = 0, 0, self._loader.waited_s
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._began = time.perf_counter()

    def tick(self, clips: int) -> None:
        """A step is done. clips: of the global batch."""
        self._clips, self._steps = self._clips + clips, self._steps + 1

    def facts(self, parts: Mapping[str, float] | None = None) -> dict[str, float]:
        """`speed/…` and `memory/…` since the last restart, and restart.

        parts: seconds that a part of a step takes, e.g. `{"selection": 0.01}`; told as its share of the step.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elapsed, steps = max(time.perf_counter() - self._began, 1e-9), max(self._steps, 1)
        facts = {
            "speed/clips_per_s": self._clips / elapsed,
            "speed/step_s": elapsed / steps,
            "speed/waiting": (self._loader.waited_s - self._waited) / elapsed,
        }
        for name, seconds in (parts or {}).items():
            facts |= {f"{name}/seconds": seconds, f"{name}/share": seconds * steps / elapsed}
        if self._mfu_of_clip is not None:
            facts["speed/mfu"] = facts["speed/clips_per_s"] * self._mfu_of_clip
        facts["memory/resident_gb"] = resident_bytes() / 1e9
        if self._device.type == "cuda":
            facts["memory/cuda_peak_gb"] = torch.cuda.max_memory_allocated(self._device) / 1e9
        self.restart()
        return facts


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
