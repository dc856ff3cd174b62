"""Cross-modal retrieval among held-out clips: does a picture find its own sound, and a sound its own picture?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cmacc.shards.dataset import Dataset
from cmacc.train.encoders import Encoder
from cmacc.train.loader import LoaderConfig, evaluation_batches
from cmacc.train.views import ViewConfig, generator

RANKS = (1, 5, 10)


@dataclass(frozen=True)
class Embedded:
    """Unit embeddings of n clips. video, audio: (n, d) float32. ids, labels: (n,) int64; label -1 is none."""

    video: Tensor
    audio: Tensor
    ids: Tensor
    labels: Tensor


@torch.no_grad()
def embed(dataset: Dataset, rows: np.ndarray, view: ViewConfig, loader: LoaderConfig, video: Encoder, audio: Encoder) -> Embedded:
    """Embed `rows` by one central view each, encoders in evaluation mode (and put back as they were)."""
    device = next(video.parameters()).device
    modes = video.training, audio.training
    video.eval(), audio.eval()
    parts = []
    for batch in evaluation_batches(dataset, view, loader, rows):
        batch = batch.to(device)
        parts.append((video(batch.video).cpu(), audio(batch.audio).cpu(), batch.ids.cpu(), batch.labels.cpu()))
    video.train(modes[0]), audio.train(modes[1])
    if not parts:
        raise ValueError(f"no clip to embed in {dataset.url}; give a split that has clips which decode")
    return Embedded(*(torch.cat(column) for column in zip(*parts, strict=True)))


def held_out_rows(dataset: Dataset, split: str, most: int, seed: int = 0) -> np.ndarray:
    """At most `most` rows of a split: all of them, or the same random ones every time, ascending."""
    rows = dataset.rows(split)
    if len(rows) > most:
        rows = np.sort(generator("held-out", seed).choice(rows, most, replace=False))
    return rows


def retrieval(embedded: Embedded) -> dict[str, float]:
    """Recall at 1, 5, 10 in both directions and their means, with the chance levels beside them, all shares 0..1.

    `class@1`: the clip found first has the query's label. `same_class_R@k`: the same search among clips of the query's
    label alone, so that knowing the class gains nothing. Ties, and NaN, count against the query. n must be 2 or more.
    """
    scores = embedded.video @ embedded.audio.T
    facts: dict[str, float] = {}
    directions = {"video_to_audio": scores, "audio_to_video": scores.T}
    for name, matrix in directions.items():
        facts |= {f"{name}/{fact}": value for fact, value in _one_direction(matrix, embedded.labels).items()}
    for fact in _one_direction(scores, embedded.labels):
        facts[fact] = sum(facts[f"{name}/{fact}"] for name in directions) / 2
    return facts | _chance(embedded.labels)


def _recalls(scores: Tensor, among: Tensor, prefix: str) -> dict[str, float]:
    own = scores.diagonal()[:, None]
    others = among & ~torch.eye(len(scores), dtype=torch.bool)
    rank = (~(scores < own) & others).sum(1)
    ranked = others.any(1)
    return {f"{prefix}R@{k}": float((rank[ranked] < k).float().mean()) for k in RANKS if ranked.any()}


def _one_direction(scores: Tensor, labels: Tensor) -> dict[str, float]:
    facts = _recalls(scores, torch.ones_like(scores, dtype=torch.bool), "")
    if (labels >= 0).all():
        same = labels[:, None] == labels[None, :]
        best_same, best_other = (scores.masked_fill(mask, -math.inf).amax(1) for mask in (~same, same))
        facts["class@1"] = float((best_same > best_other).float().mean())
        facts |= _recalls(scores, same, "same_class_")
    return facts


def _chance(labels: Tensor) -> dict[str, float]:
    n = len(labels)
    facts = {f"chance_R@{k}": min(1.0, k / n) for k in RANKS}
    if (labels >= 0).all():
        sizes = (labels[:, None] == labels[None, :]).sum(1).float()
        facts["chance_class@1"] = float((sizes / n).mean())
        several = sizes[sizes > 1]
        facts |= {f"chance_same_class_R@{k}": float((k / several).clamp_max(1).mean()) for k in RANKS if len(several)}
    return facts
