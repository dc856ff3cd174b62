"""How long a part of a step takes, without waiting for it."""

from __future__ import annotations

import time
from types import TracebackType

import torch


class Stopwatch:
    """`with Stopwatch(device) as watch: ...`, later `watch.seconds()`. On a GPU a pair of events, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else None
        self._began = self._took = 0.0

    def __enter__(self) -> Stopwatch:
        if self._events:
            self._events[0].record()
        self._began = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._took = time.perf_counter() - self._began
        if self._events:
            self._events[1].record()

    def seconds(self) -> float:
        """Of the device's work. On a GPU this waits until it is done."""
        if self._events is None:
            return self._took
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1e3
