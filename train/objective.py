"""Cross-Modal Active Contrastive Coding: dictionaries of chosen negatives, and the two-way loss (arXiv 2009.09805)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from cmacc.train.gradients import GradientForm
from cmacc.train.losses import LossParts, info_nce
from cmacc.train.rings import EMPTY, Entries, Ring
from cmacc.train.schedule import ramp
from cmacc.train.selection import KMeansPlusPlus, Selector, Uniform

Negatives = Literal["dictionary", "batch+dictionary", "batch"]
Queue = Literal["active", "uniform", "fifo"]

POOL_READY_BATCHES = 4
"""Until a pool holds this many batches, keys of the batch enter the dictionary instead of picks."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The method's own knobs; METHOD.md has the symbols.

    negatives: what a query is told from. `dictionary` is the paper's form; `batch+dictionary` adds the other clips' keys;
    `batch` has neither dictionary nor key encoders: the other modality's queries serve as keys.
    queue: what enters the dictionary: `active` picks from the pool, `uniform` picks from it, or `fifo`, the batch itself.
    dictionary: K. pool: N. tau: temperature of the loss. momentum: m of the key encoders.
    pseudo_tau, form: of active selection. share: of the batch's M places in the dictionary, how many go to picks once
    the schedule is through (from 0 at step share_start to `share` at share_start + share_ramp); the rest are batch keys.
    """

    negatives: Negatives = "dictionary"
    queue: Queue = "active"
    dictionary: int = 3_840
    pool: int = 38_400
    tau: float = 0.7
    momentum: float = 0.999
    pseudo_tau: float = 0.1
    form: GradientForm = "badge"
    share: float = 1.0
    share_start: int = 0
    share_ramp: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("negatives", get_args(Negatives)), ("queue", get_args(Queue)), ("form", get_args(GradientForm))):
            if getattr(self, name) not in choices:
                raise ValueError(f"objective.{name} is {getattr(self, name)!r}; use one of {', '.join(choices)}")
        for name in ("dictionary", "pool"):
            if getattr(self, name) < 1:
                raise ValueError(f"objective.{name} is {getattr(self, name)}; give 1 or more")
        for name in ("tau", "pseudo_tau"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"objective.{name} is {getattr(self, name)}; give a temperature above 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"objective.momentum is {self.momentum}; give 0 or more, below 1")
        if not 0 <= self.share <= 1:
            raise ValueError(f"objective.share is {self.share}; give a share from 0 to 1")

    @property
    def uses_keys(self) -> bool:
        return self.negatives != "batch"

    def selector(self) -> Selector | None:
        if self.queue == "active":
            return KMeansPlusPlus(self.pseudo_tau, self.form)
        return Uniform() if self.queue == "uniform" else None

    def picks(self, step: int, batch: int) -> int:
        """How many of the batch's places in the dictionary go to picks from the pool at `step`."""
        if self.queue == "fifo" or not self.uses_keys:
            return 0
        return round(self.share * ramp(step, self.share_start, self.share_ramp) * batch)


class Memory(nn.Module):
    """What outlives a step: a dictionary and a candidate pool of key embeddings for each modality."""

    def __init__(self, config: ObjectiveConfig, width: int) -> None:
        super().__init__()
        self.dictionary_video = Ring(config.dictionary, width)
        self.dictionary_audio = Ring(config.dictionary, width)
        self.pool_video = Ring(config.pool, width, unique=True)
        self.pool_audio = Ring(config.pool, width, unique=True)


@dataclass(frozen=True)
class Contrast:
    """One step's two loss terms: video queries against sounds, audio queries against pictures.

    late_audio, late_video: the batch's keys; those with an id other than -1 enter the dictionary once the step is taken.
    """

    video_to_audio: LossParts
    audio_to_video: LossParts
    late_audio: Entries
    late_video: Entries

    @property
    def loss(self) -> Tensor:
        return self.video_to_audio.loss + self.audio_to_video.loss


def contrast(
    q_video: Tensor,
    q_audio: Tensor,
    k_video: Entries,
    k_audio: Entries,
    memory: Memory,
    config: ObjectiveConfig,
    step: int,
    generator: torch.Generator,
) -> Contrast:
    """Choose negatives for both directions, then score the queries.

    q_video, q_audio: (M, d) with gradient; k_video, k_audio: the same clips' keys. Sounds are chosen by the pictures of
    the batch and the reverse. Picks enter the dictionary before the loss; batch keys must enter it after the backward
    pass (`after_step`), as MoCo's do, so that `dictionary` alone means just that. A dictionary entry of the query's own
    source video never serves as its negative.
    """
    video, late_audio = _direction(q_video, k_audio, memory.dictionary_audio, memory.pool_audio, config, step, generator)
    audio, late_video = _direction(q_audio, k_video, memory.dictionary_video, memory.pool_video, config, step, generator)
    return Contrast(video, audio, late_audio, late_video)


def _direction(
    query: Tensor, keys: Entries, dictionary: Ring, pool: Ring, config: ObjectiveConfig, step: int, generator: torch.Generator
) -> tuple[LossParts, Entries]:
    """One loss term, and the batch keys that take the places which the pool did not fill."""
    late = keys
    if config.uses_keys:
        picks = pick(query.detach(), pool, keys.sources, config, step, generator)
        from_pool = picks != EMPTY
        chosen = pool.entries.take(picks.clamp_min(0))
        dictionary.enqueue(chosen._replace(ids=chosen.ids.where(from_pool, EMPTY)))
        late = keys._replace(ids=keys.ids.where(~from_pool, EMPTY))
    entries = dictionary.entries
    allowed = dictionary.filled & (entries.sources != keys.sources[:, None])
    return info_nce(query, keys.keys, entries.keys, allowed, config.tau, config.negatives != "dictionary"), late


@torch.no_grad()
def after_step(memory: Memory, result: Contrast, k_video: Entries, k_audio: Entries) -> None:
    """Once the gradient is taken: batch keys into the dictionaries where no pick went, and all of them into the pools."""
    memory.dictionary_audio.enqueue(result.late_audio)
    memory.dictionary_video.enqueue(result.late_video)
    memory.pool_video.enqueue(k_video)
    memory.pool_audio.enqueue(k_audio)


def pick(
    queries: Tensor, pool: Ring, batch_sources: Tensor, config: ObjectiveConfig, step: int, generator: torch.Generator
) -> Tensor:
    """Slots of `pool` for the batch's M places in the dictionary, int64 (M,), -1 where the batch's own key goes instead.

    Never picks a clip of the batch, nor another clip of the same source video.
    """
    batch = len(queries)
    places = torch.full((batch,), EMPTY, dtype=torch.int64, device=queries.device)
    selector, count = config.selector(), config.picks(step, batch)
    if selector is None or count == 0:
        return places
    filled = pool.filled
    allowed = filled & ~torch.isin(pool.entries.sources, batch_sources) & (filled.sum() >= POOL_READY_BATCHES * batch)
    places[:count] = selector.select(queries, pool.entries.keys, allowed, count, generator)
    return places
