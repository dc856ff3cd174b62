"""Retrieval among clips of a data set at rest, as results: across modalities, and within each by class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmacc.shards.dataset import Dataset
from cmacc.train.evaluation.results import Result
from cmacc.train.evaluation.retrieval import Embedded, held_out_rows, retrieval, within
from cmacc.train.evaluation.splits import task_name
from cmacc.train.loading.loader import LoaderConfig, evaluation_batches
from cmacc.train.loading.views import ViewConfig
from cmacc.train.networks.encoders import Encoder

Pair = tuple[Encoder, Encoder]
"""Encoders of video and audio."""
Progress = Callable[[int, int], None]
_CENTRE = 0.5


@dataclass
class _Seen:
    """Of some clips by one pair: embeddings of the central view, and sums of features over views, by row of the data set."""

    embedded: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    features: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


def retrieve(
    dataset: Dataset,
    encoders: Mapping[str, Pair],
    view: ViewConfig,
    loader: LoaderConfig,
    *,
    split: str = "eval",
    gallery: str = "train",
    clips: int = 1_000,
    views: int = 1,
    on_progress: Progress | None = None,
) -> list[Result]:
    """For each pair of encoders (name to video and audio) the result `retrieval` among at most so many clips of `split`, by one
    central view each; and where the clips of both splits have labels, `within video` and `within audio`: the same clips look for
    their class among at most so many of split `gallery` ("" for none), by features that are the mean over `views` evenly spaced
    views. The score is R@1.

    on_progress: views done, of how many. Raises ValueError, DatasetError.
    """
    queries = held_out_rows(dataset, split, clips)
    if len(queries) < 2:
        raise ValueError(f"split {split!r} of {dataset.url} has {len(queries)} clip; retrieval needs 2 or more: give --split")
    notes = []
    if gallery and gallery not in dataset.catalog.texts("split"):
        notes.append(f"clips did not look for their class among others: none is in split {gallery!r}, which --gallery names")
        gallery = ""
    among = np.setdiff1d(held_out_rows(dataset, gallery, clips), queries) if gallery else queries[:0]
    labels = dataset.first_labels(np.concatenate([queries, among])) if len(among) else np.array([-1])
    by_class = bool(len(among)) and (labels[: len(queries)] >= 0).any() and (labels[len(queries) :] >= 0).any()
    places = np.linspace(0, 1, views).tolist() if views > 1 else [_CENTRE]
    plan = [(queries, place) for place in sorted({_CENTRE, *(places if by_class else ())})]
    plan += [(among, place) for place in places] if by_class else []
    seen = _look(dataset, encoders, view, loader, plan, places, on_progress)

    first = next(iter(seen.values()))
    there = [row for row in queries.tolist() if row in first.embedded]
    if len(there) < 2:
        raise ValueError(f"{len(there)} of {len(queries)} clips of split {split!r} decode; run `cmacc lint {dataset.url}`")
    asked = np.concatenate([queries, among]).tolist() if by_class else queries.tolist()
    gone = [row for row in asked if row not in first.embedded and row not in first.features]
    left_out = dict.fromkeys(dataset.texts("key", np.array(gone)) if gone else [], "does not decode")
    settings = {"data": dataset.url, "fingerprint": dataset.fingerprint, "split": split, "clips": clips}
    results = []
    for name, each in seen.items():

        def add(protocol: str, facts: dict[str, float], over: int, name: str = name, **more: Any) -> None:
            results.append(
                Result(
                    task_name("retrieval", dataset.url), protocol, name, facts["R@1"], facts["chance_R@1"], over,
                    left_out=left_out, notes=notes, settings=settings | more, facts=facts,
                )
            )  # fmt: skip

        add("retrieval", retrieval(_embedded(each, there, dataset)), len(there), views=1)
        for protocol, (facts, over, of) in (_within(each, queries, among, labels) if by_class else {}).items():
            add(protocol, facts, over, gallery=gallery, gallery_clips=of, views=views)
    return results


def _look(
    dataset: Dataset,
    encoders: Mapping[str, Pair],
    view: ViewConfig,
    loader: LoaderConfig,
    plan: Sequence[tuple[NDArray[Any], float]],
    places: Sequence[float],
    on_progress: Progress | None,
) -> dict[str, _Seen]:
    """Each clip is read once for all encoders."""
    device = torch.device("cuda" if loader.dali_device == "gpu" else "cpu")
    encoders = {name: (video.to(device).eval(), audio.to(device).eval()) for name, (video, audio) in encoders.items()}
    seen = {name: _Seen() for name in encoders}
    done, total = 0, sum(len(rows) for rows, _ in plan)
    for rows, place in plan:
        for batch in evaluation_batches(dataset, view, loader, rows, place):
            ids, batch = batch.ids.tolist(), batch.to(device)
            for name, pair in encoders.items():
                _add(seen[name], pair, ids, batch.video, batch.audio, place, places)
            done += len(ids)
            if on_progress:
                on_progress(done, total)
    return seen


@torch.inference_mode()
def _add(seen: _Seen, pair: Pair, ids: list[int], video: Tensor, audio: Tensor, place: float, places: Sequence[float]) -> None:
    features = pair[0].features(video), pair[1].features(audio)
    if place == _CENTRE:
        unit = [encoder.project(each)[0].cpu() for encoder, each in zip(pair, features, strict=True)]
        seen.embedded |= dict(zip(ids, zip(*unit, strict=True), strict=True))
    if place in places:
        for row, *each in zip(ids, *(one.float().cpu() for one in features), strict=True):
            before = seen.features.get(row, (0.0, 0.0))
            seen.features[row] = before[0] + each[0], before[1] + each[1]


def _embedded(seen: _Seen, rows: list[int], dataset: Dataset) -> Embedded:
    video, audio = (torch.stack(column) for column in zip(*(seen.embedded[row] for row in rows), strict=True))
    ids = torch.tensor(rows)
    return Embedded(video, audio, ids, torch.from_numpy(np.asarray(dataset.first_labels(np.array(rows)), dtype=np.int64)))


def _within(
    seen: _Seen, queries: NDArray[Any], among: NDArray[Any], labels: NDArray[Any]
) -> dict[str, tuple[dict[str, float], int, int]]:
    """Of each modality the facts, over how many queries, among how many. labels: of queries, then of the gallery."""
    of = dict(zip([*queries.tolist(), *among.tolist()], labels.tolist(), strict=True))
    far, near = ([row for row in rows.tolist() if row in seen.features and of[row] >= 0] for rows in (queries, among))
    found = {}
    for modality, protocol in enumerate(("within video", "within audio")):
        one, other = (torch.stack([seen.features[row][modality] for row in rows]) for rows in (near, far))
        found[protocol] = within(one, [of[row] for row in near], other, [of[row] for row in far]), len(far), len(near)
    return found
