"""Cross-Modal Active Contrastive Coding: dictionaries of chosen negatives, and the two-way loss (arXiv 2009.09805).

One step: `choose` what enters the dictionaries, `contrast` the queries with them, take the gradient, `after_step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cmacc.train.contrast.gradients import GRADIENT_FORMS, GradientForm
from cmacc.train.contrast.losses import LossParts, info_nce
from cmacc.train.contrast.rings import EMPTY, Entries, Ring, isin, newest
from cmacc.train.contrast.selection import SELECTORS, Asking, Select, make_selector
from cmacc.train.contrast.stopwatch import Stopwatch
from cmacc.train.schedule import ramp

Negatives = Literal["dictionary", "batch+dictionary", "batch"]
NEGATIVES = ("dictionary", "batch+dictionary", "batch")
Pool = Literal["fifo", "epoch", "fresh"]
POOLS = ("fifo", "epoch", "fresh")

NO_EPOCH = -1
POOL_READY_BATCHES = 4
"""Until a pool holds this many batches, or is full, keys of the batch enter the dictionary instead of picks."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The method's own knobs; METHOD.md has the symbols.

    negatives: what a query is told from. `dictionary` is the paper's form; `batch+dictionary` adds the other clips' keys;
    `batch` has neither dictionary nor key encoders: the other modality's queries serve as keys.
    selector: how the pool's candidates are picked, see `selection`; `fifo` picks nothing: the batch itself enters the dictionary.
    pool: where candidates come from. `fifo`: a ring of the batches' keys; `epoch`: at each epoch's start, random clips encoded
    by the key encoders; `fresh`: other clips encoded in the very step. dictionary: K. candidates: N, the size of the pool
    (fifo, epoch). fresh: r, of r * M candidates a step (fresh). tau: temperature of the loss. momentum: m of the key encoders.
    pseudo_tau, form, first: of active selection. share: of the batch's M places in the dictionary, how many go to picks once
    the schedule is through (from 0 at step share_start to `share` at share_start + share_ramp); the rest are batch keys.
    age_limit: keys computed more steps ago are neither picked nor used as negatives, 0: no limit. repeats: whether a clip that
    stands in the dictionary may be picked again.
    """

    negatives: Negatives = "dictionary"
    selector: Select = "kmeans++"
    pool: Pool = "fifo"
    dictionary: int = 3_840
    candidates: int = 38_400
    fresh: int = 4
    tau: float = 0.7
    momentum: float = 0.999
    pseudo_tau: float = 0.1
    form: GradientForm = "badge"
    first: Literal["norm", "uniform"] = "norm"
    share: float = 1.0
    share_start: int = 0
    share_ramp: int = 0
    age_limit: int = 0
    repeats: bool = True

    def __post_init__(self) -> None:
        for name, choices in (
            ("negatives", NEGATIVES),
            ("selector", SELECTORS),
            ("pool", POOLS),
            ("form", GRADIENT_FORMS),
            ("first", ("norm", "uniform")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"objective.{name} is {getattr(self, name)!r}; use one of {', '.join(choices)}")
        for name in ("dictionary", "candidates", "fresh"):
            if getattr(self, name) < 1:
                raise ValueError(f"objective.{name} is {getattr(self, name)}; give 1 or more")
        for name in ("share_start", "share_ramp", "age_limit"):
            if getattr(self, name) < 0:
                raise ValueError(f"objective.{name} is {getattr(self, name)}; give 0 or more steps")
        for name in ("tau", "pseudo_tau"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"objective.{name} is {getattr(self, name)}; give a temperature above 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"objective.momentum is {self.momentum}; give 0 or more, below 1")
        if not 0 <= self.share <= 1:
            raise ValueError(f"objective.share is {self.share}; give a share from 0 to 1")

    @property
    def uses_keys(self) -> bool:
        """Whether there are key encoders and dictionaries."""
        return self.negatives != "batch"

    @property
    def uses_candidates(self) -> bool:
        """Whether anything is ever picked."""
        return self.uses_keys and self.selector != "fifo" and self.share > 0

    @property
    def keeps_pool(self) -> bool:
        """Whether candidates outlive a step, in rings."""
        return self.uses_candidates and self.pool != "fresh"

    def ready(self, batch: int) -> int:
        """How many entries a pool must hold before it is picked from."""
        return min(POOL_READY_BATCHES * batch, self.candidates)

    def picks(self, step: int, batch: int) -> int:
        """How many of the batch's places in the dictionary go to picks at `step`."""
        return round(self.share * ramp(step, self.share_start, self.share_ramp) * batch) if self.uses_candidates else 0


class Queries(NamedTuple):
    """video, audio: (M, d) unit vectors, with gradient. last_video, last_audio: (M, h), detached, the inputs of the query
    encoders' last linear layers, which the form last_layer needs."""

    video: Tensor
    audio: Tensor
    last_video: Tensor | None = None
    last_audio: Tensor | None = None


