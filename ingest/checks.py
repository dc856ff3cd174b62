"""Read back what was written, and tell a clip that is worth nothing: a few small stages, a cause each."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import av
import numpy as np
from av.error import FFmpegError
from av.packet import Packet
from numpy.typing import NDArray

from cmacc.ingest.causes import Cause, IngestFailure
from cmacc.ingest.fingerprint import PICTURE_BITS, SOUND_BITS, Luma, fingerprint
from cmacc.ingest.offset import MAX_OFFSET_S, av_offset

Use = Literal["filter", "column", "off"]


@dataclass(frozen=True)
class Checks:
    """What is asked of a clip that was cut well, and what follows from the answer.

    `filter`: a clip that does not pass fails with the cause of that name. `column`: it is kept, and the catalog says what was
    measured. `off`: not even measured, but for loudness and motion, which every clip has. Near duplicates are known only
    among all the clips of a data set: here each gets its fingerprint, and who has all of them decides.

    silence_db: dBFS below which a clip is silent. still_motion: mean luma change a frame (0..255) below which it is still: an
    encoded still has 0.02, the least of moving recordings 0.14.
    desync_s, desync_trust: a clip is out of sync when its sound is known, with at least this trust (0..1), to be at least so many
    seconds early or late. near_picture_bits, near_sound_bits: of 192 and 64 bits of fingerprint, those that may differ between
    near duplicates.
    """

    silent: Use = "filter"
    still: Use = "filter"
    desync: Use = "column"
    near_duplicate: Use = "column"
    silence_db: float = -70.0
    still_motion: float = 0.05
    desync_s: float = 0.2
    desync_trust: float = 0.4
    near_picture_bits: int = PICTURE_BITS
    near_sound_bits: int = SOUND_BITS

    def __post_init__(self) -> None:
        for name in ("silent", "still", "desync", "near_duplicate"):
            if getattr(self, name) not in get_args(Use):
                raise ValueError(f"{name} is {getattr(self, name)!r}; give filter, column or off")
        for name, most in (("still_motion", 255), ("desync_s", MAX_OFFSET_S), ("desync_trust", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 to {most:g}")
        for name, bits in (("near_picture_bits", 192), ("near_sound_bits", 64)):
            if not 0 <= getattr(self, name) <= bits:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 to {bits}")
        if not self.silence_db <= 0:
            raise ValueError(f"silence_db is {self.silence_db}; give a level in dBFS, 0 or less")


@dataclass(frozen=True)
class Measures:
    """The measured ones among a clip's facts; see Facts."""

    loudness_db: float
    motion: float
    av_offset_s: float
    av_trust: float
    fingerprint: str


def check_video(data: bytes, n_frames: int, fps: int) -> tuple[int, ...]:
    """Frame numbers of the keyframes, after decoding the first, middle and last group of pictures.

    Raises IngestFailure (undecodable) unless there are n_frames frames, first a keyframe, and those groups decode in full.
    """
    try:
        with av.open(io.BytesIO(data), "r") as container:
            stream = container.streams.video[0]
            if len(container.streams) != 1:
                raise IngestFailure(Cause.UNDECODABLE, "the video as written holds more than its picture")
            packets = [packet for packet in container.demux(stream) if packet.size]
            groups = _groups(packets)
            for index in sorted({0, len(groups) // 2, len(groups) - 1}):
                stream.codec_context.flush_buffers()
                decoded = sum(len(packet.decode()) for packet in groups[index]) + len(stream.codec_context.decode(None))
                if decoded != len(groups[index]):
                    raise IngestFailure(Cause.UNDECODABLE, f"of {len(groups[index])} written frames {decoded} decode")
            starts = [packet for packet in packets if packet.is_keyframe]
            keyframes = tuple(round((packet.pts or 0) * packet.time_base * fps) for packet in starts)
    except (FFmpegError, IndexError) as error:
        raise IngestFailure(Cause.UNDECODABLE, f"the video as written does not decode: {error}") from error
    if len(packets) != n_frames or keyframes[:1] != (0,):
        raise IngestFailure(Cause.UNDECODABLE, f"{len(packets)} frames were written instead of {n_frames}")
    return keyframes


def _groups(packets: list[Packet]) -> list[list[Packet]]:
    groups: list[list[Packet]] = []
    for packet in packets:
        if packet.is_keyframe or not groups:
            groups.append([])
        groups[-1].append(packet)
    return groups


def check_audio(data: bytes, n_samples: int) -> None:
    """Raises IngestFailure (undecodable) unless the audio decodes to n_samples samples."""
    try:
        with av.open(io.BytesIO(data), "r") as container:
            decoded = sum(frame.samples for frame in container.decode(audio=0))
    except (FFmpegError, IndexError) as error:
        raise IngestFailure(Cause.UNDECODABLE, f"the sound as written does not decode: {error}") from error
    if decoded != n_samples:
        raise IngestFailure(Cause.UNDECODABLE, f"{decoded} samples were written instead of {n_samples}")


def loudness_db(sound: NDArray[np.float32]) -> float:
    """RMS of float32 sound, dBFS; -120 for digital silence."""
    power = float(np.mean(np.square(sound, dtype=np.float64))) if len(sound) else 0.0
    return max(-120.0, 10 * float(np.log10(max(power, 1e-12))))


def measure(
    sound: NDArray[np.float32],
    rate: int,
    changes: Sequence[float],
    lumas: Sequence[Luma],
    fps: int,
    checks: Checks,
) -> Measures:
    """What is known of a clip by looking and listening.

    sound: mono, at `rate` Hz. changes: of each frame, the mean luma change from the one before. lumas: of those `looks` names.
    """
    offset_s, trust = av_offset(np.array(changes), sound, rate, fps) if checks.desync != "off" else (0.0, 0.0)
    return Measures(
        loudness_db=round(loudness_db(sound), 2),
        motion=round(sum(changes) / max(len(changes) - 1, 1), 4),
        av_offset_s=round(offset_s, 4),
        av_trust=round(trust, 4),
        fingerprint=fingerprint(lumas, sound, rate) if checks.near_duplicate != "off" else "",
    )


def check_worth(found: Measures, checks: Checks) -> None:
    """Raises IngestFailure for the first stage that is a filter and does not pass: silent, still or desync."""
    if checks.silent == "filter" and found.loudness_db < checks.silence_db:
        raise IngestFailure(Cause.SILENT, f"the sound is at {found.loudness_db:.0f} dBFS, below {checks.silence_db:.0f}")
    if checks.still == "filter" and found.motion < checks.still_motion:
        raise IngestFailure(Cause.STILL, f"the picture stands still: its luma changes by {found.motion:.3f} of 255 a frame")
    if checks.desync == "filter" and found.av_trust >= checks.desync_trust and abs(found.av_offset_s) >= checks.desync_s:
        late = "late" if found.av_offset_s > 0 else "early"
        raise IngestFailure(
            Cause.DESYNC, f"the sound comes {abs(found.av_offset_s):.2f} s {late} (trust {found.av_trust:.2f} of 1)"
        )
