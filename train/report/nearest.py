"""Held-out clips and the sounds that a run's encoders find nearest to their pictures: which, for a picture or a page."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cmacc.shards.dataset import Dataset
from cmacc.train.config import PretrainConfig
from cmacc.train.evaluation.retrieval import Embedded, embed, held_out_rows
from cmacc.train.export.trained import load_trained
from cmacc.train.loading.sampler import open_sources

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Hit:
    """A clip that was found. row: in the catalog. own: it is the query's own sound; same: it has a label of the query's, None
    where one of them has no label."""

    row: int
    cosine: float
    own: bool
    same: bool | None


def evenly_over_labels(embedded: Embedded, count: int) -> list[int]:
    """Places of at most `count` clips, spread evenly over the labels, so that no class fills the picture."""
    count = min(count, len(embedded.ids))
    order = torch.argsort(embedded.labels, stable=True)
    return [int(i) for i in order[torch.linspace(0, len(order) - 1, count + 2).long()[1:-1]].unique_consecutive()]


def nearest_sounds(dataset: Dataset, embedded: Embedded, query: int, count: int) -> list[Hit]:
    """The sounds nearest to the picture of the clip at that place, nearest first."""
    scores = embedded.audio @ embedded.video[query]
    found = scores.topk(min(count, len(scores)))
    own, hits = _labels(dataset, int(embedded.ids[query])), []
    for at, cosine in zip(found.indices.tolist(), found.values.tolist(), strict=True):
        row = int(embedded.ids[at])
        theirs = _labels(dataset, row)
        hits.append(Hit(row, cosine, at == query, bool(own & theirs) if own and theirs else None))
    return hits


def _labels(dataset: Dataset, row: int) -> set[str]:
    return set(dataset.catalog.labels(slice(row, row + 1))[0])


def held_out(run: Path, data: str, config: PretrainConfig, on_progress: Progress | None = None) -> tuple[int, Dataset, Embedded]:
    """The step of a run's latest checkpoint, its data set, and the held-out clips as its encoders embed them.

    on_progress: called with how many are done, of how many.

    Raises ValueError, DatasetError, CheckpointError, OSError, or what a store of others raises.
    """
    trained = load_trained(os.fspath(run))
    dataset = open_sources([data], None)[0].dataset
    rows = held_out_rows(dataset, config.eval_split, config.eval_clips)

    def tell(done: int) -> None:
        if on_progress:
            on_progress(done, len(rows))

    return trained.step, dataset, embed(dataset, rows, config.view, config.loader, trained.video, trained.audio, tell)
