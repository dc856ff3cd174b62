"""The training loop, top to bottom: periodic events, one step, log, advance."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch

from cmacc.shards.dataset import Dataset
from cmacc.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from cmacc.train.config import OptimiserConfig, PretrainConfig, check_same_run, to_json
from cmacc.train.loader import BadClip, TrainingLoader
from cmacc.train.metrics import MetricsLog, Report, RunLog
from cmacc.train.model import CrossModal
from cmacc.train.monitor import step_facts
from cmacc.train.retrieval import embed, held_out_rows, retrieval
from cmacc.train.schedule import warmup_constant, warmup_cosine
from cmacc.train.views import generator

log = logging.getLogger(__name__)


def pretrain(data: str, run: Path, config: PretrainConfig, report: Report | None = None) -> Path:
    """Train on the data set at `data` until step `config.steps`, in the folder `run`; continue what stands there.

    Returns the last checkpoint. On a CPU a continued run computes bit for bit what an unbroken one does. Raises
    ValueError, DatasetError or CheckpointError with one sentence for a wrong option, data set or run folder,
    FloatingPointError when the gradient is no longer finite.
    """
    dataset = Dataset.open(data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    model = CrossModal(config.encoders, config.objective).to(device).train()
    optimiser = torch.optim.AdamW(
        model.learned(), lr=config.optimiser.rate, weight_decay=config.optimiser.weight_decay, fused=True
    )
    loader = TrainingLoader(
        dataset, config.view, config.loader, split=config.split, seed=config.seed, on_bad=lambda bad: _quarantine(run, bad)
    )
    held_out = held_out_rows(dataset, config.eval_split, config.eval_clips)

    checkpoints = run / "checkpoints"
    last = latest_checkpoint(checkpoints)
    step = _continue(last, run, config, model, optimiser, loader) if last else 0
    (run / "config.json").write_text(json.dumps({"data": data, **to_json(config)}, indent=2) + "\n")
    numbers = RunLog(run, after=step, report=report)

    def evaluate() -> None:
        if len(held_out) > 1:
            embedded = embed(dataset, held_out, config.view, config.loader, model.video, model.audio)
            numbers.tell(step, {f"held_out/{name}": value for name, value in retrieval(embedded).items()})

    def checkpoint() -> Path:
        state = {"config": json.dumps(to_json(config)), "loader": json.dumps(loader.state_dict())}
        return save_checkpoint(checkpoints, step, {**state, "model": model.state_dict(), "optimiser": optimiser.state_dict()})

    batches = iter(loader)
    clock = _Clock(loader)
    try:
        if step == 0:
            evaluate()
        while step < config.steps:
            batch = next(batches).to(device)
            for group in optimiser.param_groups:
                group["lr"] = config.optimiser.rate * _rate(config.optimiser, step, config.steps)
            draws = torch.Generator(device).manual_seed(int(generator(config.seed, "selection", step).integers(2**62)))
            result, q_video, q_audio, k_video, k_audio = model(batch, step, draws)
            optimiser.zero_grad(set_to_none=True)
            result.loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.learned() if p.grad is not None])
            if not torch.isfinite(norm):
                raise FloatingPointError(_not_finite(step, [str(loader.reader.keys[i]) for i in batch.ids.tolist()], run))
            optimiser.step()
            model.after_step(result, k_video, k_audio)
            step += 1
            clock.tick(len(batch.ids))

            if step % config.log_every == 0 or step == config.steps:
                facts = step_facts(model, result, q_video.detach(), q_audio.detach(), step)
                facts |= {"optimiser/gradient_norm": float(norm), "optimiser/rate": float(optimiser.param_groups[0]["lr"])}
                numbers.tell(step, facts | clock.facts())
            if step % config.eval_every == 0 or step == config.steps:
                evaluate()
                clock.restart()
            if step % config.checkpoint_every == 0 or step == config.steps:
                last = checkpoint()
                clock.restart()
    finally:
        loader.close()
        numbers.close()
    return last or checkpoint()


def _continue(
    last: Path, run: Path, config: PretrainConfig, model: CrossModal, optimiser: torch.optim.Optimizer, loader: TrainingLoader
) -> int:
    """Put everything back as the checkpoint `last` has it; returns its step."""
    state = load_checkpoint(last, next(model.parameters()).device)
    check_same_run(json.loads(state["config"]), config, run)
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    loader.load_state_dict(json.loads(state["loader"]))
    log.info("continuing %s from step %d", run, state["step"])
    return int(state["step"])


def _rate(config: OptimiserConfig, step: int, steps: int) -> float:
    return warmup_cosine(step, config.warmup, steps) if config.cosine else warmup_constant(step, config.warmup)


def _quarantine(run: Path, bad: BadClip) -> None:
    with (run / "quarantine.jsonl").open("a") as file:
        file.write(json.dumps({"key": bad.key, "row": bad.row, "reason": str(bad)}) + "\n")


def _not_finite(step: int, keys: list[str], run: Path) -> str:
    return (
        f"the gradient is not finite at step {step} (clips {', '.join(keys)}); {run} keeps its last checkpoint: "
        "lower optimiser.rate or raise objective.tau, in a new run folder"
    )


class _Clock:
    """Clips a second with the wait for data in it, and the share of time that was waiting, since the last restart."""

    def __init__(self, loader: TrainingLoader) -> None:
        self.loader = loader
        self.restart()

    def restart(self) -> None:
        self.clips, self.began, self.waited = 0, time.perf_counter(), self.loader.waited_s

    def tick(self, clips: int) -> None:
        self.clips += clips

    def facts(self) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self.began, 1e-9)
        waited = self.loader.waited_s - self.waited
        facts = {"speed/clips_per_s": self.clips / elapsed, "speed/waiting": waited / elapsed}
        self.restart()
        return facts


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
