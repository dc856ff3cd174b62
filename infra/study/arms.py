"""What is compared: arms by name, and the runs that the study consists of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from run import Setting

M = 32
SIZES = (M, 4 * M, 16 * M, 64 * M)
"""Of the dictionary."""
MIDDLE = 16 * M
"""The size at which everything else is compared."""
POOL = 128 * M
DEVELOPMENT_SEEDS = (100,)
SEEDS = (1, 2, 3, 4, 5)
"""Of the report; nothing was chosen by them."""


@dataclass(frozen=True)
class Run:
    """stage: `development` or `report`. data: name of a data set."""

    stage: str
    data: str
    arm: str
    seed: int
    setting: Setting

    @property
    def name(self) -> str:
        return f"{self.data}--{self.arm}--{self.seed}"


BASE: dict[str, Any] = {
    "negatives": "dictionary", "dictionary": MIDDLE, "candidates": POOL, "tau": 0.1, "momentum": 0.999, "pseudo_tau": 0.1,
}  # fmt: skip


def setting(steps: int = 400, rate: float = 1e-3, batch: int = M, **objective: Any) -> Setting:
    return Setting(steps=steps, batch=batch, rate=rate, objective={**BASE, **objective})


REASONS = {
    "uniform": "the same pool, so keys as old as active ones: tells choosing from staleness",
    "uncertainty": "the largest |R_n| alone: tells uncertainty from diversity",
    "queue, m=.99": "the random queue with the momentum that suits it best",
    "fresh": "remedy 1, m=.99: 4M other clips are encoded in the very step and M picked from them, so that no pick is stale",
    "fresh uniform": "the same clips, M of them at random: tells choosing from more clips seen",
    "young": "remedy 2: no candidate and no negative older than 32 steps",
    "late": "remedy 3: the queue alone for 100 steps, active picks come in over the next 100: hard negatives hurt at the start",
    "half": "remedy 4, m=.99: half of what enters is picked, half is the batch, so that half of it is as fresh as the queue",
    "sharp": "remedy 5: pseudo_tau .03 instead of .1, so that |R_n| tells candidates apart",
}
"""Arms at the middle size, and why."""

PAIRS = (
    (f"active-{MIDDLE}", f"fifo-{MIDDLE}"),
    (f"active-{MIDDLE}", "uniform"),
    ("uniform", f"fifo-{MIDDLE}"),
    ("uncertainty", f"fifo-{MIDDLE}"),
    ("young", f"fifo-{MIDDLE}"),
    ("late", f"fifo-{MIDDLE}"),
    ("sharp", f"fifo-{MIDDLE}"),
    ("queue, m=.99", f"fifo-{MIDDLE}"),
    ("fresh", "queue, m=.99"),
    ("fresh", "fresh uniform"),
    ("half", "queue, m=.99"),
)
"""Which arm is held against which: but for the momentum's own line, both have the same m."""

_OTHERS: dict[str, dict[str, Any]] = {
    "uniform": {"selector": "random"},
    "uncertainty": {"selector": "uncertainty"},
    "queue, m=.99": {"selector": "fifo", "momentum": 0.99},
    "fresh": {"pool": "fresh", "momentum": 0.99},
    "fresh uniform": {"pool": "fresh", "momentum": 0.99, "selector": "random"},
    "young": {"age_limit": 32},
    "late": {"share_start": 100, "share_ramp": 100},
    "half": {"share": 0.5, "momentum": 0.99},
    "sharp": {"pseudo_tau": 0.03},
}
BOTH_WORLDS = ("queue, m=.99", "fresh")

_SMALL: dict[str, dict[str, Any]] = {
    "untrained": {"selector": "fifo", "steps": 1, "rate": 1e-9},
    "batch alone": {"negatives": "batch", "selector": "fifo"},
    "queue": {"selector": "fifo"},
    "active": {},
}
"""Of the small real data sets, m=.99."""
SMALL_PAIRS = (("active", "queue"), ("active", "batch alone"), ("queue", "untrained"))
_SIZED: dict[str, dict[str, Any]] = {
    "grid": {"batch": 16, "dictionary": 48, "candidates": 80, "steps": 300},
    "real": {"batch": 32, "dictionary": 128, "candidates": 256, "steps": 300},
}

_TRIED: dict[str, dict[str, Any]] = {
    "fifo, m=.999": {"selector": "fifo"},
    "kmeans++, m=.999": {},
    "random, m=.999": {"selector": "random"},
    "fifo, m=.99": {"selector": "fifo", "momentum": 0.99},
    "kmeans++, m=.99": {"momentum": 0.99},
    "random, m=.99": {"selector": "random", "momentum": 0.99},
    "fresh kmeans++, m=.99": {"pool": "fresh", "momentum": 0.99},
    "fresh random, m=.99": {"pool": "fresh", "selector": "random", "momentum": 0.99},
    "half kmeans++, m=.99": {"share": 0.5, "momentum": 0.99},
    "kmeans++ of the last 8 batches, m=.99": {"candidates": 8 * M, "momentum": 0.99},
    "fifo, m=.99, rate 2e-3": {"selector": "fifo", "momentum": 0.99, "rate": 2e-3},
}


def development() -> Iterator[Run]:
    """What settings were tried, on a development seed."""
    for arm, given in _TRIED.items():
        for data in ("balanced", "unequal"):
            yield Run("development", data, arm, DEVELOPMENT_SEEDS[0], setting(**given))


def report() -> Iterator[Run]:
    """The comparison itself: what matters most comes first, and all seeds of a question before the next one."""
    worlds = ("unequal", "balanced")

    def sized(size: int) -> Iterator[Run]:
        for data in worlds:
            for seed in SEEDS:
                yield Run("report", data, f"fifo-{size}", seed, setting(selector="fifo", dictionary=size))
                yield Run("report", data, f"active-{size}", seed, setting(dictionary=size))

    def middle(data: str, arm: str) -> Iterator[Run]:
        for seed in SEEDS:
            yield Run("report", data, arm, seed, setting(**_OTHERS[arm]))

    yield from sized(MIDDLE)
    for arm in BOTH_WORLDS:
        for data in worlds:
            yield from middle(data, arm)
    yield from sized(SIZES[3])
    for arm in (arm for arm in _OTHERS if arm not in BOTH_WORLDS):
        yield from middle("unequal", arm)
    yield from sized(SIZES[0])
    for data, own in _SIZED.items():
        for arm, given in _SMALL.items():
            for seed in SEEDS:
                yield Run("report", data, arm, seed, setting(**{"momentum": 0.99, **own, **given}))
    yield from sized(SIZES[1])


def runs(stage: str) -> list[Run]:
    return list(development() if stage == "development" else report())
