"""One training step on any number of ranks, with any size of micro-batch: the numbers are those of the whole batch at once.

The encoders see a rank's share, the objective sees the global batch: queries and keys are gathered, every rank computes the
whole loss, and takes its gradient with respect to its own queries into its own encoders. What DistributedDataParallel then
sums is the gradient of the whole loss. A micro-batch costs a second forward pass (arXiv 2101.06983): the first finds the
queries, the second, slice by slice, takes each slice's part of their gradient.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cmacc.train.config import PretrainConfig
from cmacc.train.contrast.objective import Choice, Contrast, Queries, after_step, choose, contrast
from cmacc.train.contrast.rings import Entries
from cmacc.train.loading.loader import Batch
from cmacc.train.loading.views import generator
from cmacc.train.model import Both, CrossModal
from cmacc.train.networks.batchnorm import frozen_statistics, shuffle, unshuffle
from cmacc.train.networks.compute import autocast, prepare
from cmacc.train.running.distributed import World
from cmacc.train.running.monitor import gradient_facts


@dataclass(frozen=True)
class Stepped:
    """What a step met and computed, of the global batch on every rank, without gradient.

    step: counted from 0. batch: this rank's share. norms: of the gradient, all of it and by encoder, as the log names them, 0-d.
    ok: 0-d bool on the device, the same on every rank: False when the step was not taken, for something in it was not finite.
    before: the running statistics as they were, flat.
    """

    step: int
    batch: Batch
    queries: Queries
    k_video: Entries
    k_audio: Entries
    choice: Choice
    contrast: Contrast
    norms: dict[str, Tensor]
    ok: Tensor
    before: Tensor


class TrainingStep:
    """Forward, selection, loss, backward, optimiser, momentum, memory: METHOD's steps 1 to 5, in this order.

    Nothing in it waits for the host. Changes `model` and `optimiser` in place, and so does making it (see `compute.prepare`).
    """

    def __init__(self, config: PretrainConfig, model: CrossModal, optimiser: torch.optim.Optimizer, world: World) -> None:
        self.config, self.model, self.optimiser, self.world = config, model, optimiser, world
        self.rate = 1.0  # factor on the learning rate, which falls with each rollback
        for encoder in model.encoders().values():
            prepare(encoder, config.compute, world.device, world.size)
        self.both, self.keys = Both(model.video, model.audio), Both(model.key_video, model.key_audio)
        self.summed: torch.nn.Module = self.both  # whose backward pass sums the gradient over ranks
        if world.size > 1:
            devices = [world.device] if world.device.type == "cuda" else None
            self.summed = DistributedDataParallel(
                self.both, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self._sound: Tensor | None = None  # running statistics, see `take_back`
        most = -(-config.loader.batch // world.size)
        self.twice = 0 < config.compute.micro_batch < most  # the same on all ranks, as all that they do together must be

    def __call__(self, batch: Batch, step: int, fresh: tuple[Entries, Entries] | None = None) -> Stepped:
        """batch: this rank's share, on its device. fresh: candidates encoded in this step, see `objective.choose`."""
        model, world, objective = self.model, self.world, self.config.objective
        statistics = model.statistics()
        before = torch.cat([buffer.flatten() for buffer in statistics]) if statistics else batch.video.new_empty(0)
        draws = torch.Generator(world.device).manual_seed(int(generator(self.config.seed, "selection", step).integers(2**62)))

        if self.twice:
            with torch.no_grad(), frozen_statistics(self.both):
                encoded = [self._encode(self.both, batch, part) for part in self._slices(len(batch.ids))]
        else:
            encoded = [self._encode(self.summed, batch, slice(None))]
        queries = self._gather_queries(encoded)
        k_video, k_audio = self.encode_keys(batch, step) if objective.uses_keys else self._queries_as_keys(queries, batch, step)
        choice = choose(queries, k_video, k_audio, model.memory, objective, step, draws, fresh)
        result = contrast(queries, k_video, k_audio, model.memory, objective, choice)
        self._backward(batch, encoded, torch.autograd.grad(result.loss, [queries.video, queries.audio]))

        norms = self._norms()
        ok = world.everywhere(norms["optimiser/gradient_norm"].isfinite() & result.loss.detach().isfinite())
        self._optimise(step, ok)
        model.move_keys()
        if objective.uses_keys:
            after_step(model.memory, choice, k_video, k_audio, ok)
        queries = Queries(queries.video.detach(), queries.audio.detach(), queries.last_video, queries.last_audio)
        return Stepped(step, batch, queries, k_video, k_audio, choice, result, norms, ok, before)

    @torch.no_grad()
    def encode_keys(self, batch: Batch, step: int, total: int | None = None) -> tuple[Entries, Entries]:
        """Keys of pictures and of sounds, of the global batch. batch: this rank's share of `total` clips (default: the batch)."""
        world, total = self.world, total or self.config.loader.batch
        facts = world.gather(torch.stack([batch.ids, batch.sources, batch.labels], 1), total)
        video, audio, order = batch.video, batch.audio, None
        if self.config.compute.batchnorm == "shuffled" and world.size > 1:
            order = torch.from_numpy(generator(self.config.seed, "shuffle", step, total).permutation(total))
            video, audio = shuffle(video, order), shuffle(audio, order)
        parts = [self._run(self.keys, video[part], audio[part])[:2] for part in self._slices(len(video))]  # unit vectors alone
        keys = torch.cat([torch.cat(pair, 1) for pair in parts])
        keys = world.gather(keys if order is None else unshuffle(keys, order), total)
        k_video, k_audio = (_entries(each.contiguous(), facts, step) for each in keys.chunk(2, 1))
        return k_video, k_audio

    def encode_candidates(self, batch: Batch, step: int, total: int) -> tuple[Entries, Entries]:
        """As `encode_keys`, of clips that may be picked. Running statistics stay as they are: this is no part of the step, whose
        verdict could not take back what such a clip has spoilt."""
        with frozen_statistics(self.keys):
            return self.encode_keys(batch, step, total)

    def take_back(self, stepped: Stepped) -> None:
        """Running statistics as they were before a step that was not finite: a forward pass has spoilt them."""
        # Where the host hears of it late, the step after it began with spoilt ones: they are no way back.
        if self._sound is None or bool(stepped.before.isfinite().all()):
            self._sound = stepped.before
        at = 0
        for buffer in self.model.statistics():
            buffer.copy_(self._sound[at : at + buffer.numel()].view_as(buffer))
            at += buffer.numel()

    # --- inside ---

    def _slices(self, rows: int) -> list[slice]:
        most = self.config.compute.micro_batch or rows
        return [slice(at, at + most) for at in range(0, rows, most)]

    def _run(self, both: torch.nn.Module, video: Tensor, audio: Tensor) -> tuple[Tensor, ...]:
        with autocast(self.config.compute, self.world.device):
            found: tuple[Tensor, ...] = both(video, audio)
        return found

    def _encode(self, both: torch.nn.Module, batch: Batch, part: slice) -> tuple[Tensor, ...]:
        return self._run(both, batch.video[part], batch.audio[part])

    def _gather_queries(self, encoded: list[tuple[Tensor, ...]]) -> Queries:
        """All ranks' queries in global order, as leaves whose gradient is asked for."""
        columns = [torch.cat([each.detach().float() for each in column]) for column in zip(*encoded, strict=True)]
        if self.config.objective.form != "last_layer":
            columns = columns[:2]
        widths = [column.shape[1] for column in columns]
        gathered = self.world.gather(torch.cat(columns, 1), self.config.loader.batch).split(widths, 1)
        video, audio, *last = (each.contiguous() for each in gathered)
        return Queries(video.requires_grad_(), audio.requires_grad_(), *(last or (None, None)))

    def _queries_as_keys(self, queries: Queries, batch: Batch, step: int) -> tuple[Entries, Entries]:
        """Without key encoders the other modality's queries serve, with their gradient."""
        facts = self.world.gather(torch.stack([batch.ids, batch.sources, batch.labels], 1), self.config.loader.batch)
        return _entries(queries.video, facts, step), _entries(queries.audio, facts, step)

    def _backward(self, batch: Batch, encoded: list[tuple[Tensor, ...]], gradients: tuple[Tensor, ...]) -> None:
        """From the gradient of the global queries to that of the parameters, summed over ranks."""
        self.optimiser.zero_grad(set_to_none=True)
        # DistributedDataParallel takes the mean of the ranks where a sum is wanted.
        own = [self.world.own(each) * self.world.size for each in gradients]
        if not self.twice:
            torch.autograd.backward(encoded[0][:2], own)
            return
        *slices, last = self._slices(len(batch.ids))
        for part in slices:
            torch.autograd.backward(self._encode(self.both, batch, part)[:2], [each[part] for each in own])
        torch.autograd.backward(self._encode(self.summed, batch, last)[:2], [each[last] for each in own])

    def _norms(self) -> dict[str, Tensor]:
        """Of each encoder's gradient and of both; with `optimiser.clip` the gradients are scaled down to it."""
        found = gradient_facts({"video": self.model.video, "audio": self.model.audio})
        if clip := self.config.optimiser.clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.learned().values(), clip, found["optimiser/gradient_norm"])
        return found

    def _optimise(self, step: int, ok: Tensor) -> None:
        """A step of the optimiser, or none when something was not finite: fused optimisers look at `found_inf` on the device."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * self.config.optimiser.at(step, self.config.steps)
        self.optimiser.grad_scale = None  # type: ignore[attr-defined]
        self.optimiser.found_inf = (~ok).float()  # type: ignore[attr-defined]
        self.optimiser.step()


def _entries(keys: Tensor, facts: Tensor, step: int) -> Entries:
    """facts: (M, 3), of ids, sources and labels."""
    ids, sources, labels = facts.unbind(1)
    return Entries(keys, ids, sources, labels, torch.full_like(ids, step))


class Verdicts:
    """Tells of steps that were not finite: at once on a CPU, one step later on a GPU, which so never waits for its host."""

    def __init__(self, device: torch.device) -> None:
        self._lag = 1 if device.type == "cuda" else 0
        self._waiting: deque[tuple[Stepped, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, stepped: Stepped) -> None:
        if not self._lag:
            self._waiting.append((stepped, stepped.ok, None))
            return
        there = torch.empty((), dtype=torch.bool, pin_memory=True)
        there.copy_(stepped.ok, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._waiting.append((stepped, there, event))

    def bad(self, all_of_them: bool = False) -> Iterator[Stepped]:
        """Steps that were not taken, each told once. all_of_them: wait for the newest too."""
        while len(self._waiting) > (0 if all_of_them else self._lag):
            stepped, ok, event = self._waiting.popleft()
            if event:
                event.synchronize()
            if not bool(ok):
                yield stepped
