"""infra/compose.yaml by the specification's schema and by Docker Compose itself, which reads it without an engine."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import compose
import pytest
from infra_files import INFRA, REPOSITORY

COMPOSE = Path(compose.__file__).with_name("docker-compose")
PUBLISHED = "dba9d98e1ba5bfe11d88c99b9bd32fc4a0624a30fafe68eea34d61a3e42fd372"
"""Docker's own checksum of docker-compose-linux-x86_64 2.40.3: the wheel is another's."""
EXAMPLE = INFRA / "compose.env.example"
REQUIRED = ("CMACC_POSTGRES_PASSWORD", "CMACC_PREFECT_PASSWORD", "CMACC_S3_ACCESS_KEY", "CMACC_S3_SECRET_KEY")


def config(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    assert hashlib.sha256(COMPOSE.read_bytes()).hexdigest() == PUBLISHED
    command = [COMPOSE, "--file", INFRA / "compose.yaml", *arguments, "config", "--format", "json"]
    return subprocess.run(command, env={"PATH": "/usr/bin:/bin", **variables}, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    done = config("--profile", "gpu", **{name: f"x{number}" for number, name in enumerate(REQUIRED)})
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["services"]
    return found


def test_it_is_as_the_specification_says() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", INFRA / "compose.yaml"]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize("missing", REQUIRED)
def test_without_a_password_it_refuses(missing: str) -> None:
    for given in ({}, {missing: ""}):
        done = config(**{name: "x" for name in REQUIRED if name != missing}, **given)
        assert done.returncode != 0
        assert re.search(rf"{missing}.* set it in infra/compose.env; it (guards|is) ", done.stderr), done.stderr


def test_the_example_guards_nothing_by_default() -> None:
    lines = dict(line.split("=", 1) for line in EXAMPLE.read_text().splitlines() if "=" in line and not line.startswith("#"))
    assert lines == dict.fromkeys(REQUIRED, "")
    named = set(re.findall(r"\$\{(\w+)", (INFRA / "compose.yaml").read_text()))
    assert named == set(re.findall(r"^#?(CMACC_\w+)=", EXAMPLE.read_text(), re.M)), "the example names them all"
    assert "infra/compose.env" in (REPOSITORY / ".gitignore").read_text().split()


def test_all_that_was_asked_for_is_there(services: dict[str, Any]) -> None:
    assert set(services) == {"postgres", "prefect-server", "setup", "worker", "trainer", "tensorboard", "s3"}
    assert set(json.loads(config(**dict.fromkeys(REQUIRED, "x")).stdout)["services"]) == set(services) - {"trainer"}
    (gpu,) = services["trainer"]["deploy"]["resources"]["reservations"]["devices"]
    assert (gpu["driver"], gpu["capabilities"]) == ("nvidia", ["gpu"])
    built = {service["image"]: service["build"]["target"] for service in services.values() if "build" in service}
    assert built == {"cmacc/worker:0.1.0": "worker", "cmacc/trainer:0.1.0": "trainer"}
    assert all(service["image"] in built for service in services.values() if service["image"].startswith("cmacc/"))


def test_each_is_known_to_be_well_before_others_lean_on_it(services: dict[str, Any]) -> None:
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            ended = how["condition"] == "service_completed_successfully"
            assert ended == (other == "setup"), f"{name} waits for {other}"
            assert ended or "test" in services[other]["healthcheck"]


def test_nothing_runs_as_root_or_is_open(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert int(service["user"].split(":")[0]) > 0, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "network_mode", "pid", "cap_add", "devices"} & set(service), name
        assert {port["host_ip"] for port in service.get("ports", ())} <= {"127.0.0.1"}, name
        assert not any(volume["source"].endswith(".sock") for volume in service.get("volumes", ())), name
