"""A run's numbers on disk: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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
