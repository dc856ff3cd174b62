"""What is killed when: a pure function of the seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

Phase = Literal["ingest", "pretrain"]
OUTAGE_S = 30.0
_EARLY, _LATE = (0.15, 0.4), (0.55, 0.8)


@dataclass(frozen=True)
class Kill:
    """kill -9 to all that runs on `host`, once `at` clips are ingested, or steps trained; back after `away_s` seconds."""

    what: str
    host: str
    phase: Phase
    at: int
    away_s: float


def schedule(seed: int, clips: int, steps: int) -> list[Kill]:
    """Four kills, two a phase, in the order of their moments: which first, which host, when and for how long is drawn."""
    draw = random.Random(seed)
    node, worker = f"node-{draw.randint(1, 2)}", f"worker-{draw.randint(1, 2)}"
    pairs: dict[Phase, tuple[int, list[tuple[str, str, float]]]] = {
        "ingest": (clips, [("ingest worker", worker, draw.uniform(3, 15)), ("Prefect server", "prefect", OUTAGE_S)]),
        "pretrain": (steps, [("trainer node", node, draw.uniform(3, 15)), ("S3 endpoint", "s3", OUTAGE_S)]),
    }
    kills = []
    for phase, (whole, those) in pairs.items():
        draw.shuffle(those)
        for (what, host, away_s), (low, high) in zip(those, (_EARLY, _LATE), strict=True):
            kills.append(Kill(what, host, phase, round(whole * draw.uniform(low, high)), round(away_s, 1)))
    return kills


def change_of_ranks(seed: int, steps: int) -> int:
    """The step after which a run is killed whole, to go on with another number of ranks."""
    return round(steps * random.Random(f"{seed} ranks").uniform(0.3, 0.7))
