"""A run in one picture: loss terms beside chance, retrieval, dictionary diversity, and clips with their nearest sounds."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

from cmacc.shards.dataset import Dataset
from cmacc.train.config import from_json
from cmacc.train.evaluation.retrieval import Embedded
from cmacc.train.loading.reader import ViewReader
from cmacc.train.report.nearest import evenly_over_labels, held_out, nearest_sounds
from cmacc.train.running.metrics import MetricsLog

EXAMPLES = 5
NEAREST = 3
COLUMNS = 7
COLOURS = {"video": "C0", "audio": "C1", "both": "C2"}
"""In `monitor.png`, by what a line's name begins with."""
RIGHT, SAME_CLASS, WRONG = "#1a7f37", "#bf8700", "#cf222e"


def draw_run(run: Path) -> Path:
    """Write `run/picture.png` from its metrics, its last checkpoint and its data set, and return its path; and `monitor.png`."""
    records = list(MetricsLog.read(run / "metrics.jsonl"))
    draw_monitor(run, records)
    saved = json.loads((run / "config.json").read_text())
    data, config = saved.pop("data"), from_json(saved)
    step, dataset, embedded = held_out(run, data[0], config)

    mpl.use("Agg")
    figure = Figure(figsize=(15, 12), layout="constrained")
    grid = GridSpec(2, 1, figure, height_ratios=(1, 1.6))
    curves = grid[0].subgridspec(1, 3)
    draw_losses(figure.add_subplot(curves[0]), records)
    draw_retrieval(figure.add_subplot(curves[1]), records)
    _diversity(figure.add_subplot(curves[2]), records, len(dataset.catalog.vocabulary("labels")))
    _neighbours(
        figure,
        grid[1].subgridspec(EXAMPLES, 2 + NEAREST),
        dataset,
        embedded,
        config.loader.reader([dataset], config.view, 1 + NEAREST),
    )
    figure.suptitle(f"{run}, step {step}: {config.objective.selector} selection, negatives: {config.objective.negatives}")
    path = run / "picture.png"
    figure.savefig(path, dpi=80)
    return path


def draw_monitor(run: Path, records: Sequence[dict[str, Any]]) -> Path:
    """Write `run/monitor.png`: every number of the log, those of both modalities and their chance level in one plot."""
    panels: dict[str, list[tuple[str, str]]] = {}
    for name in dict.fromkeys(name for record in records for name in record if name != "step"):
        panels.setdefault(_panel(name), []).append((name, _line(name)))
    panels = {title: lines for title, lines in panels.items() if not _says_nothing(records, lines)}
    mpl.use("Agg")
    rows = -(-len(panels) // COLUMNS) or 1
    figure = Figure(figsize=(3 * COLUMNS, 2 * rows), layout="constrained")
    for place, (title, lines) in enumerate(sorted(panels.items()), start=1):
        axes = figure.add_subplot(rows, COLUMNS, place)
        for name, line in lines:
            style = ":" if "chance" in name else "-"
            _curve(
                axes, records, name, line or "_", linestyle=style, color=COLOURS.get(line.split(" ")[0], "grey"), marker=".", ms=2
            )
        axes.ticklabel_format(useOffset=False)
        axes.set_title(title, fontsize=8)
        axes.tick_params(labelsize=6)
        if any(line for _, line in lines):
            axes.legend(fontsize=6)
    figure.suptitle(f"{run}: all that is monitored, by step", fontsize=10)
    path = run / "monitor.png"
    figure.savefig(path, dpi=70)
    return path


_MODALITY = re.compile(r"[_/]?(video_to_audio|audio_to_video|video|audio|both)")


def _panel(name: str) -> str:
    """Numbers that are compared go into one plot: `dictionary_video/age` and `dictionary_audio/age` into `dictionary/age`."""
    name = _MODALITY.sub("", name).replace("chance_", "")
    return "loss" if name == "chance" else name


def _says_nothing(records: Sequence[dict[str, Any]], lines: Sequence[tuple[str, str]]) -> bool:
    """Recall among as many clips as there are: 1, and so is chance."""
    chances = [record.get(name) for record in records for name, line in lines if line == "chance"]
    return {*chances} - {None} == {1.0}


def _line(name: str) -> str:
    found = _MODALITY.search(name)
    return " ".join(
        word for word in (found[1].replace("_to_", " → ") if found else "", "chance" if "chance" in name else "") if word
    )


def _curve(axes: Axes, records: Sequence[dict[str, Any]], name: str, label: str, **style: Any) -> None:
    points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)


