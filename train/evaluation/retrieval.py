"""Retrieval: does a picture find its own sound, and a sound its own picture? Within a modality: does a clip find its class?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import normalize

from cmacc.shards.dataset import Dataset
from cmacc.train.evaluation.neighbours import blocks
from cmacc.train.loading.loader import LoaderConfig, evaluation_batches
from cmacc.train.loading.views import ViewConfig, generator
from cmacc.train.networks.encoders import Encoder

RANKS = (1, 5, 10, 20, 50)


@dataclass(frozen=True)
class Embedded:
    """Unit embeddings of n clips. video, audio: (n, d) float32. ids, labels: (n,) int64; label -1 is none.

    sources: (n,) int64, of which video each is. features_video, features_audio: what the backbones give, (n, width) float32,
    where they were asked for.
    """

    video: Tensor
    audio: Tensor
    ids: Tensor
    labels: Tensor
    sources: Tensor | None = None
    features_video: Tensor | None = None
    features_audio: Tensor | None = None


def embed(
    dataset: Dataset,
    rows: np.ndarray,
    view: ViewConfig,
    loader: LoaderConfig,
    video: Encoder,
    audio: Encoder,
    on_progress: Callable[[int], None] | None = None,
) -> Embedded:
    """Embed `rows` by one central view each, encoders in evaluation mode (and put back as they were).

    on_progress: called with how many are done. Raises ValueError when none of them decodes.
    """
    return joined([embed_part(dataset, rows, view, loader, video, audio, on_progress=on_progress)], dataset.url)


def joined(parts: Sequence[Embedded | None], url: str) -> Embedded:
    """What several ranks embedded, as one."""
    there = [part for part in parts if part is not None]
    if not there:
        raise ValueError(f"no clip to embed in {url}; give a split that has clips which decode")
    columns = ([column for column in each if column is not None] for each in zip(*(vars(p).values() for p in there), strict=True))
    return Embedded(*(torch.cat(column) if column else None for column in columns))  # type: ignore[arg-type]


@torch.no_grad()
def embed_part(
    dataset: Dataset,
    rows: np.ndarray,
    view: ViewConfig,
    loader: LoaderConfig,
    video: Encoder,
    audio: Encoder,
    interrupted: Callable[[], bool] = lambda: False,
    features: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Embedded | None:
    """As `embed`, of clips that may be none: then None. interrupted: asked before each batch whether to leave off.

    features: those of the backbones too.
    """
    device = next(video.parameters()).device
    modes = video.training, audio.training
    video.eval(), audio.eval()
    parts: list[Embedded] = []
    for batch in evaluation_batches(dataset, view, loader, rows):
        if interrupted():
            break
        batch = batch.to(device)
        of_video, of_audio = video.features(batch.video), audio.features(batch.audio)
        columns = [video.project(of_video)[0], audio.project(of_audio)[0], batch.ids, batch.labels, batch.sources]
        columns += [of_video.float(), of_audio.float()] if features else []
        parts.append(Embedded(*(column.cpu() for column in columns)))
        if on_progress:
            on_progress(sum(len(part.ids) for part in parts))
    video.train(modes[0]), audio.train(modes[1])
    return joined(parts, dataset.url) if parts else None


def held_out_rows(dataset: Dataset, split: str, most: int, seed: int = 0) -> np.ndarray:
    """At most `most` rows of a split: all of them, or the same random ones every time, ascending."""
    rows = dataset.rows(split)
    if len(rows) > most:
        rows = np.sort(generator("held-out", seed).choice(rows, most, replace=False))
    return rows


def retrieval(embedded: Embedded) -> dict[str, float]:
    """Recall at each of RANKS in both directions and their means, with the chance levels beside them, all shares 0..1.

    `class@1`: the clip found first has the query's label. `same_class_R@k`: the same search among clips of the query's
    label alone, so that knowing the class gains nothing. Ties, and NaN, count against the query. n must be 2 or more.
    Never holds all n x n similarities.
    """
    labels = embedded.labels
    there = _one_direction(embedded.video, embedded.audio, labels)
    back = _one_direction(embedded.audio, embedded.video, labels)
    facts = {f"video_to_audio/{name}": value for name, value in there.items()}
    facts |= {f"audio_to_video/{name}": value for name, value in back.items()}
    return facts | {name: (there[name] + back[name]) / 2 for name in there} | _chance(labels)


def within(
    gallery: Tensor | NDArray[Any], gallery_labels: ArrayLike, queries: Tensor | NDArray[Any], query_labels: ArrayLike
) -> dict[str, float]:
    """Retrieval inside one modality, by class: `R@k`, the share of queries with their class among the k nearest of the gallery.

    gallery: mean features of the training clips (n, d); queries: of the test clips (m, d); both are centred, each by its own
    mean, and scaled to unit length. `chance_R@k`: what a random order of the gallery scores. Ties, and NaN, count against the
    query; so does a class that the gallery lacks. Raises ValueError when either set is empty.
    """
    if not len(gallery) or not len(queries):
        raise ValueError(f"retrieval needs a gallery and queries, and there are {len(gallery)} and {len(queries)}; give both")
    codes = np.unique(np.concatenate([np.asarray(gallery_labels), np.asarray(query_labels)]), return_inverse=True)[1]
    near, far = _centred(gallery), _centred(queries)
    of_near, of_far = torch.from_numpy(codes).to(near.device).split([len(near), len(far)])
    ranks = []
    for rows in blocks(len(far), len(near)):
        scores, same = far[rows] @ near.T, of_far[rows, None] == of_near
        best = scores.masked_fill(~same, -math.inf).amax(1, keepdim=True)
        ranks.append((~(scores < best) & ~same).sum(1).masked_fill(~same.any(1), len(near)))
    rank, right = torch.cat(ranks), torch.bincount(of_near, minlength=int(codes.max()) + 1)[of_far].double()
    facts = {f"R@{k}": float((rank < k).double().mean()) for k in RANKS}
    return facts | {f"chance_R@{k}": float((1 - _all_wrong(len(near), right, k)).mean()) for k in RANKS}


# --- inside ---


def _centred(features: Tensor | NDArray[Any]) -> Tensor:
    features = torch.as_tensor(features).float()
    return normalize(features - features.mean(0), dim=1)


def _all_wrong(n: int, right: Tensor, k: int) -> Tensor:
    """Chance that none of the `right` among n rows is among the first k of a random order: C(n - right, k) / C(n, k)."""
    drawn = torch.arange(min(k, n), dtype=torch.float64, device=right.device)
    return ((n - right[:, None] - drawn).clamp_min(0) / (n - drawn)).prod(1)


def _one_direction(queries: Tensor, gallery: Tensor, labels: Tensor) -> dict[str, float]:
    """Of query i, row i of the gallery is what is to be found."""
    n, labelled = len(queries), bool((labels >= 0).all())
    rank, among_same, right = (torch.empty(n, dtype=torch.int64) for _ in range(3))
    for rows in blocks(n, n):
        scores = queries[rows] @ gallery.T
        own = torch.arange(rows.start, rows.stop)
        before = ~(scores < scores.gather(1, own[:, None])) & (own[:, None] != torch.arange(n))
        rank[rows] = before.sum(1)
        if labelled:
            same = labels[rows, None] == labels
            among_same[rows] = (before & same).sum(1)
            best_same, best_other = (scores.masked_fill(mask, -math.inf).amax(1) for mask in (~same, same))
            right[rows] = (best_same > best_other).long()
    facts = _recalls(rank, "")
    if labelled:
        facts["class@1"] = float(right.double().mean())
        facts |= _recalls(among_same[_sizes(labels) > 1], "same_class_")
    return facts


def _recalls(rank: Tensor, prefix: str) -> dict[str, float]:
    return {f"{prefix}R@{k}": float((rank < k).double().mean()) for k in RANKS if len(rank)}


def _sizes(labels: Tensor) -> Tensor:
    """How many clips each clip's label has."""
    _, codes, counts = labels.unique(return_inverse=True, return_counts=True)
    return counts[codes]


def _chance(labels: Tensor) -> dict[str, float]:
    n = len(labels)
    facts = {f"chance_R@{k}": min(1.0, k / n) for k in RANKS}
    if (labels >= 0).all():
        sizes = _sizes(labels).double()
        facts["chance_class@1"] = float((sizes / n).mean())
        several = sizes[sizes > 1]
        facts |= {f"chance_same_class_R@{k}": float((k / several).clamp_max(1).mean()) for k in RANKS if len(several)}
    return facts
