"""The loop: complete numbers, and after any kill the same losses, bit for bit."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_data import EVAL_CLIPS, TINY, TRAIN_CLIPS, clips, with_members, write_dataset
from train_runs import assert_same, assert_tensorboard, last_of, records

from cmacc.shards.place import place
from cmacc.train.config import PretrainConfig, change, from_json, to_json
from cmacc.train.loading.sampler import Sampler, open_sources
from cmacc.train.pretrain import final_numbers, pretrain
from cmacc.train.report.picture import draw_run
from cmacc.train.running.checkpoint import (
    CheckpointError,
    checkpoint_folder,
    load,
    point,
    remove,
    under,
    write,
)
from cmacc.train.running.metrics import MetricsLog
from cmacc.train.step import TrainingStep, Verdicts

CHILD = """
import json, sys, time
from pathlib import Path

sys.path.insert(0, {tests!r})
import train_data
from cmacc.train.config import from_json
from cmacc.train.pretrain import pretrain

data, run, config, hold = sys.argv[1:]
pretrain(data, Path(run), from_json(json.loads(config)), lambda step, facts: time.sleep(0.05 if step < int(hold) else 600))
"""


# where a continued run is promised to be the same bit for bit
pytestmark = pytest.mark.usefixtures("on_a_cpu")


def test_metrics_are_complete_and_finite(tiny_run: Path) -> None:
    found = records(tiny_run)
    assert all(math.isfinite(value) for record in found for value in record.values())
    steps = [record for record in found if "loss/total" in record]
    held_out = [record for record in found if "held_out/R@1" in record]
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert [record["step"] for record in held_out] == [0, 6, 12]
    assert {len(record) for record in steps[1:]} == {len(steps[-1])}
    assert {len(record) for record in held_out} == {len(held_out[-1])}
    for name in ("chance/audio_to_video", "optimiser/gradient_norm", "queries/effective_rank_audio", "dictionary_audio/classes"):
        assert name in steps[-1]
    assert held_out[0]["held_out/chance_R@1"] == pytest.approx(1 / EVAL_CLIPS)
    clock = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines() if "speed/" in line]
    assert all(record["speed/clips_per_s"] > 0 and 0 <= record["speed/waiting"] <= 1 for record in clock)


def test_active_picks_begin_when_the_pool_holds_four_batches(tiny_run: Path) -> None:
    """All 16 clips are in the pools after step 4; from then on all 2 x 4 places go to picks, as the share of 1 says."""
    picked = [record["selection/picked"] for record in records(tiny_run) if "selection/picked" in record]
    assert picked == [0] * 4 + [8] * 8
    assert records(tiny_run)[-2]["pool_video/entries"] == 16
    assert records(tiny_run)[-2]["dictionary_audio/entries"] == 10


def test_everything_learns_and_the_rate_follows_its_schedule(tiny_data: str, tiny_run: Path) -> None:
    """Warm-up over 3 steps, then half a cosine over the other 9."""
    rates = [record["optimiser/rate"] for record in records(tiny_run) if "optimiser/rate" in record]
    assert rates[:3] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])
    assert rates[3:] == pytest.approx([0.5e-3 * (1 + math.cos(math.pi * i / 9)) for i in range(9)])
    last, earlier = (under("model", load(tiny_run / "checkpoints" / f"step-{n:08d}.safetensors").tensors) for n in (12, 9))
    learning = [name for name in last if name.endswith((".weight", ".bias"))]
    assert {name.split(".")[0] for name in learning} == {"video", "audio", "key_video", "key_audio"}
    assert not [name for name in learning if torch.equal(last[name], earlier[name])]


def test_what_a_run_leaves(tiny_data: str, tiny_run: Path) -> None:
    assert sorted(p.name for p in (tiny_run / "checkpoints").iterdir()) == [
        "latest",
        *(f"step-{step:08d}.{kind}" for step in (9, 12) for kind in ("json", "safetensors")),
    ]
    saved = json.loads((tiny_run / "config.json").read_text())
    assert saved.pop("data") == [tiny_data]
    assert from_json(saved) == TINY
    assert not (tiny_run / "quarantine.jsonl").exists()
    numbers = final_numbers(tiny_run)
    assert numbers["held_out/R@5"] == records(tiny_run)[-1]["held_out/R@5"]
    assert numbers["speed/clips_per_s"] > 0


def test_tensorboard_has_every_number(tiny_run: Path) -> None:
    assert_tensorboard(tiny_run)


def test_a_finished_run_is_left_as_it_is(tiny_data: str, tiny_run: Path) -> None:
    before = (tiny_run / "metrics.jsonl").read_bytes()
    assert pretrain(tiny_data, tiny_run, TINY, report=lambda *_: pytest.fail("it trains on")) == last_of(tiny_run).address
    assert (tiny_run / "metrics.jsonl").read_bytes() == before


def test_the_picture(tiny_run: Path) -> None:
    path = draw_run(tiny_run)
    assert path == tiny_run / "picture.png"
    assert path.read_bytes().startswith(b"\x89PNG")


class Child:
    """A process that trains, and can be killed. hold: a step that it does not pass, lest it be through before the kill."""

    def __init__(self, data: str, run: Path, config: PretrainConfig, hold: int) -> None:
        self.run = run
        code = CHILD.format(tests=str(Path(__file__).parent))
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, data, str(run), json.dumps(to_json(config)), str(hold)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )

    def kill_at(self, step: int, after_s: float = 0.0) -> None:
        """Kill -9, this long after the log has this step."""
        log, deadline = self.run / "metrics.jsonl", time.monotonic() + 120
        try:
            while self.process.poll() is None and not (log.exists() and f'{{"step": {step},' in log.read_text()):
                assert time.monotonic() < deadline, f"step {step} does not come"
                time.sleep(0.01)
            time.sleep(after_s)
        finally:
            self.process.send_signal(signal.SIGKILL)
            assert self.process.wait() == -signal.SIGKILL


@pytest.mark.long
def test_killed_twenty_times(tiny_data: str, tmp_path: Path) -> None:
    """At any moment: while it starts, inside a step, inside a checkpoint. Three times: in the tests of what may befall a run."""
    config = change(TINY, {"steps": 120, "checkpoint.steps": 2, "eval_every": 20})
    pretrain(tiny_data, tmp_path / "whole", config)
    rng, run = np.random.default_rng(), tmp_path / "run"
    for kill in range(20):
        stood_at = max((record["step"] for record in MetricsLog.read(run / "metrics.jsonl")), default=0)
        # a few steps further, or, as often, before or just when the log is cut back to the checkpoint
        step = stood_at + int(rng.integers(2, 6)) if kill % 2 else stood_at
        Child(tiny_data, run, config, hold=119).kill_at(step, rng.uniform(0, 0.3))
    pretrain(tiny_data, run, config)
    assert_same(run, tmp_path / "whole")
    assert_tensorboard(run)


def test_a_kill_before_the_first_checkpoint(tiny_data: str, tiny_run: Path, tmp_path: Path) -> None:
    """An exception here, which leaves the same files: a log without a checkpoint begins anew."""

    def stop(step: int, _: dict[str, float]) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny_data, tmp_path, TINY, stop)
    assert [record["step"] for record in records(tmp_path)] == [0, 1, 2]
    pretrain(tiny_data, tmp_path, TINY)
    assert_same(tmp_path, tiny_run)
    assert_tensorboard(tmp_path)


def test_logging_and_checkpoints_change_nothing(tiny_data: str, tiny_run: Path, tmp_path: Path) -> None:
    """What is free to change: the same numbers at the steps that are logged."""
    free = {"log_every": 4, "eval_every": 5, "checkpoint.steps": 12, "loader.threads": 1, "loader.ahead": 3}
    pretrain(tiny_data, tmp_path, change(TINY, free))
    found, every = ({r["step"]: r for r in records(run) if "loss/total" in r} for run in (tmp_path, tiny_run))
    assert found == {step: every[step] for step in (4, 8, 12)}
    assert [r["step"] for r in records(tmp_path) if "held_out/R@1" in r] == [0, 5, 10, 12]


@pytest.mark.parametrize("name", ["objective.tau", "seed", "steps", "loader.batch"])
def test_a_changed_option_is_refused(tiny_data: str, tiny_run: Path, name: str) -> None:
    before = sorted((p, p.read_bytes()) for p in tiny_run.rglob("*") if p.is_file())
    with pytest.raises(ValueError, match=rf"was begun with {name}=.*; use another run folder"):
        pretrain(tiny_data, tiny_run, change(TINY, {name: 9}))
    assert sorted((p, p.read_bytes()) for p in tiny_run.rglob("*") if p.is_file()) == before


def saved_as(tiny_run: Path, run: Path, config: dict[str, Any] | None = None, facts: dict[str, Any] | None = None) -> Path:
    """A copy of a run whose last checkpoint says other things, as another version would have saved it."""
    shutil.copytree(tiny_run, run)
    found = last_of(run)
    said = {**found.facts, "config": found.facts["config"] if config is None else config, **(facts or {})}
    there = place(checkpoint_folder(run))
    remove(there, found.step)
    point(there, write(there, found.step, found.tensors, json.dumps(said), {"keeping": {}}))
    return run


def test_a_checkpoint_of_a_version_that_had_fewer_options(tiny_data: str, tiny_run: Path, tmp_path: Path) -> None:
    """What it could not say has its default, with which this version computes the same."""
    config = to_json(TINY)
    del config["eval_minutes"], config["objective"]["age_limit"], config["view"]["second"]
    run = saved_as(tiny_run, tmp_path / "run", config)
    assert pretrain(tiny_data, run, TINY) == last_of(run).address
    with pytest.raises(ValueError, match=r"was begun with view.second='none', not 'same'"):
        pretrain(tiny_data, run, change(TINY, {"view.second": "same"}))


@pytest.mark.parametrize(
    ("config", "facts", "reason"),
    [
        ({"objective.reheat": 3}, {}, "there is no option objective.reheat"),
        ({}, {"alarm": {"sleepy": 1}}, "sleepy"),
        ({}, {"config": 3}, "items"),
        ({"encoders.width": 8}, {}, "size mismatch"),
    ],
)
def test_a_checkpoint_of_another_version(
    tiny_data: str, tiny_run: Path, tmp_path: Path, config: dict[str, Any], facts: dict[str, Any], reason: str
) -> None:
    """One sentence that says who wrote it; nothing is lost."""
    said, other = to_json(TINY), TINY
    for name, value in config.items():
        group, _, option = name.partition(".")
        said[group][option] = value
        other = change(TINY, config) if option == "width" else TINY
    run = saved_as(tiny_run, tmp_path / "run", said, facts)
    before = sorted((p, p.read_bytes()) for p in run.rglob("*") if p.is_file())
    sentence = (
        rf"{run} holds what this version of cmacc does not take \(.*{reason}.*\); go on with the one that wrote it, cmacc 0"
    )
    with pytest.raises(CheckpointError, match=sentence) as raised:
        pretrain(tiny_data, run, other)
    assert "\n" not in str(raised.value)
    assert sorted((p, p.read_bytes()) for p in run.rglob("*") if p.is_file()) == before


def test_a_changed_data_set_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "data", clips()[1:]).url
    with pytest.raises(ValueError, match="has changed since this run's checkpoint"):
        pretrain(other, tiny_run, TINY)


@pytest.mark.parametrize("after", [0, 4])
def test_a_gradient_that_is_not_finite_stops_the_run(
    tiny_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """It names the step and its clips, keeps the last checkpoint, and takes no step with that gradient."""
    call, seen = TrainingStep.__call__, []

    def spoilt(self: TrainingStep, batch: Any, step: int, *more: Any) -> Any:
        seen.append(batch.ids.tolist())
        if step == after:
            batch.audio[0, 0, 0, 0] = math.nan
        return call(self, batch, step, *more)

    monkeypatch.setattr(TrainingStep, "__call__", spoilt)
    with pytest.raises(
        FloatingPointError, match=rf"^loss/.* are not finite at step {after} \(clips .*\): nothing was updated by it; .*lower "
    ) as raised:
        pretrain(tiny_data, tmp_path, TINY)
    keys = [clip.key for clip in clips()]
    assert ", ".join(keys[i] for i in seen[-1]) in str(raised.value)
    saved = last_of(tmp_path)
    assert saved.step == (3 if after else 0)
    assert all(t.isfinite().all() for t in saved.tensors.values())
    assert [record["step"] for record in records(tmp_path)] == list(range(after + 1))


def test_steps_that_are_told_late_spoil_nothing(tiny_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose host hears of a step after the next one: two in a row, and then an evaluation."""
    call, made = TrainingStep.__call__, Verdicts.__init__

    def spoilt(self: TrainingStep, batch: Any, step: int, *more: Any) -> Any:
        if step in (4, 5):
            batch.audio[0, 0, 0, 0] = math.nan
        return call(self, batch, step, *more)

    def late(self: Verdicts, device: torch.device) -> None:
        made(self, device)
        self._lag = 1

    monkeypatch.setattr(TrainingStep, "__call__", spoilt)
    monkeypatch.setattr(Verdicts, "__init__", late)
    monkeypatch.setattr(Verdicts, "add", lambda self, stepped: self._waiting.append((stepped, stepped.ok, None)))
    pretrain(tiny_data, tmp_path, change(TINY, {"alarm.non_finite": "skip", "log_every": 100}))
    assert len(list((tmp_path / "failed").iterdir())) == 2
    looks = [record for record in records(tmp_path) if "held_out/R@1" in record]
    assert [record["step"] for record in looks] == [0, 6, 12]
    assert all(value is not None for record in looks for value in record.values())
    assert all(t.isfinite().all() for t in last_of(tmp_path).tensors.values())