def draw_losses(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    for name, label, colour in (("video_to_audio", "video → audio", "C0"), ("audio_to_video", "audio → video", "C1")):
        _curve(axes, records, f"loss/{name}", label, color=colour)
    _curve(axes, records, "chance/video_to_audio", "chance: ln(terms)", color="grey", linestyle="--")
    axes.set(title="loss terms", xlabel="step", ylabel="nats", ylim=(0, None))
    axes.legend()


def draw_retrieval(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    names = (("R@5", "chance_R@5", "C0"), ("R@1", "chance_R@1", "C1"), ("class@1", "chance_class@1", "C2"),
             ("same_class_R@1", "chance_same_class_R@1", "C3"), ("knn_both", "chance_knn", "C4"))  # fmt: skip
    for name, chance, colour in names:
        label = name.replace("knn_both", "k-NN").replace("_", " ")
        _curve(axes, records, f"held_out/{name}", label, color=colour, marker=".")
        _curve(axes, records, f"held_out/{chance}", "_chance", color=colour, linestyle=":")
    axes.set(title="held-out clips (dotted: chance)", xlabel="step", ylim=(0, 1))
    axes.legend(fontsize="small")


def _diversity(axes: Axes, records: Sequence[dict[str, Any]], classes: int) -> None:
    for name, label, colour in (("dictionary_video", "video", "C0"), ("dictionary_audio", "audio", "C1")):
        _curve(axes, records, f"{name}/cosine", f"{label}: mean cosine", color=colour)
        _curve(axes, records, f"{name}/duplicates", f"{label}: duplicate clips", color=colour, linestyle="--")
        shares = [
            {"step": r["step"], "share": r[f"{name}/classes"] / classes} for r in records if classes and f"{name}/classes" in r
        ]
        _curve(axes, shares, "share", f"{label}: share of {classes} classes", color=colour, linestyle=":")
    axes.set(title="dictionary diversity", xlabel="step", ylim=(-0.05, 1.05))
    if axes.lines:
        axes.legend(fontsize="small", loc="center right")


def _neighbours(figure: Figure, grid: Any, dataset: Dataset, embedded: Embedded, reader: ViewReader) -> None:
    """Rows of: a clip's frames, its own sound, and the sounds nearest to its pictures."""
    names = [", ".join(labels) for labels in dataset.catalog.labels()]
    for line, query in enumerate(evenly_over_labels(embedded, EXAMPLES)):
        hits = nearest_sounds(dataset, embedded, query, NEAREST)
        rows = [int(embedded.ids[query]), *(hit.row for hit in hits)]
        batch = reader.central(rows)
        strip = batch.video[0].permute(1, 2, 3, 0).numpy()
        strip = np.concatenate(list(strip[:: max(1, len(strip) // 4)][:4]), axis=1)
        axes = figure.add_subplot(grid[line, 0])
        axes.imshow((strip - strip.min()) / max(np.ptp(strip), 1e-6), aspect="equal")
        axes.set_title(names[rows[0]], fontsize=9)
        axes.axis("off")
        for column, sound in enumerate(batch.audio, start=1):
            axes = figure.add_subplot(grid[line, column])
            axes.imshow(sound[0].numpy(), origin="lower", aspect="auto", cmap="magma")
            axes.set(xticks=[], yticks=[])
            if column == 1:
                axes.set_title("own sound", fontsize=9)
                continue
            hit = hits[column - 2]
            name = "own sound" if hit.own else names[hit.row]
            colour = RIGHT if hit.own else "black" if hit.same is None else SAME_CLASS if hit.same else WRONG
            axes.set_title(f"{column - 1}: {name}", fontsize=9, color=colour)
    reader.close()
