"""What is asked of a child process and what it answers: a source video with its clips, and one outcome a clip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cmacc.ingest.causes import Cause
from cmacc.ingest.manifest import ClipRequest


@dataclass(frozen=True)
class SourceVideo:
    """One source video and the clips wanted of it."""

    source: str
    address: str
    requests: tuple[ClipRequest, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SourceVideo:
        requests = tuple(ClipRequest(**{**r, "labels": tuple(r["labels"])}) for r in data["requests"])
        return cls(data["source"], data["address"], requests)


@dataclass(frozen=True)
class Outcome:
    """What became of one clip. cause None: it is done and lies in the staged tar of its source video.

    seconds: of work on the whole source video, shared evenly among its clips. bytes: of its three members.
    """

    key: str
    source: str
    cause: Cause | None = None
    detail: str = ""
    seconds: float = 0.0
    bytes: int = 0
