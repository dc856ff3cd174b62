"""Pictures of an evaluation: which classes are taken for which, and how well each is told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from cmacc.train.evaluation.results import Result

PROTOCOLS = ("finetune", "svm", "logistic", "knn")
"""Of the trained encoder the first one that there is, is drawn."""
_BASELINES = ("o", "x", "+", "^")


def draw(folder: Path, results: Sequence[Result]) -> list[Path]:
    """Write TASK-confusion.png and TASK-classes.png for each task with classes, and return the paths."""
    mpl.use("Agg")
    paths = []
    for task in dict.fromkeys(result.task for result in results):
        of_task = [result for result in results if result.task == task and result.classes]
        ranked = sorted(of_task, key=lambda r: (r.encoder != "trained", PROTOCOLS.index(r.protocol)))
        if not ranked:
            continue
        shown = ranked[0]
        beside = [r for r in of_task if r.protocol == shown.protocol and r.encoder != shown.encoder]
        for name, figure in (("confusion", confusion(shown)), ("classes", per_class(shown, beside))):
            paths.append(folder / f"{task}-{name}.png")
            figure.savefig(paths[-1], dpi=100)
    return paths


def confusion(result: Result) -> Figure:
    """Share of each class (row) that was told to be of each class (column)."""
    counts = np.array(result.confusion, dtype=np.float64)
    n = len(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side, font = _side(n)
    figure = Figure(figsize=(side + 3, side + 1.5), layout="constrained")
    figure.suptitle(_title(result), fontsize=10)
    axes = figure.add_subplot(xlabel="told", ylabel="is")
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1))  # so that what is rare is seen
    axes.set_xticks(range(n), result.classes, rotation=90, fontsize=font)
    axes.set_yticks(range(n), result.classes, fontsize=font)
    if n <= 20:
        for row, column in np.argwhere(counts > 0).tolist():
            colour = "white" if shares[row, column] > 0.4 else "black"
            axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", fontsize=font, color=colour)
    figure.colorbar(image, ax=axes, shrink=0.6, label="share of the class's files")
    return figure


def per_class(result: Result, beside: Sequence[Result] = ()) -> Figure:
    """Accuracy of each class, best first; baselines of the same protocol as marks."""
    own = accuracies(result)
    names = sorted(own, key=lambda name: (-own[name], name))
    side, font = _side(len(names))
    figure = Figure(figsize=(7, side + 1), layout="constrained")
    figure.suptitle(_title(result), fontsize=10)
    axes = figure.add_subplot(xlabel="share of the class's files told rightly", xlim=(0, 1.02))
    axes.barh(range(len(names)), [own[name] for name in names], color="#8fb8de", label=result.encoder)
    for mark, other in zip(_BASELINES, beside, strict=False):
        theirs = accuracies(other)
        style: dict[str, Any] = {"edgecolors": "black", "facecolors": "none"} if mark == "o" else {"color": "black"}
        label = f"{other.encoder}: {other.score:.1%}"
        shares = [theirs.get(name, 0.0) for name in names]
        axes.scatter(shares, range(len(names)), s=14, lw=0.8, marker=mark, label=label, zorder=3, **style)
    axes.axvline(result.chance, color="grey", linestyle=":", label=f"chance: {result.chance:.1%}")
    axes.set_yticks(range(len(names)), names, fontsize=font)
    axes.set_ylim(len(names) - 0.4, -0.6)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    return figure


def accuracies(result: Result) -> dict[str, float]:
    """Of each class that was tested."""
    counts = np.array(result.confusion, dtype=np.float64)
    total = counts.sum(1)
    return {name: float(counts[i, i] / total[i]) for i, name in enumerate(result.classes) if total[i]}


def _side(classes: int) -> tuple[float, float]:
    """Inches that so many names take, and points of their type."""
    font = 9.0 if classes <= 20 else 7.5
    return max(3.0, classes * font * 1.35 / 72), font


def _title(result: Result) -> str:
    splits = "1 split" if len(result.splits) == 1 else f"{len(result.splits)} splits"
    return f"{result.task}, {result.protocol}, {result.encoder}: {result.score:.1%} of {result.over} files, {splits}"
