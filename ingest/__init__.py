"""A clip request in, a verified clip (video bytes, audio bytes, facts) or a typed failure out.

`read_manifest` reads a clip list, `Ledger` keeps what became of each row, a `Crew` of child processes fetches and cuts source
videos as a `Gate` admits them, `read_staged` gives the finished clips; `fetched` and `transcode` are the two halves of the work
on one video. `IngestConfig` holds every option.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cmacc.ingest.causes import Cause, IngestFailure
from cmacc.ingest.checks import Checks
from cmacc.ingest.config import IngestConfig
from cmacc.ingest.cut import Limits
from cmacc.ingest.fetch import FetchOptions, fetched
from cmacc.ingest.gate import GUEST_VIDEOS_PER_HOUR, WEB_CLIENT_VIDEOS_PER_HOUR, Gate, Pace
from cmacc.ingest.manifest import BadRow, ClipRequest, Manifest, read_manifest
from cmacc.ingest.outcome import Outcome, SourceVideo
from cmacc.ingest.source import Media
from cmacc.ingest.staging import read_staged, staged_path
from cmacc.ingest.transcode import transcode
from cmacc.ingest.work import Crew

if TYPE_CHECKING:
    from cmacc.ingest.ledger import Counts, Ledger, Part, Totals

__all__ = [
    "GUEST_VIDEOS_PER_HOUR",
    "WEB_CLIENT_VIDEOS_PER_HOUR",
    "BadRow",
    "Cause",
    "Checks",
    "ClipRequest",
    "Counts",
    "Crew",
    "FetchOptions",
    "Gate",
    "IngestConfig",
    "IngestFailure",
    "Ledger",
    "Limits",
    "Manifest",
    "Media",
    "Outcome",
    "Pace",
    "Part",
    "SourceVideo",
    "Totals",
    "fetched",
    "read_manifest",
    "read_staged",
    "staged_path",
    "transcode",
]


def __getattr__(name: str) -> Any:
    """The ledger when it is asked for: a child process, which never does, would load a database's library with it."""
    if name in ("Counts", "Ledger", "Part", "Totals"):
        return getattr(import_module("cmacc.ingest.ledger"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
