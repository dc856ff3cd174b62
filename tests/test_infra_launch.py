"""infra/sky, infra/slurm, infra/systemd: read by their own tools, and what starts again when a run has left."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cmacc.flows import torchrun
from cmacc.flows.agent import AGAIN, STOPPED
from cmacc.train.running.checkpointer import CheckpointConfig

INFRA = Path(__file__).parents[1] / "infra"
SBATCH, UNIT = INFRA / "slurm" / "pretrain.sbatch", INFRA / "systemd" / "cmacc-pretrain.service"
TASKS = {
    "ingest": {"LISTS": "s3://my-bucket/lists", "OUT": "s3://my-bucket/audioset"},
    "pretrain": {"DATA": "s3://my-bucket/audioset", "RUNS": "s3://my-bucket/runs", "NAME": "first"},
}
SKYPILOT = "skypilot==0.14.1"
"""In an environment of its own: it wants an older click than ours."""


def task(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((INFRA / "sky" / f"{name}.yaml").read_text())
    return found


def shellcheck(script: str) -> None:
    command = [str(Path(sys.executable).with_name("shellcheck")), "--severity=style", "-"]
    done = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def on_path(folder: Path, **commands: str) -> dict[str, str]:
    """An environment whose first commands are these scripts; what each was given is in `folder`/NAME.given, a word a line."""
    bin = folder / "bin"
    bin.mkdir()
    for name, script in commands.items():
        (bin / name).write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" >> {folder}/{name}.given\n{script}\n')
        (bin / name).chmod(0o755)
    return {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}", "HOME": str(folder)}


def given(folder: Path, name: str) -> list[str]:
    file = folder / f"{name}.given"
    return file.read_text().splitlines() if file.exists() else []


def as_torchrun(words: list[str]) -> Any:
    """What torchrun understands of what follows `cmacc.flows.agent`."""
    from torch.distributed.run import parse_args

    return parse_args(words[words.index("cmacc.flows.agent") + 1 :])


# --- shell ---


@pytest.mark.parametrize("script", [SBATCH, INFRA.parent / ".ci" / "run"], ids=lambda path: path.name)
def test_scripts_are_good_shell(script: Path) -> None:
    shellcheck(script.read_text())


@pytest.mark.parametrize(("name", "part"), [(name, part) for name in TASKS for part in ("setup", "run")])
def test_tasks_are_good_shell(name: str, part: str) -> None:
    variables = [*task(name)["envs"], "SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NUM_GPUS_PER_NODE"]
    shellcheck("#!/usr/bin/env bash\n" + "".join(f"export {v}\n" for v in variables) + task(name)[part])


# --- SkyPilot ---


@pytest.mark.parametrize("name", TASKS)
def test_a_task_recovers_from_what_is_no_failure(name: str) -> None:
    recovery = task(name)["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [AGAIN, STOPPED]
    assert task(name)["resources"]["use_spot"] is True
    assert {key for key, value in task(name)["envs"].items() if value is None} == set(TASKS[name]), "these must be given"


def test_a_task_trains_on_all_its_nodes(tmp_path: Path) -> None:
    """Its script as it stands, with a python that only says what it was given."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    environment = on_path(tmp_path, python="")
    (tmp_path / "bin" / "python").rename(tmp_path / ".venv" / "bin" / "python")
    environment |= {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    environment |= {**TASKS["pretrain"], "RECIPE": "paper"}
    subprocess.run(["bash", "-c", task("pretrain")["run"]], cwd=tmp_path, env=environment, check=True)
    found = as_torchrun(given(tmp_path, "python"))
    assert (found.nnodes, found.nproc_per_node, found.rdzv_endpoint, found.max_restarts) == ("2", "8", "10.0.0.7:29400", 0)
    assert found.training_script_args[-1] == "--set=checkpoint.at=s3://my-bucket/runs/first/checkpoints"
    assert "--out=/runs/first" in found.training_script_args and "/runs" in task("pretrain")["file_mounts"]


def test_a_task_ingests_the_lists_that_are_missing(tmp_path: Path) -> None:
    """Its script, with a `cmacc` that knows of one data set, and fails at the third list."""
    (tmp_path / "lists").mkdir()
    for name in ("a.csv", "b.csv", "c.csv"):
        (tmp_path / "lists" / name).touch()
    script = f"""
case "$1 $2" in
  "inspect out/a") exit 0 ;;
  inspect*) exit 1 ;;
  *c.csv) exit {STOPPED} ;;
  ingest*) mkdir -p "$4" ;;
esac"""
    environment = on_path(tmp_path, cmacc=script) | {"LISTS_FOLDER": str(tmp_path / "lists"), "OUT": "out", "SPLIT": "train"}
    done = subprocess.run(["bash", "-c", task("ingest")["run"]], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == STOPPED
    words = " ".join(given(tmp_path, "cmacc"))
    assert "a.csv" not in words and f"ingest train={tmp_path}/lists/b.csv" in words
    assert words.index("reshard") < words.index("c.csv") and "--out out/b" in words
    assert not (tmp_path / "clips" / "b").exists(), "what is in the bucket takes no room any more"


@pytest.mark.long
def test_skypilots_own_loader_reads_the_tasks(tmp_path: Path) -> None:
    uv, home = (
        str(Path(sys.executable).with_name("uv")),
        {**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
    )
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "sky"], check=True)
    python = str(tmp_path / "sky" / "bin" / "python")
    had = subprocess.run(
        [uv, "pip", "install", "--quiet", "--python", python, SKYPILOT], capture_output=True, text=True, check=False
    )
    if had.returncode:
        pytest.skip(f"SkyPilot is not to be had here: {had.stderr.strip().splitlines()[-1]}")
    code = (
        "import json, sys, yaml, sky\n"
        "t = sky.Task.from_yaml_config(yaml.safe_load(open(sys.argv[1])), env_overrides=list(json.loads(sys.argv[2]).items()))\n"
        "t.validate()\n"
        "print(json.dumps([t.name, t.num_nodes, all(r.use_spot for r in t.resources), sorted(t.storage_mounts), t.envs]))"
    )
    for name, mounts in {"ingest": ["/lists"], "pretrain": ["/runs"]}.items():
        command = [python, "-c", code, str(INFRA / "sky" / f"{name}.yaml"), json.dumps(TASKS[name])]
        done = subprocess.run(command, capture_output=True, text=True, env=home, cwd=INFRA.parent, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout.splitlines()[-1])
        assert found[:4] == [f"cmacc-{name}", 1, True, mounts]
        assert TASKS[name].items() <= found[4].items()


# --- Slurm ---


@pytest.mark.parametrize("status", [0, 1, 2, AGAIN, STOPPED])
def test_a_batch_job_goes_back_into_the_queue(tmp_path: Path, status: int) -> None:
    """The script as it stands, with an `srun` that ends so, and a `scontrol` that knows two nodes."""
    scontrol = 'if [ "$1" = show ]; then echo gpu-7; echo gpu-8; fi'
    environment = on_path(tmp_path, srun=f"exit {status}", scontrol=scontrol)
    environment |= {"SLURM_JOB_ID": "42", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "gpu-[7-8]", "DATA": "d", "RUN": "/shared/r"}
    done = subprocess.run(["bash", str(SBATCH)], env=environment, check=False)
    assert done.returncode == status
    requeued = "requeue 42" in " ".join(given(tmp_path, "scontrol"))
    assert requeued == (status in (AGAIN, STOPPED))
    found = as_torchrun(given(tmp_path, "srun"))
    assert (found.nnodes, found.nproc_per_node, found.rdzv_endpoint) == ("2", "gpu", "gpu-7:29400")
    assert found.training_script_args[:2] == ["pretrain", "d"]


def test_a_batch_job_without_its_data_says_so(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DATA"}
    done = subprocess.run(["bash", str(SBATCH)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode and "DATA is not set; give the data set" in done.stderr.replace(": ", " ")


def test_a_batch_job_is_told_in_time() -> None:
    """By a signal to its steps (no `B:`), earlier than saving takes; one task a node; Slurm itself may requeue it too."""
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", SBATCH.read_text(), re.MULTILINE))
    signal, _, seconds = options["signal"].partition("@")
    assert signal == "USR1" and int(seconds) > CheckpointConfig().grace_s
    assert options["ntasks-per-node"] == "1" and "requeue" in options and options["open-mode"] == "append"


# --- systemd ---


def unit(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return parser


def test_the_unit_is_one_for_systemd(tmp_path: Path) -> None:
    """With a command that is there; systemd looks for it."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze, which comes with systemd alone")
    file = tmp_path / UNIT.name
    file.write_text(UNIT.read_text().replace("/srv/cmacc/.venv/bin/cmacc", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(file)], capture_output=True, text=True, check=False)
    mine = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert not mine and done.returncode == 0, done.stderr


def test_the_unit_starts_again_what_saved_and_left() -> None:
    service = unit(UNIT.read_text())["Service"]
    assert service["RestartForceExitStatus"].split() == [str(AGAIN), str(STOPPED)]
    assert service["SuccessExitStatus"] == str(STOPPED) and service["RestartPreventExitStatus"] == "2"
    assert service["User"] not in ("", "root", "0")
    assert CheckpointConfig().grace_s < torchrun._LEAVE_S < int(service["TimeoutStopSec"])
    assert service["KillMode"] == "mixed", "a signal to the ranks is the command's own"
