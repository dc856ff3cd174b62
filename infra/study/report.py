"""Tables and pictures of the study from its raw results; nothing is trained. Tables go between marks in the README."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from arms import DEVELOPMENT_SEEDS, MIDDLE, PAIRS, REASONS, SEEDS, SIZES, M
from figures import draw_all
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


def spread(values: dict[int, float]) -> str:
    """Mean and standard deviation over seeds."""
    found = np.array([v for v in values.values() if np.isfinite(v)])
    if not len(found):
        return ""
    digits = 3 if abs(found.mean()) < 2 else 1
    return f"{found.mean():.{digits}f} ± {found.std(ddof=1):.{digits}f}" if len(found) > 1 else f"{found[0]:.{digits}f}"


def paired(a: dict[int, float], b: dict[int, float]) -> tuple[float, float, int, int] | None:
    """Mean of a - b over the seeds both have, half of its 95 % interval (Student), how often a is above, of how many."""
    seeds = sorted(a.keys() & b.keys())
    if len(seeds) < 2:
        return None
    difference = np.array([a[s] - b[s] for s in seeds])
    half = float(student.ppf(0.975, len(seeds) - 1) * difference.std(ddof=1) / np.sqrt(len(seeds)))
    return float(difference.mean()), half, int((difference > 0).sum()), len(seeds)


def shown(difference: tuple[float, float, int, int] | None) -> str:
    if difference is None:
        return ""
    mean, half, wins, seeds = difference
    text = f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f}), {wins} of {seeds}"
    return f"**{text}**" if abs(mean) > half else text


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(r) + " |" for r in rows)])


def size_tables(found: Found, data: str) -> str:
    """Random queue and active at each size of the dictionary: scores, then what was in the dictionaries, then differences."""
    arms = [arm for size in SIZES for arm in (f"fifo-{size}", f"active-{size}") if (data, arm) in found.by]
    parts = []
    for columns in (SCORES, WITHIN):
        rows = [[arm, *(spread(found.values(data, arm, value)) for value in columns.values())] for arm in arms]
        parts.append(table([f"{data}", *columns], rows))
    rows = []
    for size in SIZES:
        pair = f"active-{size}", f"fifo-{size}"
        cells = [shown(paired(*(found.values(data, arm, value) for arm in pair))) for value in SCORES.values()]
        rows.append([f"active - queue, K={size} ({size // M} M)", *cells])
    parts.append(table(["difference, seeds in pairs", *SCORES], rows))
    return "\n\n".join(parts)


def other_tables(found: Found, data: str) -> str:
    """Arms at the middle size: the differences of those that are held against each other, then what each came to."""
    pairs = [pair for pair in PAIRS if all((data, arm) in found.by for arm in pair)]
    rows = []
    for arm, other in pairs:
        each = (paired(*(found.values(data, one, value) for one in (arm, other))) for value in SCORES.values())
        rows.append([f"{arm} - {other}", *map(shown, each)])
    differences = table([f"{data}, K={MIDDLE}: difference", *SCORES], rows)
    names = ("effective classes", "duplicates", "age, steps", "loss")
    rows = []
    for arm in dict.fromkeys(arm for pair in PAIRS for arm in pair):
        if (data, arm) in found.by:
            columns = [*SCORES.values(), *(WITHIN[name] for name in names), _seconds]
            rows.append([arm, *(spread(found.values(data, arm, value)) for value in columns)])
    return f"{differences}\n\n{table([data, *SCORES, *names, 'processor seconds'], rows)}"


def _seconds(result: Result) -> float:
    return float(result["seconds"]["processor"])


def plain_table(found: Found, data: str) -> str:
    """All arms of a small data set."""
    columns: dict[str, Value] = {
        **{k: v for k, v in SCORES.items() if k != "rare class@1"},
        "probe": lambda result: result["probe"]["both"],
        "chance R@5": last("chance_R@5"),
        "chance class@1": last("chance_class@1"),
    }
    if data == "real":
        columns["ESC-10, audio probe"] = lambda result: result["esc10"]["accuracy"]
    arms = found.arms(data)
    rows = [[arm, *(spread(found.values(data, arm, value)) for value in columns.values())] for arm in arms]
    return table([data, *columns], rows) if rows else ""


def development_table(results: list[Result]) -> str:
    rows = []
    for r in results:
        loss = f"{r['end']['loss']:.2f} of {r['end']['chance']:.2f}"
        rows.append([r["data"], r["arm"], str(r["seed"]), *(f"{value(r):.3f}" for value in SCORES.values()), loss])
    return table(["data", "setting", "seed", *SCORES, "loss of chance"], rows)


def write_report(results: Path, folder: Path) -> None:
    found = Found(read_all(results / "report"))
    development = read_all(results / "development")
    seconds = sum(r["seconds"]["processor"] for stage in ("report", "development") for r in read_all(results / stage))
    runs = sum(map(len, found.by.values()))
    blocks = {
        "facts": f"{runs} runs on seeds {', '.join(map(str, SEEDS))}; {len(development)} runs on development seed "
        f"{', '.join(map(str, DEVELOPMENT_SEEDS))}, of {len({(r['data'], r['arm']) for r in development})} settings; "
        f"{seconds / 3600:.1f} processor hours.",
        "development": development_table(development),
        **{f"sizes {data}": size_tables(found, data) for data in ("balanced", "unequal")},
        **{f"others {data}": other_tables(found, data) for data in ("balanced", "unequal")},
        "reasons": table(["arm", "what it is, and why"], [[arm, why] for arm, why in REASONS.items()]),
        **{data: plain_table(found, data) for data in ("grid", "real")},
    }
    path = folder / "README.md"
    text = path.read_text()
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if begin in text and end in text:
            text = text[: text.index(begin) + len(begin)] + f"\n{block}\n" + text[text.index(end) :]
    aside = path.with_suffix(".part")
    aside.write_text(text)
    aside.rename(path)
    draw_all(found, folder)
    print(f"tables: {path}; pictures beside it")
