"""A run in one picture: loss terms beside chance, retrieval, dictionary diversity, and clips with their nearest sounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

from cmacc.shards.dataset import Dataset
from cmacc.train.config import from_json
from cmacc.train.loader import ViewReader
from cmacc.train.metrics import MetricsLog
from cmacc.train.retrieval import Embedded, embed, held_out_rows
from cmacc.train.trained import Trained, load_trained

EXAMPLES = 5
NEAREST = 3
RIGHT, SAME_CLASS, WRONG = "#1a7f37", "#bf8700", "#cf222e"


def draw_run(run: Path) -> Path:
    """Write `run/picture.png` from its metrics, its last checkpoint and its data set, and return its path."""
    records = list(MetricsLog.read(run / "metrics.jsonl"))
    saved = json.loads((run / "config.json").read_text())
    dataset, config = Dataset.open(saved.pop("data")), from_json(saved)
    trained = load_trained(run)
    rows = held_out_rows(dataset, config.eval_split, config.eval_clips)
    embedded = embed(dataset, rows, config.view, config.loader, trained.video, trained.audio)

    mpl.use("Agg")
    figure = Figure(figsize=(15, 12), layout="constrained")
    grid = GridSpec(2, 1, figure, height_ratios=(1, 1.6))
    curves = grid[0].subgridspec(1, 3)
    _losses(figure.add_subplot(curves[0]), records)
    _retrieval(figure.add_subplot(curves[1]), records)
    _diversity(figure.add_subplot(curves[2]), records, len(dataset.catalog.vocabulary("labels")))
    _neighbours(
        figure,
        grid[1].subgridspec(EXAMPLES, 2 + NEAREST),
        dataset,
        trained,
        embedded,
        ViewReader(dataset, config.view, config.loader),
    )
    figure.suptitle(f"{run}, step {trained.step}: {config.objective.queue} queue, negatives: {config.objective.negatives}")
    path = run / "picture.png"
    figure.savefig(path, dpi=80)
    return path


def _curve(axes: Axes, records: list[dict[str, Any]], name: str, label: str, **style: Any) -> None:
    points = [(r["step"], r[name]) for r in records if name in r]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)


def _losses(axes: Axes, records: list[dict[str, Any]]) -> None:
    for name, label, colour in (("video_to_audio", "video → audio", "C0"), ("audio_to_video", "audio → video", "C1")):
        _curve(axes, records, f"loss/{name}", label, color=colour)
    _curve(axes, records, "chance/video_to_audio", "chance: ln(terms)", color="grey", linestyle="--")
    axes.set(title="loss terms", xlabel="step", ylabel="nats", ylim=(0, None))
    axes.legend()


def _retrieval(axes: Axes, records: list[dict[str, Any]]) -> None:
    names = (("R@5", "chance_R@5", "C0"), ("R@1", "chance_R@1", "C1"), ("class@1", "chance_class@1", "C2"),
             ("same_class_R@1", "chance_same_class_R@1", "C3"))  # fmt: skip
    for name, chance, colour in names:
        _curve(axes, records, f"held_out/{name}", name.replace("_", " "), color=colour, marker=".")
        _curve(axes, records, f"held_out/{chance}", "_chance", color=colour, linestyle=":")
    axes.set(title="held-out retrieval (dotted: chance)", xlabel="step", ylim=(0, 1))
    axes.legend()


def _diversity(axes: Axes, records: list[dict[str, Any]], classes: int) -> None:
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


def _neighbours(figure: Figure, grid: Any, dataset: Dataset, trained: Trained, embedded: Embedded, reader: ViewReader) -> None:
    """Rows of: a clip's frames, its own sound, and the sounds nearest to its pictures."""
    scores = embedded.video @ embedded.audio.T
    names = [", ".join(labels) for labels in dataset.catalog.labels()]
    # Evenly spread over the labels, so that one class does not fill the picture.
    chosen = torch.argsort(embedded.labels, stable=True)[torch.linspace(0, len(embedded.ids) - 1, EXAMPLES + 2).long()[1:-1]]
    for line, query in enumerate(chosen.tolist()):
        nearest = scores[query].topk(min(NEAREST, len(scores))).indices.tolist()
        rows = [int(embedded.ids[i]) for i in (query, *nearest)]
        batch = reader.read(rows, [reader.central_view(row) for row in rows])
        strip = batch.video[0].permute(1, 2, 3, 0).numpy()
        strip = np.concatenate(list(strip[:: max(1, len(strip) // 4)][:4]), axis=1)
        axes = figure.add_subplot(grid[line, 0])
        axes.imshow((strip - strip.min()) / max(np.ptp(strip), 1e-6), aspect="equal")
        axes.set_title(names[rows[0]], fontsize=9)
        axes.axis("off")
        for column, (place, row) in enumerate(zip((query, *nearest), rows, strict=True), start=1):
            axes = figure.add_subplot(grid[line, column])
            axes.imshow(batch.audio[column - 1, 0].numpy(), origin="lower", aspect="auto", cmap="magma")
            axes.set(xticks=[], yticks=[])
            colour = RIGHT if place == query else SAME_CLASS if names[row] == names[rows[0]] else WRONG
            title = "own sound" if column == 1 else f"{column - 1}: {'own sound' if place == query else names[row]}"
            axes.set_title(title, fontsize=9, color="black" if column == 1 else colour)
    reader.close()