def test_a_rate_beyond_reason_stops_the_run(tiny_data: str, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"not finite at step [1-9]"):
        pretrain(tiny_data, tmp_path, change(TINY, {"optimiser.rate": 1e30, "optimiser.warmup": 0}))


@pytest.mark.filterwarnings("ignore")
def test_bad_clips_are_put_down(tmp_path: Path) -> None:
    """Once each, with their key and reason; the run goes on."""
    some = [
        with_members(c, **({"mp4": b"bad"} if i == 5 else {"flac": b"bad"} if i in (9, 18) else {}))
        for i, c in enumerate(clips())
    ]
    pretrain(write_dataset(tmp_path / "data", some).url, tmp_path / "run", TINY)
    lines = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert Counter(line["row"] for line in lines) == {5: 1, 9: 1}
    assert all(line["key"] == some[line["row"]].key and "does not decode" in line["reason"] for line in lines)
    assert records(tmp_path / "run")[-1]["held_out/chance_R@1"] == pytest.approx(1 / (EVAL_CLIPS - 1))


@pytest.mark.filterwarnings("ignore")
def test_bad_clips_among_candidates_are_put_down_too(tmp_path: Path) -> None:
    """Of `pool: fresh`, which reads all 16 clips in the first step: training itself has not come to this one."""
    order = Sampler(open_sources([write_dataset(tmp_path / "order", clips()).url], "train"), seed=0, streams=2, window=8)
    last = int(order.at(np.array([TRAIN_CLIPS - 1])).row[0])
    some = [with_members(clip, **({"flac": b"bad"} if i == last else {})) for i, clip in enumerate(clips())]
    config = change(TINY, {"objective.pool": "fresh", "objective.fresh": 4, "steps": 1, "eval_every": 0})
    pretrain(write_dataset(tmp_path / "data", some).url, tmp_path / "run", config)
    (line,) = (json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines())
    assert (line["row"], line["key"]) == (last, some[last].key)
    assert last_of(tmp_path / "run").facts["loader"]["bad"] == [[0, last, some[last].key]]
    assert [r["data/bad_clips"] for r in records(tmp_path / "run") if "data/bad_clips" in r] == [1]


