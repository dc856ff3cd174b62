"""A clip's media members as one file that a browser plays, and its pictures.

What a browser knows is copied, packet by packet; the rest is encoded anew, small.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Any

import av
from PIL import Image

from cmacc.shards.clip import AUDIO, VIDEO
from cmacc.shards.page.pictures import LONGEST_S, film, first_stream, frames, log_mel_picture, open_media, sound, strip

PICTURES = ("jpg", "jpeg", "png", "webp")
TEXT = ("txt", "caption", "text")
_COPIED = {"h264": ("yuv420p", "yuvj420p"), "vp9": ("yuv420p",), "av1": ("yuv420p",)}
_COPIED_SOUND = ("flac", "opus", "aac")
_COPY_BYTES = 4 << 20  # a larger clip is made small for the page
_SIDE = 256  # pixels of the shorter side of what is encoded anew
_POSTER = 288
_THUMB = 72
# what PyAV and Pillow make of damaged bytes
_UNDECODABLE = (av.FFmpegError, ValueError, ArithmeticError, LookupError, OSError, SyntaxError, Image.DecompressionBombError)
_STRIP = 9.0  # width of a strip in its height, about


@dataclass(frozen=True)
class Preview:
    """What a page shows of a clip. Pictures are None where the clip has none; play: an MP4, None where nothing plays.

    video_s, sound_s: how long each is, seconds, 0 where there is none. rate: Hz of the sound. troubles: sentences.
    """

    poster: bytes | None = None
    strip: bytes | None = None
    mel: bytes | None = None
    play: bytes | None = None
    video_s: float = 0.0
    sound_s: float = 0.0
    rate: int = 0
    troubles: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """How long it plays, never 0."""
        return max(self.video_s, self.sound_s, 0.01)


def preview(members: dict[str, bytes]) -> Preview:
    """Pictures and a playable file from the members of a clip, by extension. Never raises for what is in them."""
    video = first_of(members, VIDEO)
    audio = first_of(members, AUDIO)
    troubles: list[str] = []
    shown: dict[str, Any] = {}
    if video:
        shown |= _tried(_of_video, video, members, troubles)
    elif picture := first_of(members, PICTURES):
        shown |= _tried(_of_picture, picture, members, troubles)
    heard = audio or (video if video and _has_sound(members[video]) else None)
    if heard:
        shown |= _tried(_of_sound, heard, members, troubles)
    if not (video or audio or shown or troubles):
        troubles.append(f"there is nothing to see or hear among its members ({', '.join(members) or 'none'})")
    seen = members[video] if video and "video_s" in shown else None
    listened = members[heard] if heard and "sound_s" in shown else None
    if seen or listened:
        try:
            shown["play"] = playable(seen, listened)
        except _UNDECODABLE as e:
            troubles.append(f"it cannot be played here ({_reason(e)})")
    return Preview(**shown, troubles=tuple(troubles))


def kind_of(member: str) -> str:
    """`mp4` for the extensions `mp4`, `MP4` and `video.mp4`."""
    return member.rpartition(".")[2].lower()


def first_of(members: dict[str, bytes], kinds: tuple[str, ...]) -> str | None:
    """The first member of a kind that holds anything, in the order of `kinds`."""
    there = [m for m, data in members.items() if data]
    return next((m for kind in kinds for m in there if kind_of(m) == kind), None)


def playable(video: bytes | None, audio: bytes | None) -> bytes:
    """One MP4 with the picture of one file and the sound of another (or the same); None: without it.

    H.264, VP9, AV1, FLAC, Opus and AAC are copied; others, and what is too large, become H.264 of 256 pixels and AAC.
    Not more than the first 60 s. Raises av.FFmpegError or ValueError.
    """
    small = len(video or b"") + len(audio or b"") * (audio is not video) <= _COPY_BYTES
    if small:
        with suppress(*_UNDECODABLE):  # AVI and Matroska have not every time that an MP4 wants
            return _muxed(video, audio, copied=True)
    return _muxed(video, audio, copied=False)


def _muxed(video: bytes | None, audio: bytes | None, *, copied: bool) -> bytes:
    out = io.BytesIO()
    with ExitStack() as held:
        made = held.enter_context(av.open(out, "w", format="mp4"))
        packets: list[tuple[float, Any]] = []
        if video is not None:
            packets += _picture_packets(held.enter_context(open_media(video)), made, copied)
        if audio is not None:
            packets += _sound_packets(held.enter_context(open_media(audio)), made, copied)
        for _, packet in sorted(packets, key=lambda pair: pair[0]):
            made.mux(packet)
    return out.getvalue()


def _picture_packets(file: Any, made: Any, copied: bool) -> Iterator[tuple[float, Any]]:
    stream = first_stream(file.streams.video, "picture")
    context = stream.codec_context
    if copied and context.pix_fmt in _COPIED.get(context.codec.canonical_name, ()):
        yield from _copies(file, stream, made)
        return
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    scale = min(1.0, _SIDE / min(context.width, context.height))
    into = made.add_stream("libx264", rate=rate, options={"preset": "veryfast", "crf": "26", "threads": "1"})
    into.width, into.height = (max(2, round(side * scale / 2) * 2) for side in (context.width, context.height))
    into.pix_fmt = "yuv420p"
    into.codec_context.time_base = stream.time_base
    first = last = None
    for frame in file.decode(stream):
        # frames come in the order in which they are shown; an AVI's times do not always
        at = (last or 0) + 1 if frame.pts is None else frame.pts if last is None else max(frame.pts, last + 1)
        first, last = at if first is None else first, at
        if (at - first) * stream.time_base >= LONGEST_S:
            break
        small = frame.reformat(width=into.width, height=into.height, format="yuv420p", dst_color_range="MPEG")
        small.pts, small.time_base, small.pict_type = at - first, stream.time_base, av.video.frame.PictureType.NONE
        yield from _timed(into.encode(small))
    yield from _timed(into.encode(None))


def _sound_packets(file: Any, made: Any, copied: bool) -> Iterator[tuple[float, Any]]:
    stream = first_stream(file.streams.audio, "sound")
    if copied and stream.codec_context.codec.canonical_name in _COPIED_SOUND:
        yield from _copies(file, stream, made)
        return
    rate = min(stream.codec_context.sample_rate, 48_000)
    into = made.add_stream("aac", rate=rate, layout="mono" if stream.codec_context.channels == 1 else "stereo")
    into.bit_rate = 96_000
    resampler = av.AudioResampler(format=into.format, layout=into.layout, rate=rate, frame_size=1024)
    samples = 0
    for frame in chain(_till_longest(file.decode(stream)), [None]):
        for part in resampler.resample(frame):
            part.pts, part.time_base = samples, Fraction(1, rate)
            samples += part.samples
            yield from _timed(into.encode(part))
    yield from _timed(into.encode(None))


def _till_longest(frames: Iterator[Any]) -> Iterator[Any]:
    seconds = 0.0
    for frame in frames:
        frame.pts = None  # gaps in the times of a damaged file are none in its sound
        yield frame
        seconds += frame.samples / frame.sample_rate
        if seconds >= LONGEST_S:
            return


def _copies(file: Any, stream: Any, made: Any) -> Iterator[tuple[float, Any]]:
    into = made.add_stream_from_template(stream)
    first = None
    for packet in file.demux(stream):
        if not packet.size:
            continue  # the end
        if packet.dts is None:
            raise ValueError("a packet has no time")
        at = float(packet.dts * packet.time_base)
        first = at if first is None else first
        if at - first >= LONGEST_S:
            break
        packet.stream = into
        yield at, packet


def _timed(packets: list[Any]) -> Iterator[tuple[float, Any]]:
    for packet in packets:
        yield float(packet.dts * packet.time_base), packet


def _of_video(data: bytes) -> dict[str, Any]:
    known = film(data)
    chosen = frames(data, min(16, max(4, round(_STRIP * known.height / known.width))), _POSTER)
    return {"video_s": known.seconds, "poster": _jpeg(chosen[len(chosen) // 2]), "strip": _jpeg(strip(chosen, _THUMB))}


def _of_picture(data: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as picture:
        picture.thumbnail((2 * _POSTER, _POSTER))
        return {"poster": _jpeg(picture.convert("RGB"))}


def _of_sound(data: bytes) -> dict[str, Any]:
    heard = sound(data)
    picture = io.BytesIO()
    log_mel_picture(heard).save(picture, format="PNG", optimize=True)
    return {"sound_s": heard.seconds, "rate": heard.rate, "mel": picture.getvalue()}


def _jpeg(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, format="JPEG", quality=80)
    return out.getvalue()


def _tried(make: Any, member: str, members: dict[str, bytes], troubles: list[str]) -> dict[str, Any]:
    try:
        return dict(make(members[member]))
    except _UNDECODABLE as e:
        troubles.append(f"its {member} cannot be decoded ({_reason(e)})")
        return {}


def _reason(error: Exception) -> str:
    return str(error.strerror if isinstance(error, OSError) and error.strerror else error).rstrip(".") or type(error).__name__


def _has_sound(data: bytes) -> bool:
    with suppress(*_UNDECODABLE), open_media(data) as file:
        return bool(file.streams.audio)
    return False
