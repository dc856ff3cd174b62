"""A run and what may befall it: signals at any moment, kills, disks that are full, encoders that collapse."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import ranks_of
from train_data import TINY
from train_runs import assert_same, assert_tensorboard, last_of, records

from cmacc.train.config import PretrainConfig, change, from_json, to_json
from cmacc.train.contrast import objective
from cmacc.train.contrast.losses import LossParts
from cmacc.train.networks import compute
from cmacc.train.pretrain import pretrain
from cmacc.train.running import checkpoint
from cmacc.train.running.metrics import MetricsLog
from cmacc.train.running.preemption import Preempted

PLACES = {
    "start": "cmacc.train.pretrain.open_sources",
    "first batch": "cmacc.train.loading.loader.TrainingLoader._begin",
    "step": "cmacc.train.step.TrainingStep._backward",
    "evaluation": "cmacc.train.evaluation.retrieval.evaluation_batches",
    "saving": "cmacc.train.running.checkpoint.write",
    "compiling": "test_train_survives.compiler",
    "joining": "torch.distributed.init_process_group",
}


pytestmark = pytest.mark.usefixtures("on_a_cpu")


def hold(place: str, call: int, seconds: float, here: Path) -> None:
    """Let the `call`th call of a function of ours last so much longer, and make the file `here` when it begins."""
    import pkgutil

    owner_name, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    function, calls = getattr(owner, name), 0

    def held(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            here.touch()
            time.sleep(seconds)
        return function(*arguments, **options)

    setattr(owner, name, held)


def compiler(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
    """In the place of torch's own, where `compute.compile` is on."""
    return graph


def trains_held(data: str, run: str, config: str, place: str, call: int, seconds: float) -> None:
    """What a process of its own does. What it says goes to the file RUN.said."""
    logging.basicConfig(filename=f"{run}.said", level=logging.INFO)
    torch.set_num_threads(1)
    compute.COMPILER = lambda *given: compiler(*given)  # type: ignore[assignment]
    if place == PLACES["joining"]:
        os.environ["WORLD_SIZE"] = "2"  # of which the other never comes
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as `cmacc` has it: what C waits for keeps Python from it
    hold(place, call, seconds, Path(f"{run}.here"))
    try:
        pretrain(data, Path(run), from_json(json.loads(config)))
    except Preempted as left:
        logging.info("%s", left)
        sys.exit(143)


Begin = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def begin() -> Iterator[Begin]:
    """`begin(data, run, config, place, call, seconds, number, after_s)`: the exit status of a run that is held there and sent a
    signal so long after it came there, and what it said."""
    with ranks_of("test_train_survives") as start:

        def run_it(
            data: str, run: Path, config: PretrainConfig, place: str, call: int, seconds: float, number: int, after_s: float = 0.0
        ) -> tuple[int, str]:
            def send(pids: list[int]) -> None:
                here, deadline = Path(f"{run}.here"), time.monotonic() + 40
                while not here.exists():
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                time.sleep(after_s)
                os.kill(pids[0], number)

            text = json.dumps(to_json(config))
            (code,) = start(1, "trains_held", data, str(run), text, PLACES[place], call, seconds, began=send)
            return code, Path(f"{run}.said").read_text()

        yield run_it


@pytest.mark.parametrize(
    ("place", "call", "number"),
    [
        ("start", 1, signal.SIGTERM),
        ("first batch", 1, signal.SIGUSR1),
        ("step", 8, signal.SIGTERM),
        ("evaluation", 2, signal.SIGTERM),
        ("saving", 1, signal.SIGTERM),
        ("saving", 3, signal.SIGUSR1),
    ],
)
def test_a_signal_anywhere_saves_and_leaves(
    begin: Begin, tiny_data: str, tiny_run: Path, tmp_path: Path, place: str, call: int, number: signal.Signals
) -> None:
    """While it opens its data, waits for clips, is inside a step, evaluates, writes a checkpoint."""
    run = tmp_path / "run"
    code, said = begin(tiny_data, run, TINY, place, call, 0.7, number)
    assert code == 143, said
    assert "the same command continues" in said
    saved = last_of(run)
    assert saved.step == {"step": 8, "evaluation": 6, "start": 0, "first batch": 0}.get(place, saved.step)
    pretrain(tiny_data, run, TINY)
    assert_same(run, tiny_run)


@pytest.mark.parametrize(("place", "call", "step"), [("step", 1, 0), ("step", 8, 6), ("saving", 3, 3)])
def test_a_run_that_hangs_leaves_in_time(begin: Begin, tiny_data: str, tmp_path: Path, place: str, call: int, step: int) -> None:
    """As in a compilation, a collective, a store that does not answer: what was saved before is what stays, as after a kill."""
    run = tmp_path / "run"
    config = change(TINY, {"checkpoint.grace_s": 1.5})
    code, said = begin(tiny_data, run, config, place, call, 600, signal.SIGTERM, after_s=1.0)  # the save before it is through
    assert code == 143, said
    assert "has not saved within 1.5 s" in said
    assert last_of(run).step == step