class Memory(nn.Module):
    """What outlives a step: a dictionary and a candidate pool of key embeddings for each modality, where the objective has them.

    pool_epoch: 0-d int64, the epoch at whose start the pools were filled (pool: epoch), -1 before.
    """

    dictionary_video: Ring
    dictionary_audio: Ring
    pool_video: Ring
    pool_audio: Ring
    pool_epoch: Tensor

    def __init__(self, config: ObjectiveConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self._filled_in: int | None = None
        if config.uses_keys:
            self.dictionary_video = Ring(config.dictionary, width)
            self.dictionary_audio = Ring(config.dictionary, width)
        if config.keeps_pool:
            self.pool_video = Ring(config.candidates, width, unique=True)
            self.pool_audio = Ring(config.candidates, width, unique=True)
        if config.keeps_pool and config.pool == "epoch":
            self.register_buffer("pool_epoch", torch.full((), NO_EPOCH, dtype=torch.int64))
            self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "_filled_in", None))

    @property
    def filled_in(self) -> int:
        """The epoch the pools are of. Waits for the device only once after a state was loaded."""
        if self._filled_in is None:
            self._filled_in = int(self.pool_epoch)
        return self._filled_in

    @contextmanager
    def filling(self, epoch: int) -> Iterator[Callable[[Entries, Entries], None]]:
        """Empties the pools; within, entries given to what this yields (pictures, sounds) fill them. Until the end of it the
        pools are of no epoch."""
        self._named(NO_EPOCH)
        self.pool_video.clear()
        self.pool_audio.clear()

        def fill(video: Entries, audio: Entries) -> None:
            self.pool_video.enqueue(video.only(finite(video.keys)))
            self.pool_audio.enqueue(audio.only(finite(audio.keys)))

        yield fill
        self._named(epoch)

    def _named(self, epoch: int) -> None:
        self.pool_epoch.fill_(epoch)
        self._filled_in = epoch


@dataclass(frozen=True)
class Choice:
    """What entered the dictionaries at `step`, and what is to enter them once the step is taken.

    picked_video, picked_audio: (M,) entries that were picked, id -1 where none was. late_video, late_audio: the batch's keys,
    id -1 where a pick took the place. watch: how long it took.
    """

    step: int
    picked_video: Entries
    picked_audio: Entries
    late_video: Entries
    late_audio: Entries
    watch: Stopwatch

    def facts(self) -> dict[str, float]:
        """`selection/...` to value: seconds that choosing took on the device, picks of both directions, and their mean age in
        steps where there are any. Waits for the device: call it on log steps alone."""
        ids = torch.cat([self.picked_video.ids, self.picked_audio.ids])
        born = torch.cat([self.picked_video.born, self.picked_audio.born])[ids != EMPTY]
        facts = {"selection/seconds": self.watch.seconds(), "selection/picked": float(len(born))}
        if len(born):
            facts["selection/age"] = float((self.step - born).double().mean())
        return facts


@dataclass(frozen=True)
class Contrast:
    """One step's two loss terms: video queries against sounds, audio queries against pictures."""

    video_to_audio: LossParts
    audio_to_video: LossParts

    @property
    def loss(self) -> Tensor:
        return self.video_to_audio.loss + self.audio_to_video.loss

    def terms(self) -> dict[str, LossParts]:
        """By the names of the log."""
        return {"video_to_audio": self.video_to_audio, "audio_to_video": self.audio_to_video}


@torch.no_grad()
def choose(
    queries: Queries,
    k_video: Entries,
    k_audio: Entries,
    memory: Memory,
    config: ObjectiveConfig,
    step: int,
    generator: torch.Generator,
    fresh: tuple[Entries, Entries] | None = None,
) -> Choice:
    """Pick negatives for both directions and let them into the dictionaries; without gradient.

    k_video, k_audio: the keys of the queries' own clips. Sounds are picked by the pictures of the batch and the reverse; never
    a clip of the batch, nor another clip of the same source video. fresh: candidates encoded in this very step, video and
    audio, for `pool: fresh` alone. Batch keys must enter after the backward pass (`after_step`), as MoCo's do, so that
    `negatives: dictionary` means just that. Raises ValueError when what the configuration picks from is not given.
    """
    batch = len(k_video.ids)
    count = config.picks(step, batch)
    with Stopwatch(k_video.keys.device) as watch:
        picked_video, picked_audio = (k._replace(ids=torch.full_like(k.ids, EMPTY)) for k in (k_video, k_audio))
        if count:
            slots, pools = _pick(queries, k_video.sources, memory, config, step, count, generator, fresh)
            picked_audio, picked_video = (_taken(p, s, batch) for p, s in zip(pools, slots, strict=True))
            memory.dictionary_audio.enqueue(picked_audio)
            memory.dictionary_video.enqueue(picked_video)
        late_video, late_audio = (
            k._replace(ids=k.ids.where(p.ids == EMPTY, EMPTY)) for k, p in ((k_video, picked_video), (k_audio, picked_audio))
        )
    return Choice(step, picked_video, picked_audio, late_video, late_audio, watch)


