"""Candidates that are not of the training batches: which clips, and when they are encoded.

`pool: fresh` reads r * M other clips beside each batch; `pool: epoch` fills the pools at the start of each epoch. Both walk an
order of their own, the training order of another seed. Which clips is a pure function of the step or the epoch, so there is
nothing to save: a continued run comes to the same ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from cmacc.train.config import PretrainConfig
from cmacc.train.contrast.objective import Memory
from cmacc.train.contrast.rings import Entries
from cmacc.train.loading.loader import BadClip, Batch, TrainingLoader
from cmacc.train.loading.sampler import Sampler, Source
from cmacc.train.running.distributed import World

Encode = Callable[[Batch, int, int], tuple[Entries, Entries]]
"""encode(batch, step, total): keys of pictures and of sounds of a global batch of `total` clips, of which `batch` is this rank's
share, on its device."""

SEED_SHIFT = 1 << 40
"""From the seed of the training order to that of the candidates'. Those of several data sets are 2^48 apart."""


class Interrupted(Exception):
    """Reading candidates was broken off, on all ranks; a step without them would not be the one that is due."""


class Candidates:
    """The data side of `objective.pool`. With `pool: fifo`, or where nothing is picked, it does nothing.

    encode: with today's key encoders. memory: whose pools are filled. interrupted: asked now and then, for reading may take
    minutes. on_bad: told of each clip that does not decode, see `TrainingLoader`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        config: PretrainConfig,
        world: World,
        encode: Encode,
        memory: Memory,
        *,
        interrupted: Callable[[], bool] = lambda: False,
        on_bad: Callable[[BadClip], None] | None = None,
    ) -> None:
        self.sources, self.config, self.world, self.encode, self.memory = sources, config, world, encode, memory
        self.interrupted, self.on_bad = interrupted, on_bad
        self.seed = (config.seed + SEED_SHIFT) % (1 << 63)
        order = Sampler(sources, seed=self.seed, streams=config.loader.streams, window=config.loader.window)
        self._epoch_samples = order.epoch_samples
        self._loader: TrainingLoader | None = None
        self._batches: Iterator[Batch] = iter(())

    def for_step(self, step: int, position: int) -> tuple[Entries, Entries] | None:
        """Call it before each step. position: at which the step's batch begins in the training order.

        fresh: the step's candidates, pictures and sounds. epoch: fills the pools when another epoch has begun, and returns None.
        Raises Interrupted.
        """
        objective = self.config.objective
        if objective.uses_candidates and objective.pool == "fresh" and objective.picks(step, self.config.loader.batch):
            return self._fresh(step)
        if objective.uses_candidates and objective.pool == "epoch":
            epoch = position // self._epoch_samples
            if self.memory.filled_in != epoch:
                self._fill(step, epoch)
        return None

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for clips of `fresh`."""
        return self._loader.waited_s if self._loader else 0.0

    def close(self) -> None:
        loader, self._loader = self._loader, None
        if loader:
            loader.close()

    # --- inside ---

    def _fresh(self, step: int) -> tuple[Entries, Entries]:
        total = self.config.objective.fresh * self.config.loader.batch
        if self._loader is None or self._loader.position != step * total:
            self._read_from(step * total, total)
        return self._encoded(step, total)

    def _fill(self, step: int, epoch: int) -> None:
        """The first clips of an epoch of the candidates' own order, no clip twice."""
        total, left = self.config.loader.batch, min(self.config.objective.candidates, self._epoch_samples)
        self._read_from(epoch * self._epoch_samples, total)
        try:
            with self.memory.filling(epoch) as fill:
                while left > 0:
                    video, audio = self._encoded(step, total)
                    fill(video.first(left), audio.first(left))
                    left -= total
        finally:
            self.close()

    def _read_from(self, position: int, total: int) -> None:
        if self._loader is None:
            config = dataclasses.replace(self.config.loader, batch=total)
            self._loader = TrainingLoader(
                self.sources, self.config.view, config, seed=self.seed, rank=self.world.rank, world=self.world.size,
                on_bad=self.on_bad,
            )  # fmt: skip
            self._loader.interrupted = self.interrupted
        self._loader.position = position
        self._batches = iter(self._loader)

    def _encoded(self, step: int, total: int) -> tuple[Entries, Entries]:
        batch = next(self._batches, None)
        # A rank that alone went on would wait for the others for ever.
        if any(self.world.agree([batch is None or self.interrupted()])) or batch is None:
            raise Interrupted(f"reading candidates for step {step} was interrupted")
        return self.encode(batch.to(self.world.device), step, total)