def test_a_signal_while_it_compiles(begin: Begin, tiny_data: str, tmp_path: Path) -> None:
    """Which may take minutes of the first step: it is the step that is saved."""
    config = change(TINY, {"compute.compile": "on", "eval_clips": 1})  # of one clip nothing can be told: no evaluation
    code, said = begin(tiny_data, tmp_path / "run", config, "compiling", 1, 0.7, signal.SIGTERM)
    assert code == 143, said
    assert last_of(tmp_path / "run").step == 1


def test_a_signal_while_it_waits_for_other_machines(begin: Begin, tiny_data: str, tmp_path: Path) -> None:
    """They may come half an hour later, or never."""
    config = change(TINY, {"checkpoint.grace_s": 1.0})
    code, said = begin(tiny_data, tmp_path / "run", config, "joining", 1, 0, signal.SIGTERM, after_s=0.5)
    assert code == 143, said
    assert "SIGTERM: the run has not saved within 1 s (it was in " in said


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killed_at_a_random_moment(begin: Begin, tiny_data: str, tiny_run: Path, tmp_path: Path, seed: int) -> None:
    """Kill -9; losses, picks, final weights, pools and log are those of the unbroken run, bit for bit."""
    rng = np.random.default_rng(seed)
    run, place = tmp_path / "run", ("step", "saving", "evaluation")[seed]
    call = int(rng.integers(2, {"step": 12, "saving": 4, "evaluation": 3}[place]))
    code, said = begin(tiny_data, run, TINY, place, call, 0.5, signal.SIGKILL, float(rng.uniform(0, 0.4)))
    assert code == -signal.SIGKILL, said
    stood_at = max((record["step"] for record in MetricsLog.read(run / "metrics.jsonl")), default=0)
    steps: list[int] = []
    pretrain(tiny_data, run, TINY, lambda step, _: steps.append(step))
    assert steps[0] <= stood_at + 1
    assert steps[-1] == 12
    assert_same(run, tiny_run)
    assert_tensorboard(run)


def test_a_full_disk_does_not_stop_the_run(
    tiny_data: str, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so, the checkpoint before it stays whole, and later ones are written when there is room again."""
    write, found = checkpoint.write, []

    def full(there: Any, step: int, *more: Any) -> Any:
        found.append((step, last_of(tmp_path).step if step else None))
        if step in (6, 9):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(there, step, *more)

    monkeypatch.setattr(checkpoint, "write", full)
    pretrain(tiny_data, tmp_path, TINY)
    assert found == [(0, None), (3, 0), (6, 3), (9, 3), (12, 3)]
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [s.split(" could")[0] for s in said] == ["step 6", "step 9"]
    assert all("No space left on device" in s and "the run goes on, the one of step 3 stays the latest" in s for s in said)
    assert records(tmp_path) == records(tiny_run)
    assert last_of(tmp_path).step == 12


def test_when_the_last_checkpoint_cannot_be_written_the_run_says_so(
    tiny_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint.write

    def full(there: Any, step: int, *more: Any) -> Any:
        if step == 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(there, step, *more)

    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.raises(OSError, match="No space left on device"):
        pretrain(tiny_data, tmp_path, TINY)
    assert last_of(tmp_path).step == 9


@pytest.mark.parametrize("action", ["stop", "warn"])
def test_a_collapse_is_told(
    tiny_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, action: str
) -> None:
    """Provoked: no negatives, no momentum, so that the two encoders only run to each other."""

    def pull(query: torch.Tensor, positive: torch.Tensor, *_: Any) -> LossParts:
        nothing = torch.zeros(())
        return LossParts((query - positive).square().sum(1).mean(), nothing, nothing)

    monkeypatch.setattr(objective, "info_nce", pull)
    changes = {"objective.momentum": 0.0, "objective.selector": "fifo", "optimiser.rate": 3e-3, "optimiser.cosine": False}
    alarm = {"alarm.collapse": action, "alarm.warmup": 0, "alarm.patience": 3}
    config = change(TINY, {**changes, **alarm, "steps": 60, "eval_every": 60, "checkpoint.steps": 20})
    if action == "stop":
        with pytest.raises(FloatingPointError, match=r"the queries have collapsed .* at step \d+.*keeps its last checkpoint"):
            pretrain(tiny_data, tmp_path, config)
        assert 3 <= records(tmp_path)[-1]["step"] < 60
    else:
        pretrain(tiny_data, tmp_path, config)
        assert [r for r in caplog.records if "the queries have collapsed" in r.getMessage()]