def contrast(
    queries: Queries, k_video: Entries, k_audio: Entries, memory: Memory, config: ObjectiveConfig, choice: Choice
) -> Contrast:
    """Score the queries against their keys and the dictionaries, which hold what `choice` picked.

    What is of the query's own source video never serves as its negative, be it in the dictionary or in the batch; nor does an
    entry beyond the age limit.
    """

    def term(query: Tensor, keys: Entries, name: str) -> LossParts:
        others = keys.sources != keys.sources[:, None] if config.negatives != "dictionary" else None
        if not config.uses_keys:
            none = keys.ids.new_ones(len(query), 0, dtype=torch.bool)
            return info_nce(query, keys.keys, keys.keys[:0], none, config.tau, others)
        held = getattr(memory, f"dictionary_{name}").entries
        allowed = (held.ids != EMPTY) & _young(held.born, choice.step, config)
        allowed = allowed & (held.sources != keys.sources[:, None])
        return info_nce(query, keys.keys, held.keys, allowed, config.tau, others)

    return Contrast(term(queries.video, k_audio, "audio"), term(queries.audio, k_video, "video"))


@torch.no_grad()
def after_step(memory: Memory, choice: Choice, k_video: Entries, k_audio: Entries, ok: Tensor | None = None) -> None:
    """Once the gradient is taken: batch keys into the dictionaries where no pick went, and all of them into a `fifo` pool.

    ok: 0-d bool; where it is False, or a key is not finite, nothing enters.
    """
    config = memory.config
    if not config.uses_keys:
        return
    for late, keys, name in ((choice.late_video, k_video, "video"), (choice.late_audio, k_audio, "audio")):
        sound = finite(keys.keys) if ok is None else finite(keys.keys) & ok
        getattr(memory, f"dictionary_{name}").enqueue(late.only(sound))
        if config.keeps_pool and config.pool == "fifo":
            getattr(memory, f"pool_{name}").enqueue(keys.only(sound))


def _pick(
    queries: Queries,
    batch_sources: Tensor,
    memory: Memory,
    config: ObjectiveConfig,
    step: int,
    count: int,
    generator: torch.Generator,
    fresh: tuple[Entries, Entries] | None,
) -> tuple[Tensor, tuple[Entries, Entries]]:
    """(2, count) slots, -1 where nothing is left, and the candidates that they number: of sounds, then of pictures."""
    if config.pool == "fresh":
        if fresh is None:
            raise ValueError("objective.pool is fresh, but this step was given no candidates; use pool fifo, or give some")
        pools = fresh[1], fresh[0]
        allowed = torch.stack([finite(p.keys) & newest(p.ids) for p in pools])
    else:
        pools = memory.pool_audio.entries, memory.pool_video.entries
        allowed = torch.stack([p.ids != EMPTY for p in pools])
        allowed &= allowed.sum(1, keepdim=True) >= config.ready(len(batch_sources))
    for mine, pool, dictionary in zip(allowed, pools, (memory.dictionary_audio, memory.dictionary_video), strict=True):
        mine &= ~isin(pool.sources, batch_sources) & _young(pool.born, step, config)
        if not config.repeats:
            mine &= ~isin(pool.ids, dictionary.entries.ids)
    asking = _asking(queries.video, queries.last_video), _asking(queries.audio, queries.last_audio)
    selector = make_selector(config.selector, config.pseudo_tau, config.form, config.first)
    return selector.select(asking, [p.keys for p in pools], allowed, count, generator), pools


def _taken(pool: Entries, slots: Tensor, batch: int) -> Entries:
    """The batch's places in the dictionary: picks first, then nothing."""
    places = torch.nn.functional.pad(slots, (0, batch - len(slots)), value=EMPTY)
    return pool.take(places.clamp_min(0)).only(places != EMPTY)


def _young(born: Tensor, step: int, config: ObjectiveConfig) -> Tensor:
    return born >= step - config.age_limit if config.age_limit else torch.ones_like(born, dtype=torch.bool)


def finite(keys: Tensor) -> Tensor:
    """(n,) bool: which of `keys` (n, d) are finite."""
    return torch.isfinite(keys).all(1)


def _asking(*vectors: Tensor | None) -> Asking:
    """Rows that are not finite as nought: such a step is thrown away, but its picks must be slots of the pool."""
    return Asking(*(v if v is None else v.detach().where(finite(v)[:, None], 0) for v in vectors))  # type: ignore[arg-type]