def test_too_few_clips_for_a_pool_are_told(tiny_data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pretrain(tiny_data, tmp_path, change(TINY, {"loader.batch": 5, "steps": 1, "eval_every": 0}))
    assert "a pool must hold 20 clips first, and there are 16 to train on; give loader.batch=4 or less, or use" in caplog.text


def test_a_disk_that_is_full_leaves_the_configuration(tiny_data: str, tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before = (run / "config.json").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # the kernel's own, for this process
    try:
        with pytest.raises(OSError, match="File too large"):
            pretrain(tiny_data, run, TINY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"objective.negatives": "batch"},
        {"objective.selector": "fifo"},
        {"objective.selector": "random"},
        {"objective.negatives": "batch+dictionary", "objective.form": "prototype", "view.frames": 3},
    ],
)
def test_other_forms_train(tiny_data: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    pretrain(tiny_data, tmp_path, change(TINY, {**changes, "steps": 6, "eval_every": 6}))
    found = records(tmp_path)
    assert all(math.isfinite(value) for record in found for value in record.values())
    picks = [record["selection/picked"] for record in found if "selection/picked" in record]
    expected = [0] * 6 if changes.get("objective.selector") == "fifo" or "batch" in changes.values() else [0] * 4 + [8] * 2
    assert picks == expected


def test_a_split_that_nobody_is_in(tiny_data: str, tmp_path: Path) -> None:
    for name in ("split", "eval_split"):
        with pytest.raises(Exception, match=r"no clip of .* is in split 'none'; its splits are 'eval', 'train'"):
            pretrain(tiny_data, tmp_path, change(TINY, {name: "none"}))
