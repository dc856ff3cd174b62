"""One clip: its key, its two media members, its facts."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field

KEY = re.compile(r"[A-Za-z0-9_-]{1,96}")
VIDEO = ("mp4", "webm", "mkv", "mov", "avi", "m4v")
AUDIO = ("flac", "opus", "ogg", "wav", "mp3", "m4a")
"""Extensions of media members. Ours are mp4, and flac or opus; the others are met in shards that were made elsewhere."""
_FINGERPRINT = re.compile(r"([0-9a-f]{64})?")
_YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")


@dataclass(frozen=True)
class Facts:
    """What is known of a clip; the `json` member, and one catalog row.

    source: id of the source video, shared by all its clips (`yt_<id>`, `url_<hash>`, `file_<hash>`).
    start_s, end_s: the instants cut from the source, seconds. duration_s: of the video as written.
    n_frames, fps, width, height: of the video as written. keyframes: frame numbers, ascending, first 0.
    loudness_db: RMS of the mono sound, dBFS. motion: mean absolute luma change between frames, 0..255.
    labels: names, for evaluation alone. split: "" when the manifest names none.
    av_offset_s: seconds by which the sound comes late, as estimated. av_trust: how sure that is, 0 (not at all) to 1.
    fingerprint: 64 hex digits, alike for clips that look and sound alike; "" when there is nothing to tell the clip by.
    duplicate_of: key of an earlier clip that this one nearly repeats, "" when none is known.
    captions: (from, to, what is said), seconds from the clip's start.
    """

    source: str
    start_s: float
    end_s: float
    duration_s: float
    n_frames: int
    fps: float
    width: int
    height: int
    keyframes: tuple[int, ...]
    loudness_db: float
    motion: float
    labels: tuple[str, ...] = ()
    split: str = ""
    av_offset_s: float = 0.0
    av_trust: float = 0.0
    fingerprint: str = ""
    duplicate_of: str = ""
    captions: tuple[tuple[float, float, str], ...] = ()

    def __post_init__(self) -> None:
        if not _FINGERPRINT.fullmatch(self.fingerprint):
            raise ValueError(f"fingerprint {self.fingerprint!r} should be 64 hex digits, or empty")


@dataclass(frozen=True)
class Clip:
    """A verified clip. members maps an extension (`mp4`, `flac` or `opus`) to that member's bytes."""

    key: str
    facts: Facts
    members: dict[str, bytes] = field(repr=False)

    def __post_init__(self) -> None:
        check_key(self.key)


def check_key(key: str) -> str:
    """Return `key`, or raise ValueError: a key is ASCII letters, digits, `_` and `-`, at most 96 of them."""
    if not KEY.fullmatch(key):
        raise ValueError(f"clip key {key!r} is not usable: letters, digits, '_' and '-' only, at most 96 of them")
    return key


def source_id(youtube_id: str | None = None, url: str | None = None, path: str | None = None) -> str:
    """Id of a source video: a YouTube id keeps its name, anything else is named by a hash of its address."""
    if youtube_id is not None:
        if not _YOUTUBE_ID.fullmatch(youtube_id):
            raise ValueError(f"{youtube_id!r} is not a YouTube id: 11 letters, digits, '_' or '-'")
        return f"yt_{youtube_id}"
    kind, address = ("url", url) if url is not None else ("file", path)
    if not address:
        raise ValueError("a source video needs a YouTube id, a URL or a path")
    return f"{kind}_{hashlib.sha256(address.encode()).hexdigest()[:16]}"


def clip_key(source: str, start_s: float, end_s: float | None) -> str:
    """`<source>_<start ms>_<end ms>`; `end` stands for the end of a source that is taken whole."""
    end = "end" if end_s is None else str(round(end_s * 1000))
    return check_key(f"{source}_{round(start_s * 1000)}_{end}")
