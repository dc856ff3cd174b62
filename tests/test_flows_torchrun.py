"""Ranks by torchrun inside a command: they die with it, leave in order when it is told to, and their sentence is its own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY, Cmacc

from cmacc.flows import torchrun
from cmacc.train.config import change, recipe
from cmacc.train.pretrain import pretrain
from cmacc.train.running.checkpoint import find_checkpoint, load
from cmacc.train.running.metrics import MetricsLog

TINY = (
    "log_every=1", "eval_every=1000", "checkpoint.steps=5", "train.batch=4", "view.frames=4", "view.size=24", "view.view_s=0.3",
    "objective.dictionary=16", "objective.candidates=32", "loader.threads=1", "loader.ahead=1",
)  # fmt: skip
NODES = {"steps": 8, "encoders.norm": "group", "optimiser.rate": 3e-4, "objective.share_start": 4, "objective.share_ramp": 0}
"""No coupling inside a batch; picks from the fourth step on."""


@pytest.fixture
def begun(cmacc: Cmacc, tiny_data: str, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`begun(steps)` starts `cmacc pretrain … --ranks 2`; what is left of it in the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(steps: int) -> subprocess.Popen[str]:
        options = [part for option in (*TINY, f"steps={steps}") for part in ("--set", option)]
        process = subprocess.Popen(
            cmacc.command("pretrain", tiny_data, "--out", tmp_path / "run", "--ranks", 2, *options), env=cmacc.environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
    for member in family(tmp_path):
        member.kill()


def family(run: Path) -> list[psutil.Process]:
    """All processes whose command names the run."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(run) in part for part in process.info["cmdline"] or ()):
            found.append(process)
    return found


def steps(run: Path) -> list[int]:
    return [record["step"] for record in MetricsLog.read(run / "metrics.jsonl") if "loss/total" in record]


