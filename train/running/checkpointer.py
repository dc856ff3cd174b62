"""When a run saves, how training goes on meanwhile, what is kept, and what becomes of a save that fails."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmacc.shards.place import place, public_address
from cmacc.train.running import checkpoint

log = logging.getLogger(__name__)

_PROBE = "writable"
_PATIENCE_S = 300.0  # that a save waits for the one before it: a store that hangs must not hold up the training for ever


@dataclass(frozen=True)
class CheckpointConfig:
    """steps, minutes: a checkpoint every so many; 0: not by them. keep: the last so many stay. keep_minutes: besides, one
    each so many minutes stays for good; 0: none. at: folder or fsspec URL, of this run alone; "": `checkpoints` in the run's
    folder. asynchronous: written while training goes on. grace_s: seconds from SIGTERM or SIGUSR1 until the run has saved and
    left; torchrun kills its processes after 30."""

    steps: int = 1_000
    minutes: float = 15.0
    keep: int = 2
    keep_minutes: float = 60.0
    at: str = ""
    asynchronous: bool = True
    grace_s: float = 25.0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"checkpoint.steps is {self.steps}; give 1 or more, or 0 to save by the clock alone")
        for name in ("minutes", "keep_minutes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"checkpoint.{name} is {getattr(self, name)}; give minutes above 0, or 0 for none by the clock")
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep is {self.keep}; give 1 or more")
        if not 0 < self.grace_s < math.inf:
            raise ValueError(f"checkpoint.grace_s is {self.grace_s}; give seconds above 0")


class Checkpointer:
    """Saves into a folder or fsspec URL, in one thread aside. Of one process alone: rank 0.

    A save that fails is told in the log and counted, and the run goes on: the checkpoint before it stays the latest.
    failed: how many did; error: the last one's. Raises CheckpointError or OSError when made, if what is there cannot be read, or
    nothing be written.
    """

    def __init__(self, where: str | os.PathLike[str], config: CheckpointConfig) -> None:
        self.config, self.failed = config, 0
        self.error: Exception | None = None
        self._place = place(where)
        self._latest: dict[str, Any] | None = None  # what the JSON of the latest says
        self._address = checkpoint.latest(where)
        if self._address is not None:
            self._latest = checkpoint.describe(self._place, checkpoint.step_of(self._address))
        with checkpoint.asking(self._place, "write"):  # better said now than after the first thousand steps
            self._place.publish(_PROBE, b"")
            self._place.remove(_PROBE)
        self._asked_step, self._asked_at = self.step or 0, time.monotonic()
        self._snapshot = _Snapshot()
        self._thread: threading.Thread | None = None
        self._cleared = False

    @property
    def step(self) -> int | None:
        """Of the latest whole checkpoint."""
        return None if self._latest is None else int(self._latest["step"])

    def due(self, step: int, now: float) -> bool:
        """Whether to save after `step` steps, at `now` (time.monotonic()): by the steps, or by the time since the last save."""
        if step == self._asked_step:
            return False
        by_steps = self.config.steps > 0 and step % self.config.steps == 0
        return by_steps or (self.config.minutes > 0 and now - self._asked_at >= 60 * self.config.minutes)

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Save what these are now; they may change as soon as it returns. tensors: by name, on any device; facts: JSON.

        Waits for a save that is under way. Of a step that is saved already nothing is written again. Raises TypeError or
        ValueError for facts that JSON does not hold, nothing else.
        """
        said = json.dumps(facts)
        self._asked_step, self._asked_at = step, time.monotonic()
        self.wait(_PATIENCE_S)
        if self._thread is not None:
            return self._fail(step, TimeoutError(f"the save before it still is under way after {_PATIENCE_S:.0f} s"))
        if self.step == step:
            return None
        try:
            self._snapshot.take(tensors)
        except (RuntimeError, MemoryError) as error:  # torch's own word for no memory is RuntimeError
            return self._fail(step, error)
        if not self.config.asynchronous:
            return self._write(step, said)
        self._thread = threading.Thread(target=self._write, args=(step, said), name=f"checkpoint of step {step}", daemon=True)
        self._thread.start()
        return None

    def wait(self, timeout: float | None = None) -> str | None:
        """Wait for the save under way, at most so many seconds. Returns the address of the latest whole checkpoint, or None.

        From any thread.
        """
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
            if not thread.is_alive() and self._thread is thread:
                self._thread = None
        return self._address

    def close(self) -> None:
        """Wait for the save under way, unless its store hangs."""
        self.wait(_PATIENCE_S)
        if self._thread is not None:
            self.failed += 1
            log.error(
                "the %s was not through after %.0f s and is left behind: see to %s", self._thread.name, _PATIENCE_S, self._url
            )

    # --- inside, in the thread ---

    def _write(self, step: int, facts: str) -> None:
        try:
            if not self._cleared:
                self._place.clear()  # what a writer that was killed left aside takes up room
                self._cleared = True
            tensors, keeping = self._snapshot.tensors(), self._keeping(step, time.time())
            content = checkpoint.write(self._place, step, tensors, facts, {"keeping": keeping})
            self._address = checkpoint.point(self._place, content)
            self._latest = content
        except Exception as error:  # each kind of store has errors of its own
            return self._fail(step, error)
        try:
            self._drop_old(step, keeping["steps"])
        except Exception as error:
            log.warning("old checkpoints in %s could not be removed (%s); remove them by hand", self._url, error)
        return None

    def _keeping(self, step: int, now: float) -> dict[str, Any]:
        """steps: that are kept for good; since: seconds, when the last of these was saved, or the first checkpoint at all."""
        before = (self._latest or {}).get("keeping", {})
        steps, since = list(before.get("steps", [])), min(before.get("since", now), now)
        if self.config.keep_minutes > 0 and now - since >= 60 * self.config.keep_minutes:
            return {"steps": [*steps, step], "since": now}
        return {"steps": steps, "since": since}

    def _drop_old(self, step: int, kept: list[int]) -> None:
        """Later ones than `step` are of a run that was put back; they stay until it comes there again."""
        whole = [old for old in checkpoint.steps(self._place) if old <= step]
        stay = {*whole[-self.config.keep :], *kept}
        for old in checkpoint.steps(self._place, (checkpoint.TENSORS, checkpoint.DESCRIPTION)):
            if old <= step and old not in stay:
                checkpoint.remove(self._place, old)

    def _fail(self, step: int, error: Exception) -> None:
        self.failed, self.error = self.failed + 1, error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        stays = f"the one of step {self.step} stays the latest" if self._latest else "there is none before it"
        log.error(
            "step %d could not be saved in %s (%s); the run goes on, %s: make room there or mend the address",
            step, self._url, reason, stays,
        )  # fmt: skip

    @property
    def _url(self) -> str:
        return public_address(self._place.url)


class _Snapshot:
    """Tensors as they were when taken, in memory that is used again for the next ones."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies: on a CPU at once; from a GPU into pinned memory on the current stream, behind the work queued there."""
        kept = {}
        for name, tensor in tensors.items():
            buffer = self._kept.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            kept[name] = buffer.copy_(tensor.detach(), non_blocking=True)
        self._kept, self._copied = kept, None
        device = next((t.device for t in tensors.values() if t.is_cuda), None)
        if device is not None:
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record(torch.cuda.current_stream(device))

    def tensors(self) -> dict[str, Tensor]:
        """What was taken, once it is there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._kept
