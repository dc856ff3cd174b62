"""The work, as a user would do it: clips to the bucket, new shards there, pretraining that streams them from it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import s3fs
from evidence import Evidence, batches_of, clips_of, curve_of
from nodes import Gang
from schedule import Kill
from services import Services
from striking import Struck, striking

from cmacc.ingest import Ledger
from cmacc.train.running.metrics import MetricsLog

BUCKET = "cmacc"
PARTS = 4
STEPS, CHECKPOINT_STEPS, BATCH = 42, 6, 16
_INGEST = {
    "short_side": 64, "fps": 16, "gop": 8, "shard_mb": 1, "workers": 1, "parts": PARTS, "videos_per_hour": 3600,
}  # fmt: skip
# Which of two twins came first depends on which worker was quicker, and it stands in the clip's json.
_INGEST_SET = {"checks.near_duplicate": "off"}
_RECIPE: dict[str, object] = {
    "steps": STEPS, "loader.batch": BATCH, "loader.streams": 6, "loader.threads": 1, "view.size": 48, "log_every": 1,
    "eval_every": STEPS // 2, "eval_clips": 24, "checkpoint.steps": CHECKPOINT_STEPS, "checkpoint.minutes": 0,
    "checkpoint.keep": STEPS, "objective.share_start": 6, "objective.share_ramp": 12, "distributed.checksum_every": 1,
    "log.tensorboard": "false",
}  # fmt: skip
_LIVES = 5


@dataclass
class Play:
    """One run of it all. name: of its data and runs; struck: the kills that befell it; costs: what it took, by name."""

    services: Services
    name: str
    lists: Sequence[str]
    url_template: str
    struck: list[Struck] = field(default_factory=list)
    costs: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.home = self.services.folder / self.name
        self.home.mkdir()
        self.url = f"s3://{BUCKET}/{self.name}"
        environment = self.services.environment
        self.files = s3fs.S3FileSystem(
            key=environment["AWS_ACCESS_KEY_ID"], secret=environment["AWS_SECRET_ACCESS_KEY"],
            client_kwargs={"endpoint_url": environment["AWS_ENDPOINT_URL"], "region_name": "us-east-1"}, skip_instance_cache=True,
        )  # fmt: skip

    # --- the work ---

    def ingest(self, kills: Sequence[Kill] = ()) -> None:
        """Two workers, one ledger in PostgreSQL. Should the command fail, the same command continues."""
        where = self.services.database(self.name)
        options = [part for name, value in _INGEST.items() for part in (f"--{name.replace('_', '-')}", value)]
        options += [part for name, value in _INGEST_SET.items() for part in ("--set", f"{name}={value}")]
        command = ["cmacc", "ingest", *self.lists, "--out", self.home / "data", "--url-template", self.url_template]
        before = self.services.site_requests()
        with (
            closing(Ledger(where)) as ledger,
            striking(self.services, kills, lambda: ledger.counts().done, self.struck),
            self._timed("ingest"),
        ):
            self.costs["ingest, commands given"] = self.services.call(*command, "--ledger", where, *options, tries=_LIVES)
        self.costs["ingest, requests to the site"] = self.services.site_requests() - before

    def reshard(self) -> None:
        """To the bucket, and there into shards of another cut and order."""
        with self._timed("reshard"):
            self.services.call("cmacc", "reshard", self.home / "data", "--out", f"{self.url}/clips", tries=_LIVES)
            cut = ["--order", "by:key", "--shard-size", "384KiB"]
            self.services.call("cmacc", "reshard", f"{self.url}/clips", "--out", f"{self.url}/shards", *cut, tries=_LIVES)

    def pretrain(self, run: str, nodes: dict[str, int], kills: Sequence[Kill] = (), until: int = 0) -> None:
        """torchrun on each of the hosts `nodes`, with so many ranks. until: all of them are killed after this step, for good."""
        options = {**_RECIPE, "checkpoint.at": f"{self.url}/{run}"}
        command = ["pretrain", f"{self.url}/shards", "--out", self.home / run, "--recipe", "small-cpu"]
        command += [part for name, value in options.items() for part in ("--set", f"{name}={value}")]
        last = again = 0

        def enough() -> bool:
            nonlocal last, again
            now = self.steps(run)
            last, again = now, again + max(0, last - now)  # a continued run drops what was logged past its checkpoint
            return bool(until) and now >= until

        with self._timed(run):
            gang = Gang(self.services, nodes, f"{self.name}-{run}", command)
            with striking(self.services, kills, lambda: self.steps(run), self.struck, gang):
                gang.run(enough)
        self.costs[f"{run}, torchrun started"] = gang.lives
        self.costs[f"{run}, steps taken"] = self.steps(run) + again

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.costs[f"{what}, seconds"] = round(time.monotonic() - began)

    # --- what came of it ---

    def steps(self, run: str) -> int:
        """The last step that a run has logged."""
        found = [record["step"] for record in MetricsLog.read(self.home / run / "metrics.jsonl") if "loss/total" in record]
        return int(found[-1]) if found else 0

    def evidence(self, run: str) -> Evidence:
        local = sorted((self.home / "data").glob("*.tar"))
        return Evidence(
            clips=clips_of(path.read_bytes() for path in local),
            shards={name: _sha256(self._object(f"shards/{name}")) for name in self._names("shards", ".tar")},
            curve=curve_of(self.home / run / "metrics.jsonl"),
            weights={"last checkpoint": _sha256(self._object(f"{run}/step-{STEPS:08d}.safetensors"))},
        )

    def batches(self, run: str) -> dict[str, list[int]]:
        names = self._names(run, ".safetensors")
        return batches_of({int(name[len("step-") :].split(".")[0]): self._object(f"{run}/{name}") for name in names})

    def _names(self, folder: str, ending: str) -> list[str]:
        self.files.invalidate_cache()
        found = (path.rpartition("/")[2] for path in self.files.ls(f"{BUCKET}/{self.name}/{folder}", detail=False))
        return sorted(name for name in found if name.endswith(ending))

    def _object(self, name: str) -> bytes:
        return bytes(self.files.cat_file(f"{BUCKET}/{self.name}/{name}"))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
