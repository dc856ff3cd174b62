"""The study's pictures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from arms import MIDDLE, PAIRS, SIZES, M
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from measures import SCORES, Found, paired

QUEUE, ACTIVE, OTHER, INK = "#7a869a", "#c2410c", "#2f6f8f", "#1f2430"
WORLDS = ("balanced", "unequal")
_STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa3b2", "axes.labelcolor": INK,
    "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.titlesize": 11, "axes.titlelocation": "left",
    "legend.frameon": False, "figure.dpi": 130,
}  # fmt: skip


def draw_all(found: Found, folder: Path) -> None:
    with plt.rc_context(_STYLE):
        for name, draw in (("sizes", _sizes), ("classes", _classes), ("differences", _differences), ("curves", _curves)):
            figure = draw(found)
            if figure is not None:
                figure.savefig(folder / f"{name}.png", bbox_inches="tight", facecolor="white")
                plt.close(figure)


def _columns(found: Found, data: str, kind: str, value: Any) -> tuple[list[int], list[float], list[float]]:
    sizes, means, spreads = [], [], []
    for size in SIZES:
        values = [v for v in found.values(data, f"{kind}-{size}", value).values() if np.isfinite(v)]
        if values:
            sizes.append(size), means.append(float(np.mean(values)))
            spreads.append(float(np.std(values, ddof=1)) if len(values) > 1 else 0.0)
    return sizes, means, spreads


def _lines(ax: Axes, found: Found, data: str, value: Any) -> None:
    for kind, colour, name in (("fifo", QUEUE, "random queue"), ("active", ACTIVE, "active")):
        sizes, means, spreads = _columns(found, data, kind, value)
        if sizes:
            ax.errorbar(sizes, means, spreads, color=colour, marker="o", ms=4, lw=1.6, capsize=3, label=name)
            for seed_values in zip(*([*found.values(data, f"{kind}-{s}", value).values()] for s in sizes), strict=False):
                ax.plot(sizes, seed_values, color=colour, lw=0.5, alpha=0.35)
    ax.set_xscale("log", base=2)
    ax.set_xticks(SIZES, [f"{s // M}M" if s > M else "M" for s in SIZES])
    ax.set_xlabel("size of the dictionary")


def _legend(figure: Any, axes: Iterable[Axes]) -> None:
    """One for all, above them, where nothing is drawn."""
    named: dict[str, Any] = {}
    for ax in axes:
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            named.setdefault(name, handle)
    if named:
        figure.legend(named.values(), named.keys(), loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(named))


def _sizes(found: Found) -> Any:
    """Does random saturate where active goes on?"""
    names = ("R@5", "class@1", "rare class@1", "probe, few labels")
    figure, axes = plt.subplots(len(WORLDS), len(names), figsize=(3.1 * len(names), 2.7 * len(WORLDS)), squeeze=False)
    for row, data in zip(axes, WORLDS, strict=True):
        for ax, name in zip(row, names, strict=True):
            _lines(ax, found, data, SCORES[name])
            ax.set_title(f"{name}, {data} classes")
    figure.tight_layout()
    _legend(figure, axes.flat)
    return figure


def _classes(found: Found) -> Any:
    """The paper's figure 3: classes in the dictionary, counted and weighed, over training."""
    figure, axes = plt.subplots(len(WORLDS), len(SIZES), figsize=(3.1 * len(SIZES), 2.6 * len(WORLDS)), sharex=True, sharey=True)
    for row, data in zip(axes, WORLDS, strict=True):
        for ax, size in zip(row, SIZES, strict=True):
            for kind, colour, name in (("fifo", QUEUE, "random queue"), ("active", ACTIVE, "active")):
                for fact, style, told in (("classes", "-", "different"), ("effective_classes", ":", "effective number")):
                    lines = [_over_steps(result, fact) for result in found.by.get((data, f"{kind}-{size}"), {}).values()]
                    lines = [line for line in lines if len(line)]
                    if lines:
                        steps = lines[0][:, 0]
                        ax.plot(steps, np.mean([x[:, 1] for x in lines], 0), style, color=colour, lw=1.6, label=f"{name}, {told}")
            ax.set_ylim(0, 15.6)
            ax.set_title(f"{data}, {size // M}M entries")
    for ax in axes[-1]:
        ax.set_xlabel("step")
    axes[0][0].set_ylabel("classes in the dictionary")
    axes[1][0].set_ylabel("classes in the dictionary")
    figure.tight_layout()
    _legend(figure, axes.flat)
    return figure


def _over_steps(result: dict[str, Any], fact: str) -> Any:
    points = []
    for point in result["curve"]:
        values = [point[key] for side in ("video", "audio") if (key := f"dictionary_{side}/{fact}") in point]
        if values:
            points.append((point["step"], float(np.mean(values))))
    return np.array(points)


def _differences(found: Found) -> Any:
    """Arms held against each other, seeds in pairs."""
    names = ("R@5", "class@1", "rare class@1")
    pairs = [pair for pair in PAIRS if any(all((data, arm) in found.by for arm in pair) for data in WORLDS)]
    if not pairs:
        return None
    figure, axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 0.9 + 0.42 * len(pairs)), sharey=True)
    for ax, name in zip(axes, names, strict=True):
        for data, shift, colour in (("balanced", -0.12, OTHER), ("unequal", 0.12, ACTIVE)):
            label: str | None = f"{data} classes"
            for at, pair in enumerate(pairs):
                if (difference := paired(*(found.values(data, arm, SCORES[name]) for arm in pair))) is not None:
                    style: dict[str, Any] = {"color": colour, "marker": "o", "ms": 4, "capsize": 3}
                    ax.errorbar(difference[0], at + shift, xerr=difference[1], label=label, **style)
                    label = None
        ax.axvline(0, color=QUEUE, lw=1)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.set_title(name)
    axes[0].set_yticks(range(len(pairs)), [f"{arm} - {other}" for arm, other in pairs])
    axes[0].invert_yaxis()
    figure.tight_layout()
    _legend(figure, axes)
    return figure


def _curves(found: Found) -> Any:
    """Held-out retrieval over training, at the middle size."""
    figure, axes = plt.subplots(1, len(WORLDS), figsize=(4.2 * len(WORLDS), 3.0), sharey=True)
    arms = ((f"fifo-{MIDDLE}", QUEUE, "random queue"), (f"active-{MIDDLE}", ACTIVE, "active"), ("uniform", OTHER, "uniform"))
    for ax, data in zip(axes, WORLDS, strict=True):
        for arm, colour, name in arms:
            for number, result in enumerate(found.by.get((data, arm), {}).values()):
                points = [(score["step"], score["R@5"]) for score in result["scores"]]
                ax.plot(*zip(*points, strict=True), color=colour, lw=1.1, alpha=0.8, label=name if not number else None)
        ax.set_title(f"R@5 among held-out clips, {data} classes")
        ax.set_xlabel("step")
    figure.tight_layout()
    _legend(figure, axes)
    return figure
