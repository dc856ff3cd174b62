"""What is known of a run, out of the files of its folder: at any time, in mid-training too."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmacc.shards.place import place
from cmacc.train.config import RECIPES, PretrainConfig, flatten, from_json, recipe, to_json
from cmacc.train.networks.flops import encoder_flops
from cmacc.train.running.checkpoint import CheckpointError, checkpoint_folder, describe, latest, step_of
from cmacc.train.running.metrics import MetricsLog

ALARMS = "alarms.jsonl"
QUARANTINE = "quarantine"


@dataclass(frozen=True)
class Run:
    """folder: of the run. data: addresses it learns from. records: of its log, by step. alarms, quarantined: JSON objects.
    failed: steps whose batches are kept. checkpoint: what the latest one's JSON says; trouble: why there is none."""

    folder: Path
    data: list[str]
    config: PretrainConfig
    records: list[dict[str, Any]]
    alarms: list[dict[str, Any]]
    quarantined: list[dict[str, Any]]
    failed: list[str]
    checkpoint: dict[str, Any] | None
    trouble: str

    @property
    def step(self) -> int:
        """The last one that is logged."""
        return max((int(record["step"]) for record in self.records), default=0)

    @property
    def clips_seen(self) -> int:
        return self.step * self.config.loader.batch

    def points(self, name: str) -> list[tuple[float, float | None]]:
        """(step, value) of a number of the log, None where it was not finite."""
        return [(r["step"], r[name]) for r in self.records if name in r]

    def last(self, name: str) -> float | None:
        return next((r[name] for r in reversed(self.records) if r.get(name) is not None), None)


def read_run(run: str | os.PathLike[str]) -> Run:
    """Raises ValueError with a sentence when the folder is not that of a run, or of one of another version."""
    folder = Path(run)
    try:
        saved = json.loads((folder / "config.json").read_text())
        data = saved.pop("data")
        config = from_json(saved)
    except (FileNotFoundError, NotADirectoryError):
        said = "which has config.json and metrics.jsonl, on this machine"
        raise ValueError(
            f"{os.fspath(run)} is not the folder of a run; give the one that `cmacc pretrain` wrote, {said}"
        ) from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = str(error).splitlines()[0].partition(";")[0]
        raise ValueError(
            f"{folder / 'config.json'} is not what this version writes ({reason}); make the report with the version of the run"
        ) from error
    records = [record for record in MetricsLog.read(folder / "metrics.jsonl") if isinstance(record.get("step"), int)]
    described, trouble = _checkpoint(folder, config)
    alarms = {(a.get("step"), a.get("kind")): a for a in _lines(folder / ALARMS)}  # a continued run meets some again
    quarantined = {str(q.get("key")): q for path in sorted(folder.glob(f"{QUARANTINE}*.jsonl")) for q in _lines(path)}
    return Run(
        folder,
        [data] if isinstance(data, str) else list(data),
        config,
        records,
        list(alarms.values()),
        list(quarantined.values()),
        sorted(path.name for path in folder.glob("failed/step-*")),
        described,
        trouble,
    )


def differences(config: PretrainConfig) -> tuple[str, dict[str, tuple[Any, Any]]]:
    """The recipe that is nearest to it, and the options in which it differs: name to (value, the recipe's)."""
    ours = flatten(to_json(config))

    def against(name: str) -> dict[str, tuple[Any, Any]]:
        theirs = flatten(to_json(recipe(name)))
        return {option: (value, theirs[option]) for option, value in ours.items() if value != theirs[option]}

    nearest = min(RECIPES, key=lambda name: len(against(name)))
    return nearest, against(nearest)


def cost(run: Run) -> dict[str, str]:
    """What the run took so far, in words: training alone, without evaluations and starts."""
    hours = lost = 0.0
    before, speeds = 0, []
    for record in run.records:
        if (seconds := record.get("speed/step_s")) is None:
            continue
        steps, before = record["step"] - before, record["step"]
        hours += steps * seconds / 3600
        lost += steps * seconds / 3600 * (record.get("speed/waiting") or 0.0)
        speeds.append((steps, seconds))
    found = {"steps": f"{run.step:,} of {run.config.steps:,}", "clips seen": f"{run.clips_seen:,}"}
    if hours:
        clips = sum(steps for steps, _ in speeds) * run.config.loader.batch
        found["time of all steps"] = _lasting(hours)
        found["clips/s"] = f"{clips / (hours * 3600):,.3g} on average, end to end"
        found["waiting for data"] = f"{lost / hours:.1%} of that time"
    if (share := run.last("selection/share")) is not None:
        found["choosing negatives"] = f"{share:.1%} of a step"
    flops = encoder_flops(run.config.encoders, run.config.view)
    found["work"] = f"{flops / 1e9:,.3g} GFLOP a clip, {_scaled(flops * run.clips_seen)}FLOP so far"
    mfu = run.last("speed/mfu")
    found["share of the device's peak"] = "not known for this device" if mfu is None else f"{mfu:.1%}"
    for name, what in (("memory/resident_gb", "memory"), ("memory/cuda_peak_gb", "memory of the GPU")):
        values = [v for _, v in run.points(name) if v is not None and math.isfinite(v)]
        if values:
            found[what] = f"{max(values):.3g} GB at most{', of rank 0' if name.startswith('memory/res') else ''}"
    return found


def _checkpoint(folder: Path, config: PretrainConfig) -> tuple[dict[str, Any] | None, str]:
    where = checkpoint_folder(folder, config.checkpoint.at)
    try:
        address = latest(where)
        if address is None:
            return None, "It has saved no checkpoint yet."
        return describe(place(where), step_of(address)), ""
    except (CheckpointError, OSError) as error:
        return None, f"Its checkpoint cannot be read: {error}."


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """JSON objects, a line each; what a kill or a full disk cut off is passed over."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            yield found


def _lasting(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 2 else f"{hours * 60:.1f} min"


def _scaled(number: float) -> str:
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if number >= size:
            return f"{number / size:,.3g} {letter}"
    return f"{number:.3g} "
