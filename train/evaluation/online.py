"""Held-out clips beside training: how well each finds its other half and, by its nearest, its class. Nothing is learned here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cmacc.shards.dataset import Dataset
from cmacc.train.config import PretrainConfig
from cmacc.train.evaluation.neighbours import leave_one_out
from cmacc.train.evaluation.retrieval import Embedded, embed_part, held_out_rows, joined, retrieval
from cmacc.train.networks.encoders import Encoder


class Online:
    """When a run looks at its held-out clips, and what it finds.

    config.eval_every, eval_minutes: steps, and minutes of the clock; 0: not by them. The first and the last step are always
    looked at. Which steps are has no effect on what is learned: encoders and random numbers are left as they were.
    """

    def __init__(self, dataset: Dataset, config: PretrainConfig) -> None:
        self._dataset, self._config = dataset, config
        self._rows = held_out_rows(dataset, config.eval_split, config.eval_clips)
        self._looked_at = time.monotonic()

    def by_step(self, step: int) -> bool:
        every = self._config.eval_every
        return step in (0, self._config.steps) or (every > 0 and step % every == 0)

    def by_clock(self, now: float) -> bool:
        """now: time.monotonic()."""
        minutes = self._config.eval_minutes
        return self.possible and minutes > 0 and now - self._looked_at >= 60 * minutes

    @property
    def possible(self) -> bool:
        """Whether there are clips to tell apart."""
        return len(self._rows) > 1

    def part(
        self, rank: int, world: int, video: Encoder, audio: Encoder, interrupted: Callable[[], bool] = lambda: False
    ) -> Embedded | None:
        """This rank's share of the clips, embedded; None where that is no clip. interrupted: whether to leave off."""
        rows, config = self._rows[rank::world], self._config
        return embed_part(self._dataset, rows, config.view, config.loader, video, audio, interrupted, features=True)

    def looked(self) -> None:
        """From now on the minutes count anew. For every rank."""
        self._looked_at = time.monotonic()

    def facts(self, parts: Sequence[Embedded | None]) -> dict[str, float]:
        """`held_out/…`: `retrieval` of all ranks' parts, and `knn`. Raises ValueError when no clip decodes."""
        found = joined(parts, self._dataset.url)
        return {f"held_out/{name}": value for name, value in (retrieval(found) | nearest(found)).items()}


def nearest(found: Embedded) -> dict[str, float]:
    """Share of clips that a k-NN of the others puts into their class; no clip of the same video votes.

    `knn_video`, `knn_audio`, `knn_both`: by embeddings, of one modality or the two side by side; `knn_features_…`: by what the
    backbones give. `chance_knn`: what the most frequent class alone would score. Of clips with a label; nothing where these are
    fewer than two classes or two videos.
    """
    there = found.labels >= 0
    labels, sources = found.labels[there].numpy(), None if found.sources is None else found.sources[there].numpy()
    counts = np.unique(labels, return_counts=True)[1]
    if len(counts) < 2 or (sources is not None and len(np.unique(sources)) < 2):
        return {}
    kinds: dict[str, tuple[Tensor | None, Tensor | None]] = {
        "knn_": (found.video, found.audio),
        "knn_features_": (found.features_video, found.features_audio),
    }
    facts = {}
    for kind, (video, audio) in kinds.items():
        if video is None or audio is None:
            continue
        both = torch.cat([normalize(video, dim=1), normalize(audio, dim=1)], 1)
        for name, x in (("video", video), ("audio", audio), ("both", both)):
            facts[kind + name] = float(np.mean(leave_one_out(x[there], labels, sources) == labels))
    return {**facts, "chance_knn": float(counts.max() / len(labels))}
