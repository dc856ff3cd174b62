"""What is searched with: a file, or a clip of the data set; and the search itself, from query to hits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from cmacc.shards.clip import AUDIO, VIDEO
from cmacc.shards.dataset import Dataset
from cmacc.shards.page.charts import clean
from cmacc.shards.page.preview import kind_of
from cmacc.train.export.load import Prepare
from cmacc.train.export.trained import Trained, load_trained
from cmacc.train.running.checkpoint import CheckpointError
from cmacc.train.search.gallery import Shown
from cmacc.train.search.nearest import Embedding, embedded_by, nearest

Modality = Literal["video", "audio"]
_SHOWN_BYTES = 256 << 20  # of a query's file


@dataclass(frozen=True)
class Found:
    """query, hits: as a gallery takes them. by, to: what was compared with what; model: name of the columns.

    skipped: clips without an embedding.
    """

    query: Shown
    hits: list[Shown]
    by: Modality
    to: Modality
    model: str
    skipped: int


def search_by_file(
    dataset: Dataset,
    file: str,
    by: Modality,
    *,
    to: Modality | None = None,
    model: str | None = None,
    name: str | None = None,
    count: int = 12,
    on_progress: Callable[[int], None] | None = None,
) -> Found:
    """Clips whose picture or sound (`to`, by default the other one) is nearest to the sound or picture (`by`) of a media file.

    model: run, checkpoint or export that the data set was embedded with; None: the one that its columns say, if it is still
    there; name: of the columns. Raises DatasetError where they are of another model, ValueError for the file, OSError.
    """
    if not Path(file).is_file():
        raise ValueError(f"{file} is no file; give a sound or a film")
    pair, trained = _model(dataset, model, name)
    prepare, to = Prepare(trained.view), to or _other(by)
    with torch.no_grad():
        vector = trained.audio(prepare.audio(file)) if by == "audio" else trained.video(prepare.video(file))
    found = nearest(dataset, pair.column(to), vector[0].numpy(), count, on_progress=on_progress)
    hits = [Shown(r, by=to, cosine=c) for r, c in zip(found.rows.tolist(), found.cosines.tolist(), strict=True)]
    return Found(_shown(file, by), hits, by, to, pair.name, found.skipped)


def search_by_key(
    dataset: Dataset,
    key: str,
    *,
    to: Modality | None = None,
    by: Modality | None = None,
    model: str | None = None,
    name: str | None = None,
    count: int = 12,
    other_videos: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Found:
    """The same of a clip of the data set; within one modality without the clip itself. other_videos: without clips of its own
    source video. Nothing is embedded: model only says which columns. Raises DatasetError, ValueError for a clip without one."""
    row, to = int(dataset.rows_of([key])[0]), to or _other(by or "video")
    by = by or _other(to)
    pair = embedded_by(dataset, name, None if model is None else load_trained(model).hash)
    vector = dataset.catalog.column(pair.column(by), slice(row, row + 1))[0].astype(np.float32)
    if not np.isfinite(vector).all():
        raise ValueError(f"clip {key} has no embedding, since it did not decode; search with another one")
    source = dataset.texts("source", [row])[0]
    found = nearest(
        dataset, pair.column(to), vector, count, without_row=row if by == to else None,
        without_source=source if other_videos else None, on_progress=on_progress,
    )  # fmt: skip
    labels = _labels(dataset, row)
    hits = [
        Shown(r, by=to, cosine=c, mark="own" if r == row else _mark(labels, _labels(dataset, r)))
        for r, c in zip(found.rows.tolist(), found.cosines.tolist(), strict=True)
    ]
    return Found(Shown(row, by=by), hits, by, to, pair.name, found.skipped)


def _model(dataset: Dataset, model: str | None, name: str | None) -> tuple[Embedding, Trained]:
    """The columns, and the very model that made them."""
    if model is not None:
        trained = load_trained(model)
        return embedded_by(dataset, name, trained.hash), trained
    pair = embedded_by(dataset, name)
    needed = f"give the model that embedded {dataset.url} ({pair.name}) as --model RUN_OR_EXPORT"
    if not pair.address:
        raise ValueError(needed)
    try:
        trained = load_trained(pair.address)
    except (CheckpointError, ValueError, OSError) as error:
        raise ValueError(f"{needed}; it was {pair.address}, which cannot be loaded now") from error
    if trained.hash != pair.hash:
        raise ValueError(f"{needed}; {pair.address} is another one now (step {trained.step})")
    return pair, trained


def _shown(file: str, by: Modality) -> Shown:
    size = Path(file).stat().st_size
    known = VIDEO if by == "video" else AUDIO
    member = kind_of(file) if kind_of(file) in known else known[0]
    if size > _SHOWN_BYTES:
        return Shown(members={"txt": b"too large to be shown"}, by=by, name=clean(Path(file).name, 200))
    return Shown(members={member: Path(file).read_bytes()}, by=by, name=clean(Path(file).name, 200))


def _other(modality: Modality) -> Modality:
    return "audio" if modality == "video" else "video"


def _labels(dataset: Dataset, row: int) -> set[str]:
    return set(dataset.catalog.labels(slice(row, row + 1))[0])


def _mark(mine: set[str], others: set[str]) -> Literal["", "class", "other"]:
    return "" if not (mine and others) else "class" if mine & others else "other"
