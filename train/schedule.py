"""Schedules: pure functions of the step."""

from __future__ import annotations

import math


def ramp(step: int, start: int, steps: int) -> float:
    """0 before `start`, rising linearly to 1 at `start + steps`, then 1."""
    if step < start:
        return 0.0
    return 1.0 if steps <= 0 else min(1.0, (step - start) / steps)


def warmup_cosine(step: int, warmup: int, total: int, floor: float = 0.0) -> float:
    """Factor on the learning rate: linear to 1 over `warmup` steps, then a half cosine down to `floor` at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def warmup_constant(step: int, warmup: int) -> float:
    """Factor on the learning rate: linear to 1 over `warmup` steps, then 1, as the paper trains."""
    return min(1.0, (step + 1) / max(1, warmup))
