"""A run's numbers on disk: one JSON object a line, and TensorBoard's events."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

Report = Callable[[int, dict[str, float]], None]
"""Called with the step and its numbers at every log and evaluation."""


class MetricsLog:
    """Appends records to `path`. after: a continued run drops what was written past the step it continues from."""

    def __init__(self, path: Path, after: int = 0) -> None:
        kept = [record for record in self.read(path) if record["step"] <= after] if after else []
        aside = path.with_suffix(".part")
        aside.write_text("".join(json.dumps(record) + "\n" for record in kept))
        aside.rename(path)
        self._file = path.open("a")

    def write(self, step: int, facts: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **facts}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def read(path: Path) -> Iterator[dict[str, Any]]:
        """Records in order; a last line cut off by a kill is passed over."""
        if not path.exists():
            return
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


class RunLog:
    """Where a run's numbers go: `metrics.jsonl`, TensorBoard, and whoever asked for a report."""

    def __init__(self, run: Path, after: int, report: Report | None) -> None:
        self._lines = MetricsLog(run / "metrics.jsonl", after)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=after + 1 if after else 0)
        self._report = report

    def tell(self, step: int, facts: dict[str, float]) -> None:
        self._lines.write(step, facts)
        for name, value in facts.items():
            self._board.add_scalar(name, value, step)
        if self._report:
            self._report(step, facts)

    def close(self) -> None:
        self._lines.close()
        self._board.close()
