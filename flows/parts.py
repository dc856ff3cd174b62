"""An ingest shared out: each part of the source videos is a flow run of its own, on whatever worker takes it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import tenacity

from cmacc.flows.part import do_part
from cmacc.flows.plan import Plan
from cmacc.flows.progress import Tell, progress
from cmacc.flows.tracked import tracked
from cmacc.ingest import IngestFailure, Ledger, Part
from cmacc.shards.dataset import META, Dataset
from cmacc.shards.publish import publish
from cmacc.shards.writer import DatasetWriter

log = logging.getLogger(__name__)
T = TypeVar("T")

FLOW = "ingest-part"
_LOOK_EVERY_S = 2.0
_BEAT_S = 2.0
# That a worker may need, besides, from taking a run to running it: a process has to start, an image perhaps to come.
_BEGIN_S = 60.0
_AWAY_S = 900.0  # that the server may be, while an ingest waits for its parts
_TRIES = 3  # of a part that fails without getting anything done


@tracked(FLOW)
def ingest_part(out: str, number: int, of: int) -> dict[str, Any]:
    """Do part `number` of `of` of the ingest into `out`, as its plan says: a data set of its own in `out`/parts.

    `ingest` starts this flow and puts the parts together. Raises what `ingest` does.
    """
    home, part = Path(out), Part(number, of)
    plan, folder = Plan.load(home), _folder(home, part)
    with plan.open_ledger(home) as ledger, _beating(folder):
        clips, _ = ledger.count_todo(part)
        with progress(f"ingest-part-{number}", total=clips) as tell:
            stop = do_part(home, folder, plan, ledger, tell, part)
    if stop:
        raise stop
    return {"clips": len(Dataset.open(folder))}


def ingest_parts(home: Path, plan: Plan, ledger: Ledger, of: int, tell: Tell) -> IngestFailure | None:
    """Start a flow run for each part that has something to do, begin lost ones again, and put the parts together.

    The runs go to the deployment of the flow `ingest-part`; its workers must see `home` under the same path. Raises ValueError
    when there is no server or no deployment, or when a part fails again and again.
    """
    if not os.environ.get("PREFECT_API_URL"):
        raise ValueError("parts need a Prefect server and its workers; set PREFECT_API_URL, or leave --parts away")
    from prefect.client.orchestration import get_client
    from prefect.runtime import deployment as own

    from cmacc.flows.deployments import resolve

    home = home.resolve()
    before, _ = ledger.count_todo()
    with get_client(sync_client=True) as client:
        # parts of an ingest in a cluster belong in the cluster too
        deployment = client.read_deployment_by_name(f"{FLOW}/{own.name}" if own.name else resolve(FLOW)).id
        runs = _Runs(home, of, client, deployment, plan.config.lost_after_s)
        waiting = {
            number for number in range(of) if ledger.count_todo(Part(number, of))[0] or _folder(home, Part(number, of)).exists()
        }
        while waiting := _patiently(lambda: {number for number in waiting if not runs.done(number, ledger)}):
            idle = len(waiting - runs.running)
            note = f", {idle} wait for a worker" if idle else ""
            tell(before - ledger.count_todo()[0], f"{len(waiting & runs.running)} of {of} parts at work{note}")
            time.sleep(_LOOK_EVERY_S)
    merge_parts(home, plan, ledger)
    tell(before - ledger.count_todo()[0], "parts put together")
    return None


def _patiently(ask: Callable[[], T]) -> T:
    """What is asked of a server that may be away for a while: the parts go on without it, and so must who waits for them."""
    import httpx

    def is_away(error: BaseException) -> bool:
        answer = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 0
        return isinstance(error, httpx.TransportError) or answer >= 500

    def say(state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome:
            error = state.outcome.exception()
            log.warning("the Prefect server does not answer (%s); asking again for up to %.0f s", error, _AWAY_S)

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_away), wait=tenacity.wait_fixed(_LOOK_EVERY_S),
        stop=tenacity.stop_after_delay(_AWAY_S), before_sleep=say, reraise=True,
    )(ask)  # fmt: skip


def merge_parts(home: Path, plan: Plan, ledger: Ledger, but_of: int = 1) -> None:
    """Take the shards of the parts' data sets into the one at `home`; verified, not copied. A second time does nothing.

    but_of: parts of so many in all are left as they are, to be gone on with.
    """
    folders = [f for f in sorted((home / "parts").glob("*-of-*")) if but_of == 1 or not f.name.endswith(f"-of-{but_of:04d}")]
    if not folders:
        return
    with DatasetWriter(
        home, plan.config.profile, shard_bytes=plan.shard_mb << 20, provenance={"ingest": plan.made_by},
        on_commit=lambda shard, keys: ledger.mark_done(keys, shard),
    ) as writer:  # fmt: skip
        for folder in folders:
            for name, keys in _shards(folder):
                if all(key in writer.keys for key in keys):
                    ledger.moved(f"parts/{folder.name}/{name}", _holder(home, keys[0]))
                else:
                    writer.adopt(folder / name)
            shutil.rmtree(folder)
    for path in (_state(home), _state(home).with_suffix(".token")):
        path.unlink(missing_ok=True)
    if not any((home / "parts").iterdir()):
        (home / "parts").rmdir()


def _shards(folder: Path) -> list[tuple[str, list[str]]]:
    if not (folder / META).exists():
        return []
    dataset = Dataset.open(folder)
    return [(shard.name, dataset.keys_of_shard(shard.name)) for shard in dataset.meta.shards]


def _holder(home: Path, key: str) -> str:
    """Name of the shard in which a clip lies."""
    dataset = Dataset.open(home)
    row = dataset.keys.tolist().index(key)
    return dataset.meta.shards[int(dataset.shard_of_row[row])].name


@dataclass
class _Run:
    """The flow run that a part has now, and how many it had. left: clips to do when it began."""

    attempt: int = 0
    id: str = ""
    left: int = -1
    in_vain: int = 0


class _Runs:
    """The parts' flow runs; kept in a file, so that a coordinator that comes back finds them."""

    def __init__(self, home: Path, of: int, client: Any, deployment: UUID, lost_after_s: float) -> None:
        self.home, self.of, self.client, self.deployment, self.lost_after_s = home, of, client, deployment, lost_after_s
        saved = json.loads(_state(home).read_bytes()) if _state(home).exists() else {}
        self.runs = {number: _Run(**saved.get(f"{number}/{of}", {})) for number in range(of)}
        self.running: set[int] = set()

    def done(self, number: int, ledger: Ledger) -> bool:
        """Whether this part is through; starts its flow run, or another if that one was lost."""
        run, part = self.runs[number], Part(number, self.of)
        if not run.id:
            self._start(number, ledger)
            return False
        found = self.client.read_flow_run(UUID(run.id))
        state = found.state
        (self.running.add if state is not None and state.is_running() else self.running.discard)(number)
        if state is None or not state.is_final():
            if state is not None and self._lost(part, state, found.start_time):
                log.warning("part %d of %d: its worker is lost; beginning it again", number, self.of)
                from prefect.states import Crashed

                self.client.set_flow_run_state(found.id, Crashed(message="no sign of life from its worker"), force=True)
                self._start(number, ledger)
            return False
        if state.is_completed() and not ledger.count_todo(part)[0]:
            return True
        left = ledger.count_todo(part)[0]
        run.in_vain = run.in_vain + 1 if left == run.left else 0
        if run.in_vain >= _TRIES:
            raise ValueError(f"part {number} of {self.of} fails again and again ({state.message}); see its flow run {found.name}")
        self._start(number, ledger)
        return False

    def _lost(self, part: Part, state: Any, start: Any) -> bool:
        """Whether the worker that took the run is gone: running without a sign of life, or taken and never begun."""
        if state.is_running():
            return _silent_s(_folder(self.home, part), start) > self.lost_after_s
        return state.is_pending() and time.time() - state.timestamp.timestamp() > self.lost_after_s + _BEGIN_S

    def _start(self, number: int, ledger: Ledger) -> None:
        run, part = self.runs[number], Part(number, self.of)
        left, attempt = ledger.count_todo(part)[0], run.attempt + 1
        made = self.client.create_flow_run_from_deployment(
            self.deployment,
            parameters={"out": str(self.home), "number": number, "of": self.of},
            name=f"{self.home.name}-{number}-of-{self.of}-{attempt}",
            # who was killed just here, or got no answer, asks again and gets the same run
            idempotency_key=f"{self.home}:{number}:{self.of}:{attempt}:{_token(self.home)}",
        )
        run.id, run.attempt, run.left = str(made.id), attempt, left
        publish(_state(self.home), json.dumps({f"{n}/{self.of}": vars(r) for n, r in self.runs.items()}).encode())


def _folder(home: Path, part: Part) -> Path:
    return home / "parts" / f"{part.number:04d}-of-{part.of:04d}"


def _state(home: Path) -> Path:
    return home / "ingest" / "parts.json"


def _token(home: Path) -> str:
    """One word for as long as the parts exist: a server remembers idempotency keys for ever."""
    path = _state(home).with_suffix(".token")
    if not path.exists():
        publish(path, os.urandom(8).hex().encode())
    return path.read_text()


@contextmanager
def _beating(folder: Path) -> Iterator[None]:
    """A sign of life while the context lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    ended = threading.Event()

    def beat() -> None:
        while not ended.is_set():
            (folder / "alive").touch()
            ended.wait(_BEAT_S)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _silent_s(folder: Path, start: Any) -> float:
    """Seconds since the part's last sign of life, or else since its run began."""
    began = start.timestamp() if start else time.time()
    alive = folder / "alive"
    return time.time() - max(began, alive.stat().st_mtime if alive.exists() else 0.0)
