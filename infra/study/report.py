"""Tables and pictures of the study from its raw results; nothing is trained. Tables go between marks in the README."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from arms import DEVELOPMENT_SEEDS, MIDDLE, PAIRS, REASONS, SEEDS, SIZES, SMALL_PAIRS, M
from figures import draw_all
from measures import SCORES, WITHIN, Found, Result, Value, last, paired, read_all


def spread(values: dict[int, float]) -> str:
    """Mean and standard deviation over seeds."""
    found = np.array([v for v in values.values() if np.isfinite(v)])
    if not len(found):
        return ""
    digits = 3 if abs(found.mean()) < 2 else 1
    return f"{found.mean():.{digits}f} ± {found.std(ddof=1):.{digits}f}" if len(found) > 1 else f"{found[0]:.{digits}f}"


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
    differences = _differences(found, data, pairs, f"{data}, K={MIDDLE}: difference", SCORES)
    names = ("effective classes", "duplicates", "age, steps", "loss")
    rows = []
    for arm in dict.fromkeys(arm for pair in PAIRS for arm in pair):
        if (data, arm) in found.by:
            columns = [*SCORES.values(), *(WITHIN[name] for name in names), _seconds]
            rows.append([arm, *(spread(found.values(data, arm, value)) for value in columns)])
    return f"{differences}\n\n{table([data, *SCORES, *names, 'processor seconds'], rows)}"


def _differences(found: Found, data: str, pairs: Iterable[tuple[str, str]], head: str, columns: dict[str, Value]) -> str:
    """Arms held against each other, seeds in pairs."""
    rows = []
    for arm, other in pairs:
        each = (paired(*(found.values(data, one, value) for one in (arm, other))) for value in columns.values())
        rows.append([f"{arm} - {other}", *map(shown, each)])
    return table([head, *columns], rows)


def _seconds(result: Result) -> float:
    return float(result["seconds"]["processor"])


def plain_table(found: Found, data: str) -> str:
    """All arms of a small data set: what each came to, then the differences of those that are held against each other."""
    scores = {name: value for name, value in SCORES.items() if name != "rare class@1"}
    scores["probe"] = lambda result: result["probe"]["both"]
    if data == "real":
        scores["ESC-10, audio probe"] = lambda result: result["esc10"]["accuracy"]
    within = ("effective classes", "duplicates", "age, steps")
    chances = {"chance R@5": last("chance_R@5"), "chance class@1": last("chance_class@1")}
    columns = {**scores, **chances, **{name: WITHIN[name] for name in within}}
    arms = found.arms(data)
    if not arms:
        return ""
    rows = [[arm, *(spread(found.values(data, arm, value)) for value in columns.values())] for arm in arms]
    pairs = [pair for pair in SMALL_PAIRS if all(arm in arms for arm in pair)]
    return f"{table([data, *columns], rows)}\n\n{_differences(found, data, pairs, f'{data}: difference', scores)}"


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
