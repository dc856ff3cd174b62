"""What is read off a run's raw result, and how arms are held against each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

Result = dict[str, Any]
Value = Callable[[Result], float]


def last(name: str) -> Value:
    return lambda result: float(result["scores"][-1].get(name, np.nan))


def of_dictionaries(name: str) -> Value:
    """Mean over both dictionaries and the second half of training."""

    def value(result: Result) -> float:
        half = result["curve"][len(result["curve"]) // 2 :]
        names = [f"dictionary_{side}/{name}" for side in ("video", "audio")]
        found = [point[key] for point in half for key in names if key in point]
        return float(np.mean(found)) if found else float("nan")

    return value


SCORES: dict[str, Value] = {
    "R@1": last("R@1"),
    "R@5": last("R@5"),
    "class@1": last("class@1"),
    "rare class@1": last("rare_class@1"),
    "R@1 in class": last("same_class_R@1"),
    "probe, few labels": lambda result: result["probe"]["few_both"],
}
WITHIN: dict[str, Value] = {
    "classes": of_dictionaries("classes"),
    "effective classes": of_dictionaries("effective_classes"),
    "duplicates": of_dictionaries("duplicates"),
    "age, steps": of_dictionaries("age"),
    "mean cosine": of_dictionaries("cosine"),
    "loss": lambda result: result["end"]["loss"],
    "bound, nats": lambda result: result["end"]["bound_nats"],
    "choosing, ms a step": lambda result: 1e3 * result["seconds"]["choosing"] / result["setting"]["steps"],
}


def read_all(folder: Path) -> list[Result]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


class Found:
    """Results of one stage, by (data, arm) and seed."""

    def __init__(self, results: Iterable[Result]) -> None:
        self.by: dict[tuple[str, str], dict[int, Result]] = {}
        for result in results:
            self.by.setdefault((result["data"], result["arm"]), {})[result["seed"]] = result

    def values(self, data: str, arm: str, value: Value) -> dict[int, float]:
        return {seed: value(result) for seed, result in sorted(self.by.get((data, arm), {}).items())}

    def arms(self, data: str) -> list[str]:
        return [arm for d, arm in self.by if d == data]


def paired(a: dict[int, float], b: dict[int, float]) -> tuple[float, float, int, int] | None:
    """Mean of a - b over the seeds both have, half of its 95 % interval (Student), how often a is above, of how many."""
    seeds = sorted(a.keys() & b.keys())
    if len(seeds) < 2:
        return None
    difference = np.array([a[s] - b[s] for s in seeds])
    half = float(student.ppf(0.975, len(seeds) - 1) * difference.std(ddof=1) / np.sqrt(len(seeds)))
    return float(difference.mean()), half, int((difference > 0).sum()), len(seeds)
