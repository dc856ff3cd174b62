"""What an ingest is to do, kept beside the data set: so that its parts, elsewhere, and `cmacc status` know it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cmacc.flows.work_through import Hands
from cmacc.ingest import IngestConfig, Ledger
from cmacc.shards.options import from_json
from cmacc.shards.publish import publish


@dataclass(frozen=True)
class Plan:
    """ledger: a database's URL, or empty for the data set's own file. made_by: provenance for dataset.json."""

    config: IngestConfig = field(default_factory=IngestConfig)
    hands: Hands = field(default_factory=Hands)
    ledger: str = ""
    shard_mb: int = 256
    made_by: dict[str, Any] = field(default_factory=dict)

    def open_ledger(self, home: Path) -> Ledger:
        return Ledger(self.ledger or home / "ingest" / "ledger.sqlite")

    def save(self, home: Path) -> None:
        path = _path(home)
        path.parent.mkdir(parents=True, exist_ok=True)
        publish(path, json.dumps(asdict(self), indent=1).encode())
        path.chmod(0o600)  # a database's URL may hold a password

    @classmethod
    def load(cls, home: Path) -> Plan:
        """Raises ValueError when nothing was ever ingested there."""
        try:
            return from_json(cls, json.loads(_path(home).read_bytes()))
        except OSError as error:
            raise ValueError(
                f"{home} was not made by `cmacc ingest`: it has no ingest/plan.json; give the folder given to --out"
            ) from error


def _path(home: Path) -> Path:
    return home / "ingest" / "plan.json"
