"""A run's log: lines, TensorBoard, Weights & Biases, and a disk that is full."""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cmacc.train.running.metrics import LogConfig, MetricsLog, RunLog


def lines(run: Path) -> list[dict[str, Any]]:
    return list(MetricsLog.read(run / "metrics.jsonl"))


def board(run: Path, name: str = "loss") -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in EventAccumulator(str(run / "tensorboard")).Reload().Scalars(name)]


def tell(log: RunLog, *steps: int) -> None:
    for step in steps:
        log.tell(step, {"loss": step / 4, "held_out/R@1": 0.5})


def test_the_log_drops_what_comes_after_the_step_it_continues_from(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsLog(path)
    for step in (0, 2, 2, 4, 5):
        first.write(step, {"loss": step / 3})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a kill
    assert [r["step"] for r in MetricsLog.read(path)] == [0, 2, 2, 4, 5]
    second = MetricsLog(path, after=4)
    second.write(6, {"loss": 0.1})
    second.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records == [{"step": s, "loss": s / 3} for s in (0, 2, 2, 4)] + [{"step": 6, "loss": 0.1}]
    MetricsLog(path).close()
    assert path.read_text() == ""
    assert list(MetricsLog.read(tmp_path / "none.jsonl")) == []


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    """NaN is no JSON: other readers would refuse the file."""
    log = RunLog(tmp_path)
    log.tell(3, {"loss": math.nan, "gradient": -math.inf, "chance": 1.5})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 3, "loss": None, "gradient": None, "chance": 1.5}
    assert math.isnan(board(tmp_path)[0][1])


def test_tensorboard_is_complete_without_close(tmp_path: Path) -> None:
    """As after kill -9; a continued run takes back what came after its checkpoint."""
    first = RunLog(tmp_path)
    tell(first, 1, 2, 3)
    assert board(tmp_path) == [(1, 0.25), (2, 0.5), (3, 0.75)]
    second = RunLog(tmp_path, after=1)
    tell(second, 2)
    second.close()
    assert board(tmp_path) == [(1, 0.25), (2, 0.5)] and [r["step"] for r in lines(tmp_path)] == [1, 2]
    first.close()


def test_a_rollback_drops_what_came_after(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    tell(log, 1, 2, 3)
    log.cut_back(1)
    tell(log, 2)
    log.close()
    assert board(tmp_path) == [(1, 0.25), (2, 0.5)] and [r["step"] for r in lines(tmp_path)] == [1, 2]


def test_only_rank_0_writes_and_reports(tmp_path: Path) -> None:
    told: list[int] = []
    for rank in (0, 1, 2):
        run = tmp_path / str(rank)
        run.mkdir()
        log = RunLog(run, report=lambda step, _: told.append(step), rank=rank)
        tell(log, rank)
        log.cut_back(0)
        log.close()
        assert bool(list(run.iterdir())) == (rank == 0)
    assert told == [0]


def test_a_rollback_on_a_full_disk_is_told_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be dropped is there twice."""
    log = RunLog(tmp_path)
    tell(log, 1, 2, 3)
    with no_room_past(10):
        log.cut_back(2)
    tell(log, 3)
    log.close()
    assert [r["step"] for r in lines(tmp_path)] == [1, 2, 3, 3]
    assert "numbers cannot be written to metrics.jsonl" in caplog.text
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("metrics.jsonl", "tensorboard")] == []


def test_a_clock_that_was_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads files by the time in their names: what a continued run takes back must not come after it."""
    for now, after, steps in ((2e9, 0, (1, 2, 3)), (1e9, 1, (2,)), (1e9 + 5, 2, (3, 4))):
        monkeypatch.setattr("cmacc.train.running.metrics.time.time", lambda now=now: now)
        log = RunLog(tmp_path, after=after)
        tell(log, *steps)
        log.close()
    (tmp_path / "tensorboard" / "events.out.tfevents.of-others").touch()
    assert board(tmp_path) == [(step, step / 4) for step in (1, 2, 3, 4)]


def test_without_tensorboard(tmp_path: Path) -> None:
    log = RunLog(tmp_path, config=LogConfig(tensorboard=False))
    tell(log, 1)
    log.cut_back(0)
    tell(log, 1)
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@contextmanager
def no_room_past(size: int) -> Iterator[None]:
    """The kernel's limit on a file's size stands in for a full disk: it too takes the part of a line that fits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_once_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The line that fitted in part spoils none after it; TensorBoard goes on in a new file."""
    log = RunLog(tmp_path)
    tell(log, 1)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with caplog.at_level(logging.WARNING), no_room_past(size + 20):
        tell(log, 2, 3, 4)
    assert (tmp_path / "metrics.jsonl").stat().st_size == size + 20
    said = [record.getMessage() for record in caplog.records]
    assert sorted(text.split(" of ")[0].removeprefix("numbers cannot be written to ") for text in said) == [
        "TensorBoard", "metrics.jsonl",
    ]  # fmt: skip
    assert all("; the run goes on without them" in text for text in said)
    tell(log, 5, 6)
    log.close()
    assert [record["step"] for record in lines(tmp_path)] == [1, 5, 6]
    assert board(tmp_path) == [(1, 0.25), (5, 1.25), (6, 1.5)]


class FakeWandB(SimpleNamespace):
    """What of the package is used. seen: how runs were begun, and what they were told."""

    def __init__(self, fault: Exception | None = None) -> None:
        super().__init__(seen=[], fault=fault)

    def init(self, **given: Any) -> FakeWandB:
        if self.fault:
            raise self.fault
        self.seen.append(given)
        return self

    def define_metric(self, name: str, step_metric: str = "") -> None:
        self.seen.append((name, step_metric))

    def log(self, facts: dict[str, float]) -> None:
        self.seen.append(facts)

    def finish(self) -> None:
        self.seen.append("finish")


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A continued run goes on in the same run there, at its own steps."""
    begun = []
    for after, step in ((0, 1), (1, 2)):
        fake = FakeWandB()
        monkeypatch.setitem(sys.modules, "wandb", fake)
        log = RunLog(tmp_path, after, config=LogConfig(wandb="cmacc"), options={"objective.tau": 0.1})
        tell(log, step)
        log.close()
        assert fake.seen[1:] == [("step", ""), ("*", "step"), {"step": step, "loss": step / 4, "held_out/R@1": 0.5}, "finish"]
        begun.append(fake.seen[0])
    assert begun[0] == begun[1]
    assert begun[0]["project"] == "cmacc" and begun[0]["resume"] == "allow" and begun[0]["config"] == {"objective.tau": 0.1}
    assert begun[0]["id"] == (tmp_path / "wandb.id").read_text() and len(begun[0]["id"]) == 12


def test_weights_and_biases_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the package the run does not begin; without the network or an account it does."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb is not installed; pip install wandb, or leave it out"):
        RunLog(tmp_path, config=LogConfig(wandb="cmacc"))
    monkeypatch.setitem(sys.modules, "wandb", FakeWandB(ConnectionError("no route")))
    with caplog.at_level(logging.WARNING):
        log = RunLog(tmp_path, config=LogConfig(wandb="cmacc"))
        tell(log, 1)
        log.close()
    assert ["no route" in record.getMessage() for record in caplog.records] == [True]
    assert [record["step"] for record in lines(tmp_path)] == [1]
