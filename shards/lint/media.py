"""Can a clip be decoded, and is it what its facts and the profile say?"""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av

from cmacc.shards.clip import AUDIO, VIDEO, Facts
from cmacc.shards.dataset import Dataset
from cmacc.shards.errors import DatasetError
from cmacc.shards.facts import facts_from_json
from cmacc.shards.lint.faults import Fault
from cmacc.shards.profile import Profile

_SOUND_TOLERANCE_S = 0.1
_OPUS_RATE = 48_000  # whatever went in
_Wrong = tuple[str, str] | None


def media_faults(dataset: Dataset, row: int) -> Iterator[Fault]:
    """Checksums of one clip's members, then what a decoder makes of them: all packets, the first frame and the first sound."""
    key = str(dataset.catalog.texts("key", slice(row, row + 1))[0])
    name = dataset.meta.shards[int(dataset.shard_of_row[row])].name
    mend = f"leave it out by `cmacc reshard` --where \"key <> '{key}'\""
    try:
        found = dataset.read(row, check=True)
        facts = None if dataset.meta.foreign else facts_from_json(found["json"])
    except (DatasetError, ValueError) as e:
        yield Fault("checksum", f"{name}: {key}", str(e))
        return
    for member, data in found.items():
        where = f"{key}.{member}"
        if member not in VIDEO and member not in AUDIO:
            continue
        try:
            if facts is None:
                wrong = _foreign(data)
            elif member == dataset.profile.video_member:
                wrong = _video(dataset.profile, facts, data)
            else:
                wrong = _sound(dataset.profile, facts, data)
        except (av.FFmpegError, EOFError, ValueError, IndexError, StopIteration) as e:
            yield Fault("decode", where, f"{where} in {name} cannot be decoded ({type(e).__name__}: {e}); {mend}")
            continue
        if wrong:
            yield Fault(wrong[0], where, f"{where} in {name} {wrong[1]}; {mend}")


def _only(file: Any, kind: str) -> Any:
    """The one stream of a member, None when there is another or more."""
    streams = file.streams
    return streams[0] if len(streams) == 1 and streams[0].type == kind else None


def _video(profile: Profile, facts: Facts, data: bytes) -> _Wrong:
    with av.open(io.BytesIO(data), "r") as file:
        stream = _only(file, "video")
        if stream is None:
            return "decode", "should hold one video stream and nothing else"
        if stream.codec.canonical_name != profile.codec:
            return "decode", f"is {stream.codec.canonical_name}, the profile says {profile.codec}"
        frame = next(file.decode(stream))
        if (frame.width, frame.height) != (facts.width, facts.height):
            return "decode", f"has frames of {frame.width} x {frame.height}, its facts say {facts.width} x {facts.height}"
        if min(frame.width, frame.height) > profile.short_side:
            return "decode", f"has frames of {frame.width} x {frame.height}, the profile's short side is {profile.short_side}"
        file.seek(0)
        packets = [p for p in file.demux(stream) if p.pts is not None]
        seconds = float((stream.duration or 0) * (stream.time_base or 0))
        if len(packets) != facts.n_frames or abs(seconds - facts.duration_s) > 1 / facts.fps:
            said = f"{facts.n_frames} and {facts.duration_s:.3f} s"
            return "duration", f"has {len(packets)} frames and lasts {seconds:.3f} s, its facts say {said}"
        return _groups(profile, facts, packets)


def _groups(profile: Profile, facts: Facts, packets: list[Any]) -> _Wrong:
    """Frame rate and groups of pictures, from packets in the order they are decoded in."""
    shown = sorted(packets, key=lambda p: p.pts)
    if not profile.is_rate(facts.fps):
        return "decode", f"has {facts.fps:g} frames a second by its facts, the profile says {profile.fps}"
    exact = facts.fps == profile.fps  # else the container's clock need not have its instants
    rate = Fraction(profile.fps) if exact else Fraction(facts.fps)
    if any(abs((p.pts - shown[0].pts) * p.time_base - i / rate) > (0 if exact else p.time_base) for i, p in enumerate(shown)):
        return "decode", f"has frames that are not 1/{facts.fps:g} s apart"
    keyframes = [i for i, p in enumerate(shown) if p.is_keyframe]
    if keyframes != list(facts.keyframes):
        return "decode", f"has keyframes {_some(keyframes)}, its facts say {_some(facts.keyframes)}"
    ends = [*keyframes[1:], len(shown)]
    longest = max((b - a for a, b in zip(keyframes, ends, strict=True)), default=0)
    if longest > profile.gop:
        return "decode", f"has {longest} frames from one keyframe to the next, the profile says {profile.gop}"
    if not profile.b_frames and shown != packets:
        return "decode", "has frames that are decoded in another order than shown, the profile has no B-frames"
    return None


def _some(numbers: Any) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


def _sound(profile: Profile, facts: Facts, data: bytes) -> _Wrong:
    with av.open(io.BytesIO(data), "r") as file:
        stream = _only(file, "audio")
        if stream is None:
            return "decode", "should hold one audio stream and nothing else"
        if stream.codec.canonical_name != profile.audio_codec:
            return "decode", f"is {stream.codec.canonical_name}, the profile says {profile.audio_codec}"
        next(file.decode(stream))
        rate = _OPUS_RATE if profile.audio_codec == "opus" else profile.audio_rate
        if (stream.rate, stream.channels) != (rate, 1):
            return "decode", f"has {stream.channels} channels at {stream.rate} Hz, the profile says 1 at {rate}"
        seconds = float((stream.duration or 0) * (stream.time_base or 0))
        if abs(seconds - facts.duration_s) > _SOUND_TOLERANCE_S:
            return "duration", f"lasts {seconds:.3f} s, the video {facts.duration_s:.3f} s"
    return None


def _foreign(data: bytes) -> _Wrong:
    """Picture, sound, or both in one member, in whatever way: they can be decoded."""
    with av.open(io.BytesIO(data), "r") as file:
        streams = [s for s in file.streams if s.type in ("video", "audio")]
        if not streams:
            return "decode", "holds neither picture nor sound"
        for stream in streams:
            file.seek(0)
            next(file.decode(stream))
    return None
