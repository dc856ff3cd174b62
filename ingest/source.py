"""A source video as a stream of pictures and sound on one clock, whatever its container makes of time."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame

from cmacc.ingest.causes import Cause, IngestFailure

log = logging.getLogger(__name__)

Sound = np.ndarray[tuple[int], np.dtype[np.float32]]
# a file may be a playlist in disguise: no protocol but `file`; a hole in an MPEG stream is no reason to end there
_OPEN = {"protocol_whitelist": "file", "resync_size": str(64 << 20)}
_ATTACHED_PICTURE = 0x400
_PLAYLISTS = {"hls", "dash", "concat", "imf"}
_CLOCKLESS = {"avi"}  # packets carry a frame number, which names neither a time of sound nor the order of display
_EXACT_SEEK = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
_JITTER_S = Fraction(3, 100)
_STRAGGLERS = 17  # after damage a decoder lets go of 16 older frames at most; more in a row, and the clock itself went back


@dataclass(frozen=True)
class Picture:
    """A decoded frame, on display from time_s (seconds from the origin of the file) for duration_s (0 when unknown)."""

    time_s: Fraction
    duration_s: Fraction
    frame: VideoFrame


@dataclass(frozen=True)
class Samples:
    """Mono float32 sound; `first` is the number of its first sample, counted from the origin of the file."""

    first: int
    data: Sound


@dataclass(frozen=True)
class Trouble:
    """Something of the picture (or else the sound) that did not decode, or whose clock jumped back."""

    picture: bool
    cause: Cause
    detail: str


class Source:
    """An open source video: its container and the two streams a clip is made of."""

    def __init__(self, container: InputContainer, threads: int) -> None:
        self.container = container
        self.video, self.audio = _streams(container)
        self.clockless = container.format.name in _CLOCKLESS
        self.exact_seek = container.format.name in _EXACT_SEEK
        # MPEG streams start anywhere on their clock; a file that starts before zero has zero as its origin
        self.origin = max(Fraction(container.start_time or 0, 1_000_000), Fraction(0))
        self.duration_s = Fraction(container.duration, 1_000_000) if container.duration else None
        self.aspect = _aspect(self.video)
        self.video.codec_context.thread_count = threads

    def seek(self, time_s: Fraction) -> None:
        """Go to a keyframe at or before time_s, if the container can. Where it really went, the first picture tells."""
        try:
            self.container.seek(int((time_s + self.origin) * 1_000_000), backward=True)
        except FFmpegError as error:
            log.debug("no seek in %s: %s", self.container.name, error)

    def span(self) -> tuple[Fraction, Fraction]:
        """Seconds from the origin (first, last) that picture and sound both cover, read off the packets without decoding."""
        spans: dict[int, tuple[Fraction, Fraction]] = {}
        for packet in self._packets():
            stamp = packet.dts if self.clockless or packet.pts is None else packet.pts
            picture = packet.stream_index == self.video.index
            if stamp is None or packet.is_discard or (self.clockless and not picture):
                continue
            begin = stamp * packet.time_base - self.origin
            end = begin + (packet.duration or 0) * packet.time_base
            first, last = spans.get(packet.stream_index, (None, end))
            if first is None and picture and not packet.is_keyframe:
                continue
            spans[packet.stream_index] = (begin if first is None else min(first, begin), max(last, end))
        if self.video.index not in spans:
            raise IngestFailure(Cause.UNDECODABLE, "the picture stream holds no keyframe")
        if self.audio.index not in spans and not self.clockless:
            raise IngestFailure(Cause.NO_AUDIO, "the sound stream holds nothing")
        return max(first for first, _ in spans.values()), min(last for _, last in spans.values())

    def play(self, rate: int) -> Iterator[Picture | Samples | Trouble]:
        """Decode from here on: pictures in order of display, sound at `rate` Hz, and what went wrong, as they come."""
        pictures, sound = _Pictures(self), _Sounds(self, rate)
        for packet in self._packets():
            # not packet.stream_index: a packet that flushes a decoder has 0 there, whichever stream it is of
            if packet.stream.index == self.video.index:
                yield from pictures.feed(packet)
            else:
                yield from sound.feed(packet)
        yield from sound.flush()

    def _packets(self) -> Iterator[Packet]:
        try:
            for packet in self.container.demux(self.video, self.audio):
                if packet.has_sidedata("encryption_info"):
                    raise IngestFailure(Cause.ENCRYPTED, "the file is encrypted")
                yield packet
        except FFmpegError as error:
            log.debug("%s ends early: %s", self.container.name, error)


@contextmanager
def open_source(path: Path, threads: int = 1) -> Iterator[Source]:
    """Open a local file. Raises IngestFailure: undecodable, encrypted, no-video or no-audio."""
    try:
        container = av.open(str(path), metadata_errors="ignore", container_options=_OPEN)
    except (FFmpegError, ValueError) as error:
        raise IngestFailure(Cause.UNDECODABLE, f"not a media file that can be opened: {_says(error)}") from error
    with container:
        if container.format.name in _PLAYLISTS:
            raise IngestFailure(Cause.UNDECODABLE, f"a playlist ({container.format.name}), not a media file")
        yield Source(container, threads)


def _streams(container: InputContainer) -> tuple[Any, Any]:
    """The default, else the first, stream of pictures and of sound that has a decoder."""
    found: dict[str, list[Any]] = {"video": [], "audio": []}
    named: set[str] = set()
    for stream in container.streams:
        if stream.type in found and not int(stream.disposition) & _ATTACHED_PICTURE:
            named.add(stream.type)
            if stream.codec_context is not None:
                found[stream.type].append(stream)
    if container.start_time is None:
        raise IngestFailure(Cause.UNDECODABLE, "the file holds no picture and no sound, or only their headers")
    for kind, cause, what in (("video", Cause.NO_VIDEO, "picture"), ("audio", Cause.NO_AUDIO, "sound")):
        if kind not in named:
            raise IngestFailure(cause, f"the file has no {what}")
        if not found[kind]:
            raise IngestFailure(Cause.UNDECODABLE, f"there is no decoder for the {what}")
    video, audio = (min(found[kind], key=lambda s: (not int(s.disposition) & 1, s.index)) for kind in ("video", "audio"))
    return video, audio


def _aspect(video: Any) -> Fraction:
    """Width of a pixel over its height; 1 when the file says nothing sensible."""
    aspect = video.sample_aspect_ratio or Fraction(1)
    return aspect if Fraction(1, 4) <= aspect <= 4 else Fraction(1)


class _Pictures:
    """Decoded frames with their times, ascending: a frame that comes after its time is dropped."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.last: Fraction | None = None
        self.late = 0

    def feed(self, packet: Packet) -> Iterator[Picture | Trouble]:
        try:
            frames: list[VideoFrame] = packet.decode()
        except (FFmpegError, ValueError) as error:
            yield Trouble(True, Cause.UNDECODABLE, f"the picture does not decode: {_says(error)}")
            return
        for frame in frames:
            stamp = frame.dts if self.source.clockless or frame.pts is None else frame.pts
            if stamp is None or frame.time_base is None:
                continue
            time_s = stamp * frame.time_base - self.source.origin
            if self.last is not None and time_s <= self.last:
                self.late += 1
                if self.late < _STRAGGLERS:
                    continue
                yield Trouble(True, Cause.DESYNC, f"the picture's clock jumps back by {float(self.last - time_s):.1f} s")
            self.last, self.late = time_s, 0
            yield Picture(time_s, (frame.duration or 0) * frame.time_base, frame)


