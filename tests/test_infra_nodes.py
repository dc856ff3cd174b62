"""A run and its pods, with real processes: the Job's own command line, as machines that join, are preempted and come back."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from servers import free_port
from train_data import clips, write_dataset

from cmacc.flows.agent import AGAIN, STOPPED
from cmacc.train.running.checkpoint import latest, load
from cmacc.train.running.metrics import MetricsLog

RUN = Path(__file__).parents[1] / "infra" / "kubernetes" / "pretrain"
TINY = (
    "steps=100000", "log_every=1", "eval_every=100000", "checkpoint.steps=5", "train.batch=4", "view.frames=4", "view.size=24",
    "view.view_s=0.3", "objective.dictionary=16", "objective.candidates=32", "loader.threads=1", "loader.ahead=1",
)  # fmt: skip


class Pods:
    """Pods of the Job as processes of this machine: its arguments as they stand, with `$(NAME)` filled in as the kubelet does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = write_dataset(folder / "data", clips()).url
        (job,) = [each for each in yaml.safe_load_all((RUN / "job.yaml").read_text()) if each["kind"] == "Job"]
        (self.container,) = job["spec"]["template"]["spec"]["containers"]
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, index: int, port: int) -> subprocess.Popen[bytes]:
        given = dict(re.findall(r"^(\w+)=(.*)$", (RUN / "run.env").read_text(), re.MULTILINE))
        given |= {"DATA": self.data, "CHECKPOINTS": str(self.folder / "checkpoints"), "RECIPE": "small-cpu", "RANKS": "1"}
        given |= {"RENDEZVOUS": f"127.0.0.1:{port}"}
        arguments = [re.sub(r"\$\((\w+)\)", lambda m: given[m[1]], a) for a in self.container["args"]]
        arguments = [a.replace("/runs/", f"{self.run(index).parent}/") for a in arguments]
        options = [part for option in TINY for part in ("--set", option)]
        with (self.folder / f"log-{index}").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *self.container["command"][1:], *arguments, *options], stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        self.started.append(process)
        return process

    def run(self, index: int) -> Path:
        return self.folder / f"pod-{index}" / "pretrain"

    def steps(self) -> list[int]:
        """That were logged, on whichever pod rank 0 is."""
        logs = [self.run(index) / "metrics.jsonl" for index in (0, 1)]
        return sorted(record["step"] for log in logs for record in MetricsLog.read(log) if "loss/total" in record)

    def family(self) -> list[psutil.Process]:
        every = psutil.process_iter(["cmdline"])
        return [p for p in every if any(str(self.folder) in part for part in p.info["cmdline"] or ())]

    def ranks(self, index: int) -> int:
        of_run = [p.info["cmdline"] for p in self.family() if any(str(self.run(index)) in part for part in p.info["cmdline"])]
        return sum("cmacc.flows.agent" not in words for words in of_run)

    def until(self, true: Callable[[], object], seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            logs = "\n".join(f.read_text()[-3000:] for f in self.folder.glob("log-*"))
            assert time.monotonic() < deadline, f"it does not come to that\n{logs}"
            time.sleep(0.2)


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[Pods]:
    made = Pods(tmp_path)
    yield made
    for process in made.started:
        process.kill()
        process.wait()
    for member in made.family():
        member.kill()


@pytest.mark.long
def test_a_node_joins_is_preempted_and_all_go_on(pods: Pods) -> None:
    """One node alone; a second joins in mid-run; it is preempted: both save and leave with 143. New pods, whose disks are empty,
    go on from the checkpoint. No step is lost, none is made twice."""
    port = free_port()
    first = pods.start(0, port)
    pods.until(lambda: len(pods.steps()) > 3)
    second = pods.start(1, port)
    pods.until(lambda: pods.ranks(1))
    joined = pods.steps()[-1]
    pods.until(lambda: pods.steps()[-1] > joined + 3)
    second.send_signal(signal.SIGTERM)
    assert (second.wait(120), first.wait(120)) == (STOPPED, STOPPED)
    steps = pods.steps()
    saved = load(latest(pods.folder / "checkpoints") or "").step
    assert steps == list(range(1, saved + 1)), "each once: the second node is a rank of the run, not a run of its own"

    shutil.rmtree(pods.folder / "pod-0")
    shutil.rmtree(pods.folder / "pod-1")
    goes_on(pods, saved)


def goes_on(pods: Pods, saved: int) -> None:
    """Both nodes anew, on empty disks; then it is pod 0 that is preempted, where the others meet."""
    port = free_port()
    first, second = (pods.start(index, port) for index in (0, 1))
    pods.until(lambda: len(pods.steps()) > 3 or first.poll() is not None)
    assert (first.poll(), second.poll()) == (None, None), (pods.folder / "log-0").read_text()[-3000:]
    first.send_signal(signal.SIGTERM)
    assert first.wait(120) == STOPPED
    assert second.wait(120) in (STOPPED, AGAIN), "by its ranks, which left too, or because nobody is there to meet"
    steps = pods.steps()
    assert steps == list(range(saved + 1, load(latest(pods.folder / "checkpoints") or "").step + 1))
    pods.until(lambda: not pods.family())


def test_alone_it_ends_with_a_status_of_its_own(tmp_path: Path) -> None:
    """A node that nobody meets is to be started again; a wrong command line, and what is complete, are not."""
    agent = [sys.executable, "-m", "cmacc.flows.agent"]
    meet = [
        "--nnodes=2",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{free_port()}",
        "--rdzv-conf=join_timeout=1,read_timeout=1",
    ]
    wait = subprocess.run([*agent, *meet, "-m", "cmacc", "recipes"], capture_output=True, text=True, check=False)
    assert wait.returncode == AGAIN and "the machines of the run did not meet" in wait.stderr
    wrong = subprocess.run(
        [*agent, "--standalone", "-m", "cmacc", "recipes", "--nothing"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2, wrong.stderr
    whole = subprocess.run([*agent, "--standalone", "-m", "cmacc", "recipes"], capture_output=True, text=True, check=False)
    assert whole.returncode == 0, whole.stderr
