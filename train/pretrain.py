"""The training loop, top to bottom: periodic events, one step, log, advance."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cmacc.shards.publish import publish
from cmacc.train.config import PretrainConfig, check_same_run, flatten, from_json, to_json
from cmacc.train.contrast.candidates import Candidates, Interrupted
from cmacc.train.contrast.objective import POOL_READY_BATCHES
from cmacc.train.contrast.rings import Entries
from cmacc.train.evaluation.online import Online
from cmacc.train.loading.loader import Batch, TrainingLoader
from cmacc.train.loading.reader import BadClip
from cmacc.train.loading.sampler import open_sources
from cmacc.train.model import CrossModal
from cmacc.train.networks.compute import Collector, OnDevice
from cmacc.train.networks.flops import encoder_flops, peak_flops
from cmacc.train.optimiser import load_optimiser, optimiser_tensors
from cmacc.train.running.alarm import Alarm, Verdict
from cmacc.train.running.checkpoint import another_version, checkpoint_folder, load, under
from cmacc.train.running.checkpointer import Checkpointer
from cmacc.train.running.clock import Clock
from cmacc.train.running.distributed import World, joined
from cmacc.train.running.metrics import MetricsLog, Report, RunLog
from cmacc.train.running.monitor import step_facts, to_host
from cmacc.train.running.preemption import Preempted, Preemption
from cmacc.train.running.replay import save_failing, save_weights
from cmacc.train.step import Stepped, TrainingStep, Verdicts

log = logging.getLogger(__name__)


def pretrain(data: str | Sequence[str], run: Path, config: PretrainConfig, report: Report | None = None) -> str:
    """Train on a data set until step `config.steps`, in the folder `run`; continue what stands there.

    data: its address, or several, which are mixed, each perhaps as WEIGHT=ADDRESS. Held-out clips come from the first.
    Under torchrun this process is one rank of many. Returns the address of the last checkpoint. On a CPU a continued run
    computes bit for bit what an unbroken one does. Raises ValueError, DatasetError or CheckpointError with one sentence for a
    wrong option, data set or run folder, FloatingPointError when an alarm stops the run, Preempted after SIGTERM or SIGUSR1,
    all saved.
    """
    data = [data] if isinstance(data, str) else list(data)
    with Preemption(config.checkpoint.grace_s) as signals, joined(config.distributed) as world:
        return _Run(data, run, config, world, signals, report).train()


class _Run:
    """What the loop works with, made in the order in which it is needed."""

    def __init__(
        self, data: list[str], run: Path, config: PretrainConfig, world: World, signals: Preemption, report: Report | None
    ) -> None:
        self.run, self.config, self.world, self.signals = run, config, world, signals
        self.sources = open_sources(data, config.split)
        run.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(config.seed)
        self.model = CrossModal(config.encoders, config.objective).to(world.device).train()
        self.optimiser = config.optimiser.build(self.model.learned().values())
        self.loader = TrainingLoader(
            self.sources, config.view, config.loader, seed=config.seed, rank=world.rank, world=world.size, on_bad=self._quarantine
        )
        self.loader.interrupted = lambda: signals.requested
        self.online = Online(self.sources[0].dataset, config)
        self.alarm = Alarm(config.alarm, config.loader.batch, config.encoders.width)
        self.checkpoints = self._checkpointer()
        self.step, self.position, self.evaluated = 0, 0, -1  # position: samples trained on; the loader is ahead of it
        self._put_back(may_be_new=True)
        if world.leads:
            publish(run / "config.json", json.dumps({"data": data, **to_json(config)}, indent=2).encode() + b"\n")
            self._warn_of_few_clips()
        # Compiles, wraps for several ranks: what is put back before needs no copy of it.
        self.take_step = TrainingStep(config, self.model, self.optimiser, world)
        self.take_step.rate = self.alarm.rate
        self.candidates = Candidates(
            self.sources,
            config,
            world,
            self.take_step.encode_candidates,
            self.model.memory,
            interrupted=lambda: signals.requested,
            on_bad=self._quarantine_candidate,
        )
        self.numbers = RunLog(run, self.step, report, config.log, flatten(to_json(config)), world.rank)
        self.verdicts = Verdicts(world.device)

    def train(self) -> str:
        """The loop. Returns the address of the last checkpoint."""
        config, world = self.config, self.world
        batches = self._batches()
        clock, look = self._clock(), False
        with self._closing(), Collector(config.compute.collect_every) as collector:
            while True:
                # Periodic events, between two steps: the only place where anything is saved or left.
                if self.evaluated != self.step and (look or self.online.by_step(self.step)):
                    if self._goes_back(self._not_finite(everything=True)):
                        batches = self._batches()
                        continue
                    self._evaluate()
                    clock.restart()
                batch = next(batches, None) if self.step < config.steps else None
                due = self.checkpoints is not None and self.checkpoints.due(self.step, time.monotonic())
                looks = self.online.by_clock(time.monotonic())
                leave, save, look = world.agree([self.signals.requested, due or self.step in (0, config.steps), looks])
                if (leave or save) and self._goes_back(self._not_finite(everything=True)):
                    batches = self._batches()
                    continue
                if leave or save:
                    self._save()
                if self.evaluated == self.step == config.steps:
                    return self._saved()[1]
                if leave or batch is None:
                    raise Preempted(*self._saved())
                if config.distributed.checksum_every and self.step % config.distributed.checksum_every == 0:
                    world.prove_same(self._same_on_all_ranks(), self.step)
                collector.at(self.step)

                # One step.
                try:
                    fresh = self.candidates.for_step(self.step, self.position)
                except Interrupted:
                    continue
                stepped = self.take_step(batch, self.step, fresh)
                self.step, self.position = self.step + 1, self.position + config.loader.batch
                clock.tick(config.loader.batch)

                # Log, and look whether all is well.
                logs = self.step % config.log_every == 0 or self.step == config.steps
                self.verdicts.add(stepped)
                verdict = self._not_finite(everything=logs)
                if logs and stepped.ok:
                    verdict = verdict or self._log(stepped, fresh, clock)
                if self._goes_back(verdict):
                    batches = self._batches()
                    clock.restart()

    # --- periodic events ---

    def _evaluate(self) -> None:
        """Held-out clips, each rank a part of them. Left off when the run is to stop: the next one does it."""
        world, model = self.world, self.model
        if not self.online.possible:
            self.evaluated = self.step
            return
        world.follow(model.statistics())
        part = self.online.part(world.rank, world.size, model.video, model.audio, lambda: self.signals.requested)
        if any(world.agree([self.signals.requested])):
            return
        parts = world.collect(part)
        self.evaluated, verdict = self.step, None
        self.online.looked()
        if world.leads:
            facts = self.online.facts(parts)
            self._tell(facts)
            verdict = self.alarm.look(self.step, facts)
        self._act(world.share(verdict))

    def _log(self, stepped: Stepped, fresh: tuple[Entries, Entries] | None, clock: Clock) -> Verdict | None:
        """The step's numbers, and what the alarm says of them."""
        verdict = None
        if self.world.leads:
            picked = {"video": stepped.choice.picked_video, "audio": stepped.choice.picked_audio}
            memory, objective = self.model.memory, self.config.objective
            candidates = dict(zip(("video", "audio"), fresh, strict=True)) if fresh else None
            q_video, q_audio, *_ = stepped.queries
            found = step_facts(
                stepped.contrast.terms(), q_video, q_audio, memory, picked, self.step, objective.pseudo_tau, candidates
            )
            found |= stepped.norms
            facts = to_host(found) | clock.facts({"selection": stepped.choice.watch.seconds()})
            facts["optimiser/rate"] = float(self.optimiser.param_groups[0]["lr"])
            facts["data/bad_clips"] = float(len(self.loader.bad))
            self._tell(facts)
            verdict = self.alarm.look(self.step, facts)
        return self._act(self.world.share(verdict))

    def _save(self) -> None:
        if self.checkpoints is None:
            return
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= optimiser_tensors(self.optimiser, self.model.learned().items())
        facts = {
            "config": to_json(self.config),
            "loader": {**self.loader.state_dict(), "position": self.position},
            "alarm": self.alarm.state_dict(),
            "evaluated": self.evaluated,
        }
        self.checkpoints.save(self.step, tensors, facts)

    def _saved(self) -> tuple[int, str]:
        """Step and address of the last checkpoint, once it is written. All ranks wait for it: torchrun ends the others when one
        has left. At the end of the run, raises what kept it from being written."""
        found, failed = (0, "nothing, for there is no checkpoint yet"), None
        if self.checkpoints is not None and (address := self.checkpoints.wait()):
            found = self.checkpoints.step or 0, address
        if self.checkpoints is not None and self.checkpoints.step != self.step == self.config.steps:
            failed = self.checkpoints.error
        found, failed = self.world.share((found, failed))
        if failed is not None:
            raise failed
        self.signals.done()
        return found

    def _put_back(self, may_be_new: bool) -> None:
        """Everything as the latest checkpoint has it, on every rank. Only rank 0 need be able to read it."""
        address = self.checkpoints.wait() if self.checkpoints else None
        saved = load(address) if address else None
        state = self.world.share((saved.step, saved.tensors, saved.facts, saved.versions) if saved else None)
        if state is None:
            if not may_be_new:
                raise FloatingPointError(f"{self.run} has no checkpoint to go back to; start again with a lower optimiser.rate")
            return
        self.step, tensors, facts, versions = state
        try:
            before = from_json(facts["config"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise another_version(str(self.run), versions, error) from error
        check_same_run(to_json(before), self.config, self.run)
        try:
            self.model.load_state_dict(under("model", tensors))
            load_optimiser(self.optimiser, tensors, self.model.learned().items())
            self.evaluated = int(facts["evaluated"]) if self.step else -1  # the log begins anew at step 0
            if may_be_new:
                self.alarm.load_state_dict(facts["alarm"])
            loader = facts["loader"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise another_version(str(self.run), versions, error) from error
        self.loader.load_state_dict(loader)
        self.position = self.loader.position
        if may_be_new:
            log.info("continuing %s from step %d", self.run, self.step)

    def _goes_back(self, verdict: Verdict | None) -> bool:
        """To the last checkpoint, if so decided, but on with the clips that come next: the same ones would end the same."""
        if verdict is None or verdict.action != "rollback":
            return False
        position = self.position
        self._put_back(may_be_new=False)
        self.loader.position = self.position = position
        self.take_step.rate = self.world.share(self.alarm.rate)
        self.numbers.cut_back(self.step)
        return True

    # --- is all well? ---

    def _not_finite(self, everything: bool) -> Verdict | None:
        """What to do about steps that were not taken, told as soon as the host hears of them."""
        verdict = None
        for stepped in self.verdicts.bad(everything):
            self.take_step.take_back(stepped)
            facts = {f"loss/{name}": float(term.loss.detach()) for name, term in stepped.contrast.terms().items()}
            facts |= {name: float(value) for name, value in stepped.norms.items()}
            every = self.world.collect(facts)  # it may be but one rank that met it
            facts = {name: value if all(math.isfinite(f[name]) for f in every) else math.nan for name, value in facts.items()}
            verdict = self.world.share(self.alarm.look(stepped.step, facts) if self.world.leads else None)
            keys = self._guilty(stepped)
            why = verdict.sentence(keys) if verdict else "not finite"
            batch = stepped.batch
            mine = [self.loader.reader.key(i) for i in batch.ids.tolist()]
            last = (self.checkpoints.wait() if self.checkpoints else None) or ""
            save_failing(self.run, stepped.step, self.world.rank, batch, mine, why, last)
            if self.world.leads:
                save_weights(self.run, stepped.step, self.model.state_dict())
            verdict = self._act(verdict, keys)
        return verdict

    def _guilty(self, stepped: Stepped) -> list[str]:
        """Keys of the clips whose query or key is not finite; of the whole batch when that does not tell them apart."""
        columns = [stepped.queries.video, stepped.queries.audio, stepped.k_video.keys, stepped.k_audio.keys]
        bad = ~torch.stack([column.isfinite().all(1) for column in columns]).all(0)
        ids = stepped.k_video.ids[bad] if 0 < int(bad.sum()) < len(bad) else stepped.k_video.ids
        return [self.loader.reader.key(i) for i in ids.tolist()]

    def _act(self, verdict: Verdict | None, keys: Sequence[str] = ()) -> Verdict | None:
        """Say it, and stop when that is what it says."""
        if verdict:
            sentence = verdict.sentence(keys)
            if self.world.leads:
                self._put_down("alarms.jsonl", step=verdict.step, kind=verdict.kind, action=verdict.action, sentence=sentence)
            if verdict.action == "stop":
                raise FloatingPointError(f"{sentence}; {self.run} keeps its last checkpoint")
            if self.world.leads:
                does = {"rollback": "going back to the last checkpoint", "skip": "the step was not taken", "warn": "it goes on"}
                log.warning("%s (%s)", sentence, does[verdict.action])
        return verdict

    def _same_on_all_ranks(self) -> dict[str, torch.Tensor]:
        memory = {f"memory.{name}": buffer for name, buffer in self.model.memory.named_buffers()}
        return {**dict(self.model.named_parameters()), **memory}

    # --- odds and ends ---

    def _warn_of_few_clips(self) -> None:
        """A pool has one slot for each clip: of few clips it may never hold what is asked of it before anything is picked."""
        objective, clips = self.config.objective, sum(len(split) for split in self.loader.sampler.splits)
        if objective.keeps_pool and clips < (least := objective.ready(self.config.loader.batch)):
            log.warning(
                "nothing will ever be picked: a pool must hold %d clips first, and there are %d to train on; give "
                "loader.batch=%d or less, or use objective.pool=fresh",
                least, clips, max(1, clips // POOL_READY_BATCHES),
            )  # fmt: skip

    @contextmanager
    def _closing(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.loader.close()
            self.candidates.close()
            if self.checkpoints:
                self.checkpoints.close()
            self.numbers.close()

    def _checkpointer(self) -> Checkpointer | None:
        """Of the rank that saves; the others need not be able to reach the place."""
        if not self.world.leads:
            return None
        made = Checkpointer(checkpoint_folder(self.run, self.config.checkpoint.at), self.config.checkpoint)
        self.signals.wait = made.wait
        return made

    def _batches(self) -> Iterator[Batch]:
        return iter(OnDevice(self.loader, self.world.device))

    def _tell(self, facts: dict[str, float]) -> None:
        self.numbers.tell(self.step, facts)

    @property
    def waited_s(self) -> float:
        return self.loader.waited_s + self.candidates.waited_s

    def _clock(self) -> Clock:
        """With the work that is done a clip and the most that the device can do, where that is known."""
        config, device = self.config, self.world.device
        peak = None
        if device.type == "cuda":
            precision = "bf16" if config.compute.bf16(device) else "float32"
            peak = peak_flops(torch.cuda.get_device_name(device), precision)
        flops = encoder_flops(config.encoders, config.view) if peak else None
        return Clock(self, device, flops=flops, peak=peak, world=self.world.size)

    def _quarantine_candidate(self, bad: BadClip) -> None:
        """Once each, whichever loader meets it first, and whatever the run is continued from."""
        if (bad.source, bad.row) not in self.loader.bad:
            self.loader.bad[bad.source, bad.row] = bad.key
            self._quarantine(bad)

    def _quarantine(self, bad: BadClip) -> None:
        name = "quarantine.jsonl" if self.world.leads else f"quarantine.rank-{self.world.rank}.jsonl"
        self._put_down(name, key=bad.key, row=bad.row, data=self.sources[bad.source].dataset.url, reason=str(bad))

    def _put_down(self, name: str, **facts: Any) -> None:
        """A line more in a file of the run's folder; without room for it the run goes on."""
        try:
            with (self.run / name).open("a") as file:
                file.write(json.dumps(facts) + "\n")
        except OSError as error:
            log.warning("%s cannot be written in %s (%s)", name, self.run, error)


def final_numbers(run: Path) -> dict[str, Any]:
    """The last held-out numbers of a run and its mean speed, from `metrics.jsonl`."""
    final: dict[str, Any] = {}
    speeds: list[tuple[float, float]] = []
    for record in MetricsLog.read(run / "metrics.jsonl"):
        final |= {name: value for name, value in record.items() if name.startswith("held_out/")}
        if "speed/clips_per_s" in record:
            speeds.append((record["speed/clips_per_s"], record["speed/waiting"]))
    if speeds:
        # Equal clips a record, so the mean speed is the harmonic mean, and waiting weighs by time.
        times = [1 / clips for clips, _ in speeds]
        final["speed/clips_per_s"] = len(speeds) / math.fsum(times)
        final["speed/waiting"] = math.fsum(t * w for t, (_, w) in zip(times, speeds, strict=True)) / math.fsum(times)
    return final