def until(true: Callable[[], object], process: subprocess.Popen[str] | None = None, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it does not come to that"
        time.sleep(0.1)


@pytest.mark.long
def test_killed_they_die_with_it_and_told_to_they_leave_and_it_goes_on(
    begun: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """kill -9 of the command alone: no rank trains on. SIGTERM: saved, exit status 143. Then the same command to its end."""
    run = tmp_path / "run"
    first = begun(100_000)
    until(lambda: len(steps(run)) > 6, first)
    assert len(family(tmp_path)) == 4  # the command, the agent, two ranks
    first.kill()
    first.wait()
    until(lambda: not family(tmp_path), seconds=30)
    seen = len(steps(run))

    second = begun(100_000)
    until(lambda: len(steps(run)) > seen + 3, second)
    second.send_signal(signal.SIGTERM)
    said, _ = second.communicate(timeout=120)
    assert second.returncode == torchrun.STOPPED, said
    assert "the same command continues" in said.splitlines()[-1]
    until(lambda: not family(tmp_path), seconds=30)
    saved = load(find_checkpoint(run)).step
    assert saved == steps(run)[-1], "the very step at which it was told to leave"
    assert steps(run) == list(range(1, saved + 1)), "each step once"


@pytest.mark.long
def test_a_refusal_is_one_sentence(cmacc: Cmacc, tmp_path: Path) -> None:
    done = cmacc("pretrain", tmp_path / "nowhere", "--out", tmp_path / "run", "--ranks", 2, code=1)
    assert done.stderr.splitlines()[-1].startswith(f"cmacc: {tmp_path / 'nowhere'} does not exist; give the folder")
    assert "Traceback" not in done.stderr and done.stderr.count("does not exist") == 1


@pytest.mark.long
def test_two_at_once_on_one_run(
    begun: Callable[..., subprocess.Popen[str]], cmacc: Cmacc, tiny_data: str, tmp_path: Path
) -> None:
    first = begun(100_000)
    until(lambda: steps(tmp_path / "run"), first)
    options = [part for option in (*TINY, "steps=100000") for part in ("--set", option)]
    done = cmacc("pretrain", tiny_data, "--out", tmp_path / "run", *options, code=1)
    assert "another writer is at work on" in done.stderr


@pytest.mark.long
def test_many_nodes_as_the_readme_has_it(cmacc: Cmacc, tiny_data: str, tmp_path: Path) -> None:
    """The same command on each of two, which are agents of this machine: all saved, and the losses are those of one process."""
    config = [f"{name}={value}" for name, value in NODES.items()]
    options = [part for option in (*TINY, *config) for part in ("--set", option)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    readme = re.search(r"torchrun --nnodes 4 .*?--recipe paper", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert readme
    ours = {
        "torchrun": "-m torch.distributed.run", "--nnodes 4": "--nnodes 2", "--nproc-per-node 8": "--nproc-per-node 1",
        "10.0.0.1:29500": f"127.0.0.1:{port}", "s3://bucket/audioset": tiny_data, "/shared/runs/first": str(tmp_path / "run"),
        "--recipe paper": "--recipe small-cpu", "\\\n": " ",
    }  # fmt: skip
    text = readme[0]
    for theirs, here in ours.items():
        assert theirs in text
        text = text.replace(theirs, here)
    environment = {**cmacc.environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    agents = []
    try:
        for node in range(2):
            with (tmp_path / f"said.{node}").open("w") as said:
                agents.append(
                    subprocess.Popen([sys.executable, *text.split(), *options], env=environment, stdout=said, stderr=said)
                )
        codes = [agent.wait(400) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    assert codes == [0, 0], [(tmp_path / f"said.{node}").read_text() for node in range(2)]
    assert load(find_checkpoint(tmp_path / "run")).step == NODES["steps"]
    chosen = change(recipe("small-cpu"), dict(option.split("=") for option in (*TINY, *config)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        pretrain(tiny_data, tmp_path / "alone", chosen)
    two, one = (
        [record["loss/total"] for record in MetricsLog.read(tmp_path / run / "metrics.jsonl") if "loss/total" in record]
        for run in ("run", "alone")
    )
    assert len(two) == NODES["steps"]
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize(
    ("code", "error", "match"),
    [
        ("print('cmacc: the sentence; mend it'); sys.exit(1)", ValueError, "^the sentence; mend it$"),
        ("print('INFO\\tall is well'); print('no more memory'); sys.exit(7)", RuntimeError, "exit status 7:\nno more memory"),
        ("print('cmacc: saved at step 3'); sys.exit(143)", torchrun.Stopped, "^saved at step 3$"),
        ("os.kill(os.getpid(), 9)", RuntimeError, "exit status -9"),
    ],
)
def test_how_it_ends(
    code: str, error: type[Exception], match: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that stands in for torchrun's."""
    caplog.set_level("INFO")
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **given: real([sys.executable, "-uc", f"import os, sys; {code}"], **given))
    looks: list[None] = []
    with pytest.raises(error, match=match):
        torchrun.launch([], 1, lambda: looks.append(None), every_s=0.05)
    assert looks
    assert [record.getMessage() for record in caplog.records] == (["all is well"] if "well" in code else [])


def test_sigusr1_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And standard input is closed: a rank that asks must not take the terminal."""
    code = "; ".join(
        [
            "import signal, sys, time, pathlib",
            "signal.signal(signal.SIGUSR1, lambda *_: (print('cmacc: saved'), sys.exit(143)))",
            f"assert sys.stdin.read() == '' and not pathlib.Path({str(tmp_path / 'up')!r}).touch()",
            "time.sleep(60)",
        ]
    )
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **given: real([sys.executable, "-uc", code], **given))

    def look() -> None:
        if (tmp_path / "up").exists():
            (tmp_path / "up").unlink()
            os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.raises(torchrun.Stopped, match=r"^saved$"):
        torchrun.launch([], 1, look, every_s=0.2)
