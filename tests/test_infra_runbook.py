"""The runbook (infra/README.md): what it names is there, and its local commands work as they are written."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from pathlib import Path

import click
import pytest
import typer
import yaml
from servers import free_port, running

from cmacc.flows.cli import app
from cmacc.ingest import IngestConfig
from cmacc.shards.options import names_of
from cmacc.train.config import PretrainConfig

REPOSITORY = Path(__file__).resolve().parents[1]
RUNBOOK = REPOSITORY / "infra" / "README.md"
TEXT = RUNBOOK.read_text()
FENCED = re.compile(r"^ *```(bash[a-z ]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
PROSE = FENCED.sub("", TEXT)
SPANS = re.findall(r"`([^`\n]+)`", PROSE)
CODE = [path.read_text() for room in ("flows", "ingest", "shards", "train") for path in (REPOSITORY / room).rglob("*.py")]


def blocks(kind: str) -> list[str]:
    return [code for info, code in FENCED.findall(TEXT) if info == kind]


def commands() -> Iterator[list[str]]:
    """Words of every `cmacc` command in the runbook, of its blocks and in its sentences."""
    lines = [line for _, code in FENCED.findall(TEXT) for line in code.replace("\\\n", " ").splitlines()]
    for line in [*lines, *SPANS]:
        for part in re.split(r"&&|;| & *$", line):
            if part.strip().startswith("cmacc "):
                yield shlex.split(part, comments=True)[1:]


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)]+)\)", TEXT))))
def test_what_is_linked_is_there(target: str) -> None:
    path, _, anchor = target.partition("#")
    page = (RUNBOOK.parent / path).resolve() if path else RUNBOOK
    assert page.exists(), f"{target} leads nowhere"
    assert not anchor or anchor in anchors(page)


def test_files_named_in_sentences_and_commands_are_there() -> None:
    named = set(re.findall(r"\binfra/[\w./-]+\w", TEXT)) | {f"infra/{name}" for name in SPANS if name.startswith("bench/")}
    missing = [name for name in sorted(named - {"infra/compose.env"}) if not (REPOSITORY / name).exists()]
    assert named and not missing


def test_commands_and_their_options_exist() -> None:
    root = typer.main.get_command(app)
    assert isinstance(root, click.Group) or hasattr(root, "commands")
    seen = set()
    for words in commands():
        command, rest = root, list(words)
        while rest and rest[0] in getattr(command, "commands", {}):
            command = command.commands[rest.pop(0)]  # type: ignore[attr-defined]
        assert command is not root, f"there is no command cmacc {' '.join(words)}"
        seen.add(words[0])
        if words[0] == "run":
            continue  # what follows is Prefect's
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        unknown = [word for word in rest if word.startswith("--") and word not in known]
        assert not unknown, f"cmacc {' '.join(words)}: there is no {unknown[0]}"
    assert {"plan", "server-setup", "ingest", "reshard", "pretrain", "lint", "status"} <= seen


def test_options_of_a_run_exist() -> None:
    known = {*names_of(PretrainConfig), *names_of(IngestConfig)}
    groups = {field.name for field in fields(PretrainConfig) if is_dataclass(field.default_factory)}
    named = re.findall(r"\b([a-z_]+\.[a-z_]+)\b(?=[=`])", TEXT)
    named = [name for name in named if name.partition(".")[0] in groups]
    assert "checkpoint.at" in named
    assert [name for name in named if name not in known] == []
    given = re.findall(r"--set ([\w.]+)=", TEXT)
    assert given and [name for name in given if name not in known] == []


def test_variables_of_the_environment_are_read() -> None:
    named = set(re.findall(r"\bCMACC_\w+", TEXT))
    assert named and [name for name in named if not any(name in code for code in CODE)] == []


def test_deployments_exist() -> None:
    known = {
        f"{entry['entrypoint'].rpartition(':')[2].replace('_', '-')}/{entry['name']}"
        for entry in yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]
    }
    named = re.findall(r"cmacc run ([\w-]+/[\w-]+)", TEXT)
    assert named and [name for name in named if name not in known] == []


def test_warnings_are_quoted_as_they_are() -> None:
    table = TEXT.partition("| it says |")[2].partition("\n\n")[0]
    quoted = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert len(quoted) > 5
    for quote in quoted:
        pieces = [piece.strip(" ;:") for piece in re.split(r"…|\d+|\(", quote)]
        pieces = [piece for piece in pieces if len(piece) > 5]
        assert pieces and all(any(piece in code for code in CODE) for piece in pieces), quote


def test_exit_statuses_are_those_of_the_code() -> None:
    from cmacc.flows import agent

    told = dict(re.findall(r"^\| (\d+) \| (.*?) \|", TEXT.partition("| status |")[2].partition("\n\n")[0], re.MULTILINE))
    assert {str(agent.AGAIN), str(agent.STOPPED)} < set(told) and "agent" in told[str(agent.AGAIN)]
    wrong = subprocess.run([Path(sys.executable).with_name("cmacc"), "lint"], capture_output=True, check=False, timeout=300)
    assert str(wrong.returncode) in told and wrong.returncode == 2


@pytest.mark.long
def test_local_commands_as_written(tmp_path: Path) -> None:
    """In the order of the page, in one shell, in a folder of their own; only the bucket's port is another."""
    port = free_port()
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect"), "COLUMNS": "200"}
    for name in [name for name in environment if name.startswith("AWS_")]:
        del environment[name]
    activate = "source .venv/bin/activate"
    path = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"

    def here(code: str) -> str:
        return (
            code.replace("127.0.0.1:5000", f"127.0.0.1:{port}").replace("--port 5000", f"--port {port}").replace(activate, path)
        )

    (server,) = blocks("bash local server")
    log = tmp_path / "server.log"
    with ExitStack() as stack:
        process = stack.enter_context(running(["bash", "-ec", here(server)], environment, log))
        _wait(port, process, log)
        script = "\n".join(["set -eo pipefail", *map(here, blocks("bash local"))])
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=3000
        )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "exit status 143" in said and "saved at step" in said
    assert said.count("no fault") == 3
    first, second = re.findall(r"fingerprint\W+([0-9a-f]{64})", said)[-2:]
    assert first == second
    assert '"step": 24,' in (tmp_path / "runs/try/run/metrics.jsonl").read_text()


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        assert process.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    pytest.fail(f"no bucket:\n{log.read_text()}")
