"""The `pretrain` flow: a data set in, a run's folder out. Running it again continues it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmacc.flows import torchrun
from cmacc.flows.curves import show_curves
from cmacc.flows.progress import Tell, progress, table
from cmacc.flows.tracked import tracked, under_prefect
from cmacc.shards.errors import DatasetError
from cmacc.shards.place import place
from cmacc.train.running.metrics import MetricsLog

# What trains brings torch; who only puts the flow on a server need not have it.
if TYPE_CHECKING:
    from cmacc.train.config import PretrainConfig

log = logging.getLogger(__name__)

_CURVES_EVERY_S = 60.0
_LOCK_S = 60.0


@tracked("pretrain")
def pretrain(
    data: str | list[str], out: str, recipe_name: str = "small-cpu", options: dict[str, Any] | None = None, ranks: int = 1
) -> dict[str, Any]:
    """Pretrain on the data set `data` in the folder `out`; on several, mixed, when it is a list of [WEIGHT=]ADDRESS.

    recipe_name: one of `cmacc recipes`. options: changes to the recipe by dotted name, e.g. `{"objective.tau": 0.1}`. ranks:
    processes of this machine that train together, 0: one for each GPU. As a tracked flow, and with several ranks, they are
    torchrun's; otherwise this process trains itself. Under torchrun this process is one of its ranks.

    Returns the last held-out numbers and the mean speed; nothing on ranks other than 0. Raises ValueError with one sentence
    for a wrong option; `Preempted` or `torchrun.Stopped` when the run saved and left because of a signal.
    """
    from cmacc.train.config import change, recipe

    data, options = [data] if isinstance(data, str) else list(data), options or {}
    config = change(recipe(recipe_name), options)
    if ranks < 0:
        raise ValueError(f"ranks is {ranks}; give 1 or more, or 0 for one on each GPU")
    if torchrun.rank() is not None:
        return _as_rank(data, Path(out), config)
    with progress("pretrain", total=config.steps) as tell:
        watch = Watch(Path(out), tell)
        if ranks == 1 and not under_prefect():
            _train(data, Path(out), config, watch.report)
        else:
            torchrun.leave_with_worker()
            torchrun.launch(_arguments(data, out, recipe_name, options), ranks or _gpus(), watch.look)
    return _finish(Path(out))


class Watch:
    """A run as its flow shows it: how far it is, and its curves."""

    def __init__(self, run: Path, tell: Tell) -> None:
        self.run, self._tell, self._note = run, tell, ""
        self._seen, self._began, self._drawn = 0, -1.0, time.monotonic()

    def report(self, step: int, facts: Mapping[str, Any]) -> None:
        """At every log and evaluation."""
        if facts.get("held_out/R@5") is not None:
            self._note = f"held-out R@5 {facts['held_out/R@5']:.3f} (chance {facts['held_out/chance_R@5']:.3f})"
        if facts.get("loss/total") is not None:
            speed = facts.get("speed/clips_per_s") or 0.0
            self._tell(step, f"loss {facts['loss/total']:.2f}  {speed:.0f} clips/s  {self._note}")

    def look(self) -> None:
        """Where the run is in other processes: report what has come into `metrics.jsonl`."""
        path = self.run / "metrics.jsonl"
        if not path.exists():
            return
        inode, size = path.stat().st_ino, path.stat().st_size
        if inode != self._began or size < self._seen:  # a continued run writes it anew
            self._began, self._seen = inode, 0
        with path.open("rb") as file:
            file.seek(self._seen)
            lines = file.read().splitlines(keepends=True)
        for line in lines:
            if not line.endswith(b"\n"):
                break
            self._seen += len(line)
            try:
                record = json.loads(line)
                self.report(record["step"], record)
            except (ValueError, KeyError, TypeError):
                continue  # cut off by a kill
        if time.monotonic() - self._drawn > _CURVES_EVERY_S and under_prefect():
            self._drawn = time.monotonic()
            show_curves(list(MetricsLog.read(path)))


def _as_rank(data: list[str], run: Path, config: PretrainConfig) -> dict[str, Any]:
    """One of torchrun's ranks. Only rank 0 shows anything; where a flow attends to it, the flow does."""
    torchrun.die_with_agent()
    if torchrun.rank() or torchrun.attended():
        _train(data, run, config, None)
        return {}
    with progress("pretrain", total=config.steps) as tell:
        _train(data, run, config, Watch(run, tell).report)
    return _finish(run)


def _train(data: list[str], run: Path, config: PretrainConfig, report: Any) -> None:
    from cmacc.train.pretrain import pretrain as train_loop

    if torchrun.rank():
        train_loop(data, run, config, report)
        return
    with _locked(run):
        train_loop(data, run, config, report)


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    """One process at a time. A flow's ranks wait a little: those of a worker that died may still be saving."""
    began, place_of_run = time.monotonic(), place(run)
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(place_of_run.lock())
                break
            except DatasetError:
                if not torchrun.attended() or time.monotonic() - began > _LOCK_S:
                    raise
                time.sleep(1.0)
        yield


def _arguments(data: list[str], out: str, recipe_name: str, options: dict[str, Any]) -> list[str]:
    given = ["pretrain", *data, "--out", out, "--recipe", recipe_name]
    for name, value in options.items():
        given += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    return given


def _gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def _finish(run: Path) -> dict[str, Any]:
    from cmacc.train.pretrain import final_numbers
    from cmacc.train.report.picture import draw_run

    numbers = final_numbers(run)
    show_curves(list(MetricsLog.read(run / "metrics.jsonl")))
    log.info("picture: %s", draw_run(run))
    table("pretrain-numbers", [{"number": k, "value": v} for k, v in numbers.items()])
    return numbers
