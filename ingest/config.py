"""Everything that decides what becomes of a source video: the options of each part, as one value that travels as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field

from cmacc.ingest.checks import Checks
from cmacc.ingest.cut import Limits
from cmacc.ingest.fetch import FetchOptions
from cmacc.ingest.gate import Pace
from cmacc.shards.profile import Profile


@dataclass(frozen=True)
class IngestConfig:
    """timeout_s: wall-clock seconds for one source video, from its first byte to its last clip.
    scratch_gb: GB that downloads and finished clips that are in no shard yet may take on the disk.
    lost_after_s: a part whose worker gives no sign of life for so long is begun again elsewhere.
    """

    profile: Profile = field(default_factory=Profile)
    fetch: FetchOptions = field(default_factory=FetchOptions)
    pace: Pace = field(default_factory=Pace)
    limits: Limits = field(default_factory=Limits)
    checks: Checks = field(default_factory=Checks)
    timeout_s: float = 600.0
    scratch_gb: float = 20.0
    lost_after_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("timeout_s", "scratch_gb", "lost_after_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give more than 0")
