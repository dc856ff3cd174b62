"""Ranks: what they gather, agree on and prove; and a run of several, beside the run of one."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ranks_of
from train_data import TINY

from cmacc.train import step
from cmacc.train.config import PretrainConfig, change, from_json, to_json
from cmacc.train.loading.reader import Batch
from cmacc.train.pretrain import pretrain
from cmacc.train.running.checkpoint import latest, load
from cmacc.train.running.distributed import DistributedConfig, RanksDisagree, World, checksum, joined
from cmacc.train.running.preemption import Preempted
from cmacc.train.step import TrainingStep

Run = Callable[..., list[int]]
SUM = change(
    TINY,
    {
        "encoders.norm": "group",
        "loader.batch": 7,
        "objective.candidates": 14,
        "steps": 20,
        "optimiser.rate": 3e-4,
        "optimiser.cosine": False,
        "eval_every": 10,
        "checkpoint.steps": 10,
    },
)
"""A batch that neither 2 nor 3 ranks divide; a pool that is full after two, for there are 16 clips; no coupling inside a batch.
A low rate, for Adam takes a gradient that is all but nought, and has another sign on other ranks, for a whole step of that rate;
and a rate that does not ask how many steps come, so that a shorter run has the first losses of a longer one."""
BLIND = {"eval_clips": 1}
"""Among one clip nothing can be found: held-out clips are not looked at."""


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with ranks_of("test_train_distributed") as run:
        yield run


def whole(total: int) -> torch.Tensor:
    return torch.arange(total * 3, dtype=torch.float32).view(total, 3) ** 2


# --- what a rank does: called in processes of their own ---


def gathers(out: str) -> None:
    with joined(DistributedConfig()) as world:
        found = {}
        for total in (world.size, 7, 8):
            rows = world.own(whole(total))
            found[total] = world.gather(rows, total).tolist()
            assert world.gather(rows.long(), total).dtype == torch.int64
        values = [torch.full((2, 2), float(world.rank)), torch.full((3,), 10.0 * world.rank)]
        world.follow(values)
        found["follow"] = [v.sum().item() for v in values]
        found["everywhere"] = [bool(world.everywhere(torch.tensor(world.rank != 1))), bool(world.everywhere(torch.tensor(True)))]
        found["agree"] = world.agree([world.rank == 1, False, True])
        found["collect"] = world.collect({"rank": world.rank})
        found["share"] = world.share(f"of {world.rank}")
        (Path(out) / f"{world.rank}.json").write_text(json.dumps(found))


def disagrees(out: str) -> None:
    with joined(DistributedConfig()) as world:
        same, other = torch.ones(4), torch.zeros(4)
        world.prove_same({"same": same}, 1)
        other[2] = 1e-30 * (world.rank == 1)
        try:
            world.prove_same({"same": same, "other": other}, 2)
        except RanksDisagree as error:
            (Path(out) / f"{world.rank}.txt").write_text(str(error))


def trains(data: str, run: str, config: str, slowly: bool = False) -> None:
    torch.set_num_threads(1)
    try:
        pretrain(data, Path(run), from_json(json.loads(config)), (lambda *_: time.sleep(0.1)) if slowly else None)
    except Preempted:
        sys.exit(143)


def trains_on_nonsense(data: str, run: str, config: str, where: str) -> None:
    """At step 5 something is not finite, once, on rank 1 alone."""
    guilty = os.environ["RANK"] == "1"
    step_as_it_is, contrast_as_it_is, norms_as_they_are = TrainingStep.__call__, step.contrast, TrainingStep._norms
    at: list[int] = []

    def now(this: str) -> bool:
        return guilty and where == this and at[-1] == 5 and at.count(5) == 1

    def call(self: TrainingStep, batch: Batch, number: int, fresh: Any = None) -> Any:
        at.append(number)
        if now("clip"):
            batch.audio[0, 0, 0, 0] = math.nan
        return step_as_it_is(self, batch, number, fresh)

    def loss(*arguments: Any) -> Any:
        found = contrast_as_it_is(*arguments)
        if now("loss"):
            return replace(found, video_to_audio=replace(found.video_to_audio, loss=found.video_to_audio.loss * math.nan))
        return found

    def norms(self: TrainingStep) -> Any:
        if now("gradient"):
            next(self.model.video.parameters()).grad[0] = math.inf
        return norms_as_they_are(self)

    TrainingStep.__call__, step.contrast, TrainingStep._norms = call, loss, norms  # type: ignore[method-assign]
    try:
        trains(data, run, config)
    except FloatingPointError as error:
        (Path(run) / f"said.{os.environ['RANK']}").write_text(str(error))
        sys.exit(9)


# --- the primitives ---


@pytest.mark.parametrize("world", [2, 3])
def test_what_ranks_know_together(run: Run, tmp_path: Path, world: int) -> None:
    assert run(world, "gathers", str(tmp_path)) == [0] * world
    for rank in range(world):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for total in (world, 7, 8):
            assert found[str(total)] == whole(total).tolist()
        assert found["follow"] == [0, 0]
        assert found["everywhere"] == [False, True]
        assert found["agree"] == [True, False, True]
        assert found["collect"] == [{"rank": r} for r in range(world)]
        assert found["share"] == "of 0"


def test_one_process_is_a_world() -> None:
    rows = whole(5).requires_grad_()
    world = World()
    assert torch.equal(world.gather(rows, 5), rows)
    assert not world.gather(rows, 5).requires_grad
    assert world.agree([True, False]) == [True, False]
    assert world.collect(3) == [3]
    assert world.share("this") == "this"
    assert world.leads


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sentence, not in CUDA's words."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_RANK", "4")
    said = "this machine has 4 GPUs, and there is none for rank 4 of it; give --ranks 0, or torchrun --nproc-per-node 4"
    with pytest.raises(ValueError, match=f"^{said}$"), joined(DistributedConfig()):
        pass


def test_ranks_that_disagree_are_told(run: Run, tmp_path: Path) -> None:
    assert run(2, "disagrees", str(tmp_path)) == [0, 0]
    for rank in range(2):
        assert "at step 2 ranks" in (said := (tmp_path / f"{rank}.txt").read_text())
        assert "hold different other (1 tensors differ); start again from the last checkpoint" in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_a_checksum_tells_bits_and_places_apart(dtype: torch.dtype) -> None:
    tensor = (torch.arange(12).view(4, 3) % 5 > 1).to(dtype)
    other, swapped = tensor.clone(), tensor[[1, 0, 2, 3]]
    other[3, 2] = ~other[3, 2] if dtype == torch.bool else other[3, 2] + 1
    sums = [int(checksum(t)) for t in (tensor, tensor.clone(), other, swapped)]
    assert sums[0] == sums[1]
    assert len(set(sums[1:])) == 3
    assert int(checksum(torch.tensor(-0.0))) != int(checksum(torch.tensor(0.0)))


def test_a_wrong_option_is_named() -> None:
    for options in ({"checksum_every": -1}, {"timeout_s": 0.0}, {"timeout_s": math.nan}):
        (name,) = options
        with pytest.raises(ValueError, match=rf"distributed\.{name} is .*; give "):
            DistributedConfig(**options)


# --- runs ---


def losses(run: Path, name: str = "loss/total") -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def held_out(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith(("step", "held_out/"))} for line in lines if "held_out/R@1" in line]


def train_ranks(run: Run, world: int, data: str, folder: Path, config: PretrainConfig, *more: Any, **options: Any) -> list[int]:
    return run(world, "trains", data, str(folder), json.dumps(to_json(config)), *more, **options)


@pytest.fixture(scope="module")
def alone(tiny_data: str, tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert train_ranks(run, 1, tiny_data, folder, SUM) == [0]
    return folder


@pytest.mark.parametrize(("world", "steps"), [(2, 20), (3, 10)])
def test_ranks_compute_what_one_process_does(
    run: Run, tiny_data: str, alone: Path, tmp_path: Path, world: int, steps: int
) -> None:
    """Active selection begins with the third step: how many are picked, and so the losses, are those of the whole batch."""
    assert train_ranks(run, world, tiny_data, tmp_path, change(SUM, {"steps": steps})) == [0] * world
    assert len(losses(tmp_path)) == steps
    assert losses(tmp_path) == pytest.approx(losses(alone)[:steps], rel=1e-5)
    assert losses(tmp_path, "selection/picked") == losses(alone, "selection/picked")[:steps]
    assert sum(losses(alone, "selection/picked")[2:steps]) > 20
    assert held_out(tmp_path) == [line for line in held_out(alone) if line["step"] <= steps]


def test_ranks_look_by_the_clock_together(run: Run, tiny_data: str, alone: Path, tmp_path: Path) -> None:
    """After each step, though each has a clock of its own; the losses are those of a run that looks twice."""
    config = change(SUM, {"eval_every": 0, "eval_minutes": 1e-9, "steps": 6})
    assert train_ranks(run, 2, tiny_data, tmp_path, config) == [0] * 2
    assert [line["step"] for line in held_out(tmp_path)] == list(range(7))
    assert losses(tmp_path) == pytest.approx(losses(alone)[:6], rel=1e-5)


def test_synchronised_statistics_are_those_of_one_process(run: Run, tiny_data: str, tmp_path: Path) -> None:
    """At a tenth of the rate: small batches are divided by small deviations, which magnifies what Adam makes of rounding."""
    config = change(SUM, {"encoders.norm": "batch", "compute.batchnorm": "sync", "optimiser.rate": 3e-5, **BLIND})
    assert train_ranks(run, 1, tiny_data, tmp_path / "alone", config) == [0]
    assert train_ranks(run, 2, tiny_data, tmp_path / "two", config) == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    own = change(config, {"compute.batchnorm": "rank"})
    assert train_ranks(run, 2, tiny_data, tmp_path / "own", own) == [0, 0]
    assert losses(tmp_path / "own") != pytest.approx(losses(tmp_path / "alone"), rel=1e-2)


def test_a_shuffled_batch_leaves_each_key_at_its_place(run: Run, tiny_data: str, tmp_path: Path) -> None:
    """Who encodes a key makes a difference to it by BatchNorm alone: the first loss with keys of the batch hardly changes."""
    found = []
    for how in ("rank", "shuffled"):
        changes = {
            "encoders.norm": "batch",
            "compute.batchnorm": how,
            "steps": 3,
            "objective.negatives": "batch+dictionary",
            **BLIND,
        }
        assert train_ranks(run, 2, tiny_data, tmp_path / how, change(SUM, changes)) == [0, 0]
        found.append(losses(tmp_path / how))
    assert found[0] != pytest.approx(found[1], rel=1e-6)
    assert found[0][0] == pytest.approx(found[1][0], rel=0.1)


@pytest.mark.parametrize("negatives", ["dictionary", "batch+dictionary", "batch"])
def test_micro_batches_compute_what_the_whole_batch_does(
    run: Run, tiny_data: str, alone: Path, tmp_path: Path, negatives: str
) -> None:
    """Slices of 3, 3 and 1 clips; of two ranks, of 3 and 1, and of 3."""
    config = change(SUM, {"objective.negatives": negatives, "steps": 8, **BLIND})
    whole = alone if negatives == SUM.objective.negatives else tmp_path / "whole"
    if whole != alone:
        assert train_ranks(run, 1, tiny_data, whole, config) == [0]
    small = change(config, {"compute.micro_batch": 3})
    for world in (1, 2):
        assert train_ranks(run, world, tiny_data, tmp_path / str(world), small) == [0] * world
        assert losses(tmp_path / str(world)) == pytest.approx(losses(whole)[:8], rel=1e-5)


def test_more_or_fewer_ranks_go_on_with_the_very_next_clips(run: Run, tiny_data: str, alone: Path, tmp_path: Path) -> None:
    for world, steps in ((1, 5), (3, 10), (2, 20)):
        stop_at = change(SUM, {"checkpoint.steps": 5})
        codes = train_ranks(
            run, world, tiny_data, tmp_path, stop_at, True, began=lambda pids, n=steps: leave_at(tmp_path, n, pids)
        )
        assert codes == ([0] * world if steps == 20 else [143] * world)
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-5)


def leave_at(folder: Path, step: int, pids: list[int]) -> None:
    """SIGTERM for one rank, the last, once the log has this step; the others learn it from that one."""
    log, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while step < SUM.steps and not (log.exists() and f'{{"step": {step},' in log.read_text()):
        assert time.monotonic() < deadline, f"step {step} does not come"
        time.sleep(0.005)
    if step < SUM.steps:
        os.kill(pids[-1], signal.SIGTERM)


@pytest.mark.parametrize("where", ["clip", "loss", "gradient"])
def test_what_is_not_finite_on_one_rank_stops_all(run: Run, tiny_data: str, tmp_path: Path, where: str) -> None:
    config = change(SUM, {"checkpoint.steps": 4, "checkpoint.keep": 1, **BLIND})
    assert run(2, "trains_on_nonsense", tiny_data, str(tmp_path), json.dumps(to_json(config)), where) == [9, 9]
    said = [(tmp_path / f"said.{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert "at step 5 (clips " in said[0]
    assert len(losses(tmp_path)) == 5
    failed = sorted(p.name for p in (tmp_path / "failed").rglob("rank-*.safetensors"))
    assert len(failed) == 2, failed
    named = said[0][said[0].index("(clips ") :].split(")")[0].count(",") + 1
    assert named == (1 if where == "clip" else 7)


@pytest.mark.parametrize("where", ["clip", "loss", "gradient"])
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(run: Run, tiny_data: str, tmp_path: Path, where: str) -> None:
    """Weights, statistics and memory stay clean, and those of all ranks the same: proved at each step."""
    config = change(
        SUM, {"alarm.non_finite": "skip", "distributed.checksum_every": 1, "encoders.norm": "batch", "steps": 8, **BLIND}
    )
    assert run(2, "trains_on_nonsense", tiny_data, str(tmp_path), json.dumps(to_json(config)), where) == [0, 0]
    assert len(losses(tmp_path)) == 7
    tensors = load(latest(str(tmp_path / "checkpoints"))).tensors
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


def test_a_rollback_goes_on_from_the_last_checkpoint_with_other_clips(run: Run, tiny_data: str, tmp_path: Path) -> None:
    """From step 5 back to 4, with a lower rate; the clips of the batches 4 and 5 are not met again."""
    config = change(SUM, {"alarm.non_finite": "rollback", "checkpoint.steps": 4, "alarm.rate_after_rollback": 0.5})
    config = change(config, {"steps": 8, **BLIND})
    assert run(2, "trains_on_nonsense", tiny_data, str(tmp_path), json.dumps(to_json(config)), "clip") == [0, 0]
    assert len(losses(tmp_path)) == 8
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["optimiser/rate"] for line in lines if "optimiser/rate" in line}
    assert rates[5] == pytest.approx(0.5 * SUM.optimiser.at(4, 20))
    assert rates[4] == pytest.approx(SUM.optimiser.at(3, 20))
    facts = load(latest(str(tmp_path / "checkpoints"))).facts
    assert facts["loader"]["position"] == 7 * (8 + 2)
    assert facts["alarm"]["rollbacks"] == 1
