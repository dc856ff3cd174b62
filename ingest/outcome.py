"""What is asked of a child process and what it answers: a source video with its clips, and one outcome a clip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cmacc.ingest.causes import Cause
from cmacc.ingest.manifest import ClipRequest


@dataclass(frozen=True)
class SourceVideo:
    """One source video and the clips wanted of it. host: of its address, `` for a local file; number: its place in the ledger."""

    source: str
    address: str
    requests: tuple[ClipRequest, ...]
    host: str = ""
    number: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SourceVideo:
        return cls(**{**data, "requests": tuple(_request(r) for r in data["requests"])})


def _request(data: Mapping[str, Any]) -> ClipRequest:
    captions = tuple((float(begin), float(end), str(text)) for begin, end, text in data.get("captions", ()))
    return ClipRequest(**{**data, "labels": tuple(data["labels"]), "captions": captions})


@dataclass(frozen=True)
class Outcome:
    """What became of one clip. cause None: it is done and lies in the staged tar of its source video.

    seconds, fetched: of work on the whole source video and bytes downloaded of it, shared evenly among its clips.
    bytes: of its three members. fingerprint: of a done clip, 64 hex digits. duplicate_of: key of the clip it nearly repeats.
    """

    key: str
    source: str
    cause: Cause | None = None
    detail: str = ""
    seconds: float = 0.0
    bytes: int = 0
    fetched: int = 0
    fingerprint: str = ""
    duplicate_of: str = ""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        return cls(**{**data, "cause": data["cause"] and Cause(data["cause"])})
