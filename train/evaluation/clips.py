"""Retrieval among clips of a data set at rest, as results: across modalities, and within each by class."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmacc.shards.dataset import Dataset
from cmacc.train.evaluation.features import INPUT, fingerprint
from cmacc.train.evaluation.kept import Kept
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
    cache: Path | None = None,
    on_progress: Progress | None = None,
) -> list[Result]:
    """For each pair of encoders (name to video and audio) the result `retrieval` among at most so many clips of `split`, by one
    central view each; and where the clips of both splits have labels, `within video` and `within audio`: the same clips look for
    their class among at most so many of split `gallery` ("" for none), by features that are the mean over `views` evenly spaced
    views. The score is R@1.

    cache: a folder in which what encoders give of each view is kept. on_progress: views done, of how many. Raises ValueError, as
    for encoders that give what is no number, DatasetError.
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
    seen = _look(dataset, encoders, view, loader, plan, places, cache, on_progress)

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
    cache: Path | None,
    on_progress: Progress | None,
) -> dict[str, _Seen]:
    """Each view is read once for all encoders, if one of them has not seen it yet."""
    device = torch.device("cuda" if loader.dali_device == "gpu" else "cpu")
    encoders = {name: (video.to(device).eval(), audio.to(device).eval()) for name, (video, audio) in encoders.items()}
    keys = {name: [fingerprint(each) for each in pair] for name, pair in encoders.items()}
    seen = {name: _Seen() for name in encoders}
    done, total = 0, sum(len(rows) for rows, _ in plan)
    for rows, place in plan:
        chosen = hashlib.sha256(np.asarray(rows, np.int64).tobytes()).hexdigest()
        about = {"data": dataset.fingerprint, "rows": chosen, "place": place, "view": asdict(view), "input": INPUT}
        widths = {name: _widths(pair, place) for name, pair in encoders.items()}
        task = task_name("retrieval", dataset.url)
        kept = {n: Kept(cache, len(rows), sum(widths[n]), task, {"describer": keys[n], "name": n, **about}) for n in encoders}
        missing = np.flatnonzero(np.any([each.missing() for each in kept.values()], axis=0))
        done += len(rows) - len(missing)
        for batch in evaluation_batches(dataset, view, loader, rows[missing], place) if len(missing) else ():
            at, batch = np.searchsorted(rows, batch.ids.numpy()), batch.to(device)
            for name, pair in encoders.items():
                made = _numbers(pair, batch.video, batch.audio, place)
                if not np.isfinite(made).all():
                    said = f"what the {name} encoders give of clips of {dataset.url} is no finite number"
                    raise ValueError(f"{said}; evaluate an earlier checkpoint, or train it anew with a lower optimiser.rate")
                kept[name].put(at, made)
            done += len(at)
            if on_progress:
                on_progress(done, total)
        if on_progress:
            on_progress(done, total)
        for name, each in kept.items():
            _add(seen[name], rows[~each.missing()], each.close()[~each.missing()], widths[name], place, places)
    return seen


def _widths(pair: Pair, place: float) -> list[int]:
    """Of the features of video and audio, and at the centre of their embeddings."""
    embedded = [encoder.head[-1].out_features for encoder in pair] if place == _CENTRE else []
    return [encoder.feature_width for encoder in pair] + embedded  # type: ignore[operator]


@torch.inference_mode()
def _numbers(pair: Pair, video: Tensor, audio: Tensor, place: float) -> NDArray[np.float32]:
    """What is kept of some clips' views at a place, (b, sum of the widths)."""
    features = pair[0].features(video), pair[1].features(audio)
    embedded = [encoder.project(each)[0] for encoder, each in zip(pair, features, strict=True)] if place == _CENTRE else []
    return torch.cat([each.float() for each in (*features, *embedded)], dim=1).cpu().numpy()


def _add(
    seen: _Seen, rows: NDArray[Any], made: NDArray[np.float32], widths: Sequence[int], place: float, places: Sequence[float]
) -> None:
    parts = torch.from_numpy(made).split(list(widths), dim=1)
    if place == _CENTRE:
        seen.embedded |= dict(zip(rows.tolist(), zip(*parts[2:], strict=True), strict=True))
    if place in places:
        for row, *each in zip(rows.tolist(), *parts[:2], strict=True):
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