class _Sounds:
    """Decoded sound as mono at one rate, each piece numbered by time; small jitter of the stamps is not followed."""

    def __init__(self, source: Source, rate: int) -> None:
        self.source = source
        self.rate = rate
        self.resampler: AudioResampler | None = None
        self.shape: tuple[Any, ...] = ()
        self.next_s: Fraction | None = None  # where the next decoded sample belongs
        self.next_out = 0  # number of the next resampled one
        self.unplaced: list[AudioFrame] = []

    def feed(self, packet: Packet) -> Iterator[Samples | Trouble]:
        try:
            frames = cast(list[AudioFrame], packet.decode())
        except (FFmpegError, ValueError) as error:
            yield Trouble(False, Cause.UNDECODABLE, f"the sound does not decode: {_says(error)}")
            return
        for frame in frames:
            if frame.samples and frame.sample_rate:
                yield from self._place(frame)

    def _place(self, frame: AudioFrame) -> Iterator[Samples | Trouble]:
        stamp = self._stamp(frame)
        if self.next_s is None:
            self.unplaced.append(frame)
            if stamp is None:
                return  # some containers stamp only every few frames: the first stamp places those before it
            frames, self.unplaced = self.unplaced, []
            self.next_s = stamp - sum(Fraction(f.samples, f.sample_rate) for f in frames[:-1])
            for each in frames:
                yield from self._resample(each)
            return
        if stamp is not None and abs(stamp - self.next_s) > _JITTER_S:
            if self.next_s - stamp > 1:
                yield Trouble(False, Cause.DESYNC, f"the sound's clock jumps back by {float(self.next_s - stamp):.1f} s")
            yield from self.flush()
            self.next_s = stamp
        yield from self._resample(frame)

    def _stamp(self, frame: AudioFrame) -> Fraction | None:
        if frame.pts is None or frame.time_base is None or (self.source.clockless and self.next_s is not None):
            return None
        return frame.pts * frame.time_base - self.source.origin

    def _resample(self, frame: AudioFrame) -> Iterator[Samples]:
        assert self.next_s is not None
        shape = (frame.format.name, frame.layout.name, frame.sample_rate)
        if shape != self.shape:
            yield from self.flush()
            self.shape = shape
        if self.resampler is None:
            # without it, floating-point sound is summed up to 3 dB louder than its channels
            options = {"rematrix_maxval": "1.0"}
            self.resampler = AudioResampler(format="fltp", layout="mono", rate=self.rate, options=options)
            self.next_out = round(self.next_s * self.rate)
        self.next_s += Fraction(frame.samples, frame.sample_rate)
        frame.pts = None
        yield from self._number(self.resampler.resample(frame))

    def flush(self) -> Iterator[Samples]:
        """End this stretch of sound; the next frame begins another."""
        if self.resampler is not None:
            yield from self._number(self.resampler.resample(None))
            self.resampler = None

    def _number(self, frames: Sequence[AudioFrame | None]) -> Iterator[Samples]:
        for frame in frames:
            if frame is not None:
                yield Samples(self.next_out, frame.to_ndarray()[0])
                self.next_out += frame.samples


def _says(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error).lower()[:120]
