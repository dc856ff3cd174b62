"""How a clip's bytes are encoded at rest: one small dataclass a profile."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

VIDEO_CODECS = ("h264", "mjpeg", "vp9")
AUDIO_CODECS = ("flac", "opus")
FOREIGN = "foreign"
"""Name of a profile that clips made elsewhere were found to have."""
_ROUNDED = 1e-4  # a tenth of what NTSC is slower by


@dataclass(frozen=True)
class Profile:
    """Encoding of the two media members of every clip in a data set.

    short_side: pixels of the shorter picture side; a smaller source is not enlarged. Sides are made even.
    fps: constant frame rate, frames per second; of foreign clips the nominal one, see `is_rate`.
    gop: frames from one keyframe to the next; groups are closed. 1 means intra only.
    b_frames: bidirectional frames between two references (0: decode order is display order).
    quality: the codec's own scale, lower is better (x264 CRF, VP9 CRF, MJPEG q).
    audio_rate: Hz, always mono.
    """

    name: str = "h264"
    codec: Literal["h264", "mjpeg", "vp9"] = "h264"
    short_side: int = 256
    fps: int = 25
    gop: int = 25
    b_frames: int = 2
    quality: int = 23
    audio_codec: Literal["flac", "opus"] = "flac"
    audio_rate: int = 16_000

    def __post_init__(self) -> None:
        if self.codec not in VIDEO_CODECS:
            raise ValueError(f"profile {self.name!r}: codec {self.codec!r} is not known; use one of {', '.join(VIDEO_CODECS)}")
        if self.audio_codec not in AUDIO_CODECS:
            raise ValueError(
                f"profile {self.name!r}: audio_codec {self.audio_codec!r} is not known; use one of {', '.join(AUDIO_CODECS)}"
            )
        if self.short_side < 16 or self.short_side % 2:
            raise ValueError(f"profile {self.name!r}: short_side is {self.short_side}; give an even number of pixels, 16 or more")
        for field in ("fps", "gop", "quality", "audio_rate"):
            if getattr(self, field) < 1:
                raise ValueError(f"profile {self.name!r}: {field} is {getattr(self, field)}; give 1 or more")
        if self.b_frames < 0 or self.b_frames >= self.gop:
            raise ValueError(
                f"profile {self.name!r}: b_frames is {self.b_frames}; give 0 or more, and fewer than gop ({self.gop})"
            )

    @property
    def video_member(self) -> str:
        """Extension of the video member: every codec here sits in an MP4."""
        return "mp4"

    @property
    def audio_member(self) -> str:
        """Extension of the audio member: `flac`, or `opus` (in Ogg)."""
        return self.audio_codec

    @property
    def members(self) -> tuple[str, str, str]:
        return self.video_member, self.audio_member, "json"

    def is_rate(self, fps: float) -> bool:
        """Whether clips of `fps` frames a second are of this profile: foreign ones may be a thousandth slower than `fps` says
        (NTSC's 30000/1001, 29.97 for short), and their rate may be rounded."""
        near = (fps / self.fps, 1.001 * fps / self.fps)
        return fps == self.fps or (self.name == FOREIGN and any(abs(ratio - 1) < _ROUNDED for ratio in near))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Profile:
        """Raises ValueError for a field this version does not know."""
        unknown = sorted(set(data) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(
                f"profile has unknown fields {', '.join(unknown)}; it was written by a newer cmacc: upgrade to read it"
            )
        return cls(**data)


PROFILES = {
    p.name: p
    for p in (
        Profile(),
        Profile(name="h264-dense", gop=8, b_frames=0),
        Profile(name="mjpeg", codec="mjpeg", gop=1, b_frames=0, quality=5),
        Profile(name="vp9", codec="vp9", b_frames=0, quality=33),
    )
}


def profile(name: str, **changes: Any) -> Profile:
    """The named profile with some fields changed, e.g. `profile("h264", short_side=112, fps=16, gop=16)`."""
    if name not in PROFILES:
        raise ValueError(f"profile {name!r} is not known; use one of {', '.join(PROFILES)}")
    return replace(PROFILES[name], **{k: v for k, v in changes.items() if v is not None})
