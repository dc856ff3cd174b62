"""A run's numbers: one JSON object a line on disk, TensorBoard's events, and Weights & Biases when asked."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from cmacc.shards.publish import publish

log = logging.getLogger(__name__)

Report = Callable[[int, dict[str, float]], None]
"""Called with the step and its numbers at every log and evaluation."""


@dataclass(frozen=True)
class LogConfig:
    """Where numbers go besides `metrics.jsonl`. tensorboard: event files in the run's folder. wandb: a project of Weights &
    Biases, or "" for none."""

    tensorboard: bool = True
    wandb: str = ""


class MetricsLog:
    """Appends records to `path`; a number that is not finite becomes null. after: a continued run drops what was written past
    the step it continues from."""

    def __init__(self, path: Path, after: int = 0) -> None:
        kept = [record for record in self.read(path) if record["step"] <= after] if after else []
        publish(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._file = path.open("ab", buffering=0)  # no buffer keeps what a full disk refused
        self._torn = False

    def write(self, step: int, facts: Mapping[str, float]) -> None:
        """Raises OSError when there is no room; the next record begins a line of its own all the same."""
        record = {"step": step, **{name: value if math.isfinite(value) else None for name, value in facts.items()}}
        line = ("\n" if self._torn else "").encode() + json.dumps(record).encode() + b"\n"
        self._torn = True
        self._torn = self._file.write(line) < len(line)

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def read(path: Path) -> Iterator[dict[str, Any]]:
        """Records in order; a line cut off by a kill or a full disk is passed over."""
        if not path.exists():
            return
        for line in path.read_text().splitlines():
            with suppress(json.JSONDecodeError):
                record = json.loads(line)
                if isinstance(record, dict):
                    yield record


_EVENTS = "events.out.tfevents."


def _stamp(name: str) -> float | None:
    """The time in the name of an event file, seconds."""
    found = re.match(r"\d+(\.\d+)?", name.removeprefix(_EVENTS))
    return float(found[0]) if found else None


class Board:
    """An event file for TensorBoard in `folder`, written through at each step, so that a kill takes nothing away.

    after: what earlier files show past that step is taken back, all of it when it is 0; None: nothing.
    """

    def __init__(self, folder: Path, after: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names, and a clock may have been put back
        stamps = [found for path in folder.glob(f"{_EVENTS}*") if (found := _stamp(path.name)) is not None]
        now = max([time.time(), *(stamp + 1e-3 for stamp in stamps)])
        name = f"{_EVENTS}{now:017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab", buffering=0)
        self._add(Event(file_version="brain.Event:2"))
        if after is not None:
            self._add(Event(step=after + 1 if after else 0, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, facts: Mapping[str, float]) -> None:
        """Raises OSError when there is no room. The file is torn then: open another."""
        self._add(Event(step=step, summary=Summary(value=[Summary.Value(tag=n, simple_value=v) for n, v in facts.items()])))

    def close(self) -> None:
        self._file.close()

    def _add(self, event: Event) -> None:
        event.wall_time, record = time.time(), io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        if self._file.write(record.getvalue()) < record.tell():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class WandB:
    """A run of Weights & Biases, whose id stands in `run/wandb.id`, so that a continued run goes on in it.

    A number is drawn at its own step, whatever was logged before: a continued run may log steps again. Raises ValueError with
    one sentence where the package is missing.
    """

    def __init__(self, run: Path, project: str, options: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ValueError(
                f"log.wandb is {project!r}, but the package wandb is not installed; pip install wandb, or leave it out"
            ) from None
        name = run / "wandb.id"
        if not name.exists():
            name.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=project, id=name.read_text().strip(), name=run.name, dir=str(run), resume="allow", config=dict(options)
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, facts: Mapping[str, float]) -> None:
        self._run.log({"step": step, **facts})

    def close(self) -> None:
        self._run.finish()


class RunLog:
    """Where a run's numbers go. A sink that fails, as on a full disk, is named once and does not stop the run.

    after: the step that the run continues from. options: the run's, flat, for W&B. rank: only rank 0 writes and reports.
    """

    def __init__(
        self,
        run: Path,
        after: int = 0,
        report: Report | None = None,
        config: LogConfig | None = None,
        options: Mapping[str, Any] | None = None,
        rank: int = 0,
    ) -> None:
        self._run, self._report, self._config = run, report if rank == 0 else None, config or LogConfig()
        self._failed: set[str] = set()
        self._sinks: dict[str, MetricsLog | Board | WandB] = {}
        if rank == 0:
            self._open(after)
            if self._config.wandb:
                self._join_wandb(options or {})

    def tell(self, step: int, facts: dict[str, float]) -> None:
        if self._sinks and self._config.tensorboard and "TensorBoard" not in self._sinks:
            self._reopen_board()
        for name, sink in list(self._sinks.items()):
            try:
                sink.write(step, facts)
                self._failed.discard(name)
            except Exception as error:  # what a writer of others raises has no end
                self._say(name, error)
                if isinstance(sink, Board):
                    self._close(name)
        if self._report:
            self._report(step, facts)

    def cut_back(self, step: int) -> None:
        """After a rollback: what came after `step` is dropped. Where there is no room for that, those steps are there twice."""
        if self._sinks:
            try:
                self._open(step)
            except OSError as error:
                self._say("metrics.jsonl", error)

    def close(self) -> None:
        for name in list(self._sinks):
            self._close(name)

    def _open(self, after: int) -> None:
        """Raises OSError when there is no room; what was open stays so then."""
        files: dict[str, MetricsLog | Board | WandB] = {"metrics.jsonl": MetricsLog(self._run / "metrics.jsonl", after)}
        if self._config.tensorboard:
            try:
                files["TensorBoard"] = Board(self._run / "tensorboard", after)
            except OSError as error:
                self._say("TensorBoard", error)
        self._close("metrics.jsonl")
        self._close("TensorBoard")
        self._sinks = {**files, **self._sinks}

    def _join_wandb(self, options: Mapping[str, Any]) -> None:
        try:
            self._sinks["Weights & Biases"] = WandB(self._run, self._config.wandb, options)
        except ValueError:
            raise
        except Exception as error:  # no network, no account
            self._say("Weights & Biases", error)

    def _reopen_board(self) -> None:
        with suppress(OSError):
            self._sinks["TensorBoard"] = Board(self._run / "tensorboard")

    def _close(self, name: str) -> None:
        if name in self._sinks:
            try:
                self._sinks.pop(name).close()
            except Exception as error:
                self._say(name, error)

    def _say(self, name: str, error: Exception) -> None:
        if name not in self._failed:
            self._failed.add(name)
            log.warning("numbers cannot be written to %s of %s (%s); the run goes on without them", name, self._run, error)
