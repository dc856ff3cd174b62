"""A source video as a stream of pictures and sound on one clock, whatever its container makes of time."""

from __future__ import annotations

import heapq
import io
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import av
import numpy as np
from av.audio.fifo import AudioFifo
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame

from cmacc.ingest.causes import Cause, IngestFailure
from cmacc.ingest.ranges import Meter

log = logging.getLogger(__name__)

Sound = np.ndarray[tuple[int], np.dtype[np.float32]]
File = Path | io.RawIOBase | BinaryIO  # an object must be seekable
# a file may be a playlist in disguise: no protocol but `file`; a hole in an MPEG stream is no reason to end there
_OPEN = {"protocol_whitelist": "file", "resync_size": str(64 << 20)}
_ATTACHED_PICTURE = 0x400
_PLAYLISTS = {"hls", "dash", "concat", "imf"}
_CLOCKLESS = {"avi"}  # packets carry a frame number, which names neither a time of sound nor the order of display
_EXACT_SEEK = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
_JITTER_S = 0.03
_BLOCK = 16_384  # samples resampled at once
_STRAGGLERS = 17  # after damage a decoder lets go of 16 older frames at most; more in a row, and the clock itself went back


class Picture(NamedTuple):
    """A decoded frame, on display from time_s (seconds from the origin of the file) for duration_s (0 when unknown).

    at: time_s, for comparisons that may be off by a rounding error; exact arithmetic costs more than scaling a small frame.
    """

    time_s: Fraction
    at: float
    duration_s: float
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


@dataclass
class Media:
    """A source video to be read: all of it in `picture`, unless `sound` is a file of its own. meter: what it cost so far."""

    picture: File
    sound: File | None = None
    meter: Meter = field(default_factory=Meter)

    @property
    def bytes(self) -> int:
        """Downloaded so far."""
        return self.meter.bytes


class _Reader:
    """A file object as FFmpeg bears it: where reading fails the file ends, and `failure` says why."""

    def __init__(self, file: io.RawIOBase | BinaryIO) -> None:
        self.file = file
        self.name = str(getattr(file, "name", ""))
        self.tell, self.seekable = file.tell, file.seekable
        self.failure: IngestFailure | None = None
        file.seek(0)

    def read(self, count: int) -> bytes:
        try:
            return self.file.read(count) or b""
        except IngestFailure as failure:
            self.failure = failure
            return b""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)


class _Opened:
    """An open file on a clock that begins with it."""

    def __init__(self, file: File) -> None:
        self.reader = None if isinstance(file, Path) else _Reader(file)
        self.name = file.name if isinstance(file, Path) else getattr(file, "name", "")
        try:
            what: Any = self.reader or str(file)
            self.container: InputContainer = av.open(what, metadata_errors="ignore", container_options=_OPEN)
        except (FFmpegError, ValueError) as error:
            self.check()
            raise IngestFailure(Cause.UNDECODABLE, f"not a media file that can be opened: {_says(error)}") from error
        self.clockless = self.container.format.name in _CLOCKLESS
        self.exact_seek = self.container.format.name in _EXACT_SEEK
        # MPEG streams start anywhere on their clock; a file that starts before zero has zero as its origin
        self.origin = max(Fraction(self.container.start_time or 0, 1_000_000), Fraction(0))
        self.duration_s = Fraction(self.container.duration, 1_000_000) if self.container.duration else None

    def check(self) -> None:
        """Raises IngestFailure when reading has failed: what came of it may be anything."""
        if self.reader is not None and self.reader.failure is not None:
            raise self.reader.failure

    def seek(self, time_s: Fraction) -> None:
        try:
            self.container.seek(int((time_s + self.origin) * 1_000_000), backward=True)
        except FFmpegError as error:
            log.debug("no seek in %s: %s", self.name, error)

    def timed(self, *streams: Any) -> Iterator[tuple[float, Packet]]:
        """Packets as they lie in the file, each with its seconds from the origin, or those of the one before it."""
        at = 0.0
        for packet in self.packets(*streams):
            if packet.dts is not None and packet.time_base is not None:
                at = float(packet.dts * packet.time_base - self.origin)
            yield at, packet

    def packets(self, *streams: Any) -> Iterator[Packet]:
        """Packets as they lie in the file."""
        try:
            for packet in self.container.demux(*streams):
                self.check()
                if packet.has_sidedata("encryption_info"):
                    raise IngestFailure(Cause.ENCRYPTED, "the file is encrypted")
                yield packet
        except FFmpegError as error:
            log.debug("%s ends early: %s", self.name, error)
        self.check()


class Source:
    """An open source video: the two streams a clip is made of, of one file or each of its own.

    Two files stand on one clock as a muxer would put them there: each begins at zero.
    """

    def __init__(self, picture: _Opened, sound: _Opened, threads: int) -> None:
        self.files = (picture,) if sound is picture else (picture, sound)
        self.picture, self.sound = picture, sound
        self.video = _stream(picture.container, "video")
        self.audio = _stream(sound.container, "audio")
        self.clockless = picture.clockless
        self.exact_seek = all(file.exact_seek for file in self.files)
        self.duration_s = max((file.duration_s for file in self.files if file.duration_s), default=None)
        self.aspect = _aspect(self.video)
        self.video.codec_context.thread_count = threads

    def seek(self, time_s: Fraction) -> None:
        """Go to a keyframe at or before time_s, if the container can. Where it really went, the first picture tells."""
        for file in self.files:
            file.seek(time_s)

    def span(self) -> tuple[Fraction, Fraction]:
        """Seconds from the origin (first, last) that picture and sound both cover, read off the packets without decoding."""
        spans: dict[bool, tuple[Fraction, Fraction]] = {}
        for picture, packet in self._packets():
            stamp = packet.dts if self.clockless or packet.pts is None else packet.pts
            if stamp is None or packet.is_discard or (self.clockless and not picture):
                continue
            begin = stamp * packet.time_base - (self.picture if picture else self.sound).origin
            end = begin + (packet.duration or 0) * packet.time_base
            first, last = spans.get(picture, (None, end))
            if first is None and picture and not packet.is_keyframe:
                continue
            spans[picture] = (begin if first is None else min(first, begin), max(last, end))
        if True not in spans:
            raise IngestFailure(Cause.UNDECODABLE, "the picture stream holds no keyframe")
        if False not in spans and not self.clockless:
            raise IngestFailure(Cause.NO_AUDIO, "the sound stream holds nothing")
        return max(first for first, _ in spans.values()), min(last for _, last in spans.values())

    def play(self, rate: int) -> Iterator[Picture | Samples | Trouble]:
        """Decode from here on: pictures in order of display, sound at `rate` Hz, and what went wrong, as they come."""
        pictures, sound = _Pictures(self.picture), _Sounds(self.sound, rate)
        for picture, packet in self._packets():
            yield from pictures.feed(packet) if picture else sound.feed(packet)
        yield from sound.flush()

    def _packets(self) -> Iterator[tuple[bool, Packet]]:
        """Whether it is of the picture, and the packet; of two files by time, of one as they lie there."""
        if self.sound is self.picture:
            packets: Iterable[Packet] = self.picture.packets(self.video, self.audio)
        else:
            both = heapq.merge(self.picture.timed(self.video), self.sound.timed(self.audio), key=itemgetter(0))
            packets = (packet for _, packet in both)
        for packet in packets:
            # not packet.stream_index: a packet that flushes a decoder has 0 there, whichever stream it is of
            yield packet.stream.type == "video", packet


@contextmanager
def open_source(media: Media, threads: int = 1) -> Iterator[Source]:
    """Open a source video. Raises IngestFailure: undecodable, encrypted, no-video, no-audio, or why it cannot be read."""
    with ExitStack() as stack:
        opened = []
        for file in (media.picture, media.sound):
            if file is not None:
                opened.append(_Opened(file))
                stack.enter_context(opened[-1].container)
        for each in opened:
            if each.container.format.name in _PLAYLISTS:
                raise IngestFailure(Cause.UNDECODABLE, f"a playlist ({each.container.format.name}), not a media file")
            each.check()
        yield Source(opened[0], opened[-1], threads)


def declared_s(file: File) -> float | None:
    """Seconds that a media file says it lasts, if it says so. Raises IngestFailure."""
    opened = _Opened(file)
    with opened.container:
        return None if opened.duration_s is None else float(opened.duration_s)


def _stream(container: InputContainer, kind: str) -> Any:
    """The default, else the first, stream of this kind (video, audio) that has a decoder."""
    if container.start_time is None:
        raise IngestFailure(Cause.UNDECODABLE, "the file holds no picture and no sound, or only their headers")
    named = [s for s in container.streams if s.type == kind and not int(s.disposition) & _ATTACHED_PICTURE]
    what, cause = {"video": ("picture", Cause.NO_VIDEO), "audio": ("sound", Cause.NO_AUDIO)}[kind]
    if not named:
        raise IngestFailure(cause, f"the file has no {what}")
    found = [s for s in named if s.codec_context is not None]
    if not found:
        raise IngestFailure(Cause.UNDECODABLE, f"there is no decoder for the {what}")
    return min(found, key=lambda s: (not int(s.disposition) & 1, s.index))


def _aspect(video: Any) -> Fraction:
    """Width of a pixel over its height; 1 when the file says nothing sensible."""
    aspect = video.sample_aspect_ratio or Fraction(1)
    return aspect if Fraction(1, 4) <= aspect <= 4 else Fraction(1)


class _Pictures:
    """Decoded frames with their times, ascending: a frame that comes after its time is dropped."""

    def __init__(self, file: _Opened) -> None:
        self.file = file
        self.last: Fraction | None = None
        self.late = 0

    def feed(self, packet: Packet) -> Iterator[Picture | Trouble]:
        """What a packet lets the decoder give: pictures, or why it does not decode."""
        try:
            frames: list[VideoFrame] = packet.decode()
        except (FFmpegError, ValueError) as error:
            yield Trouble(True, Cause.UNDECODABLE, f"the picture does not decode: {_says(error)}")
            return
        for frame in frames:
            stamp, unit = frame.dts if self.file.clockless or frame.pts is None else frame.pts, frame.time_base
            if stamp is None or unit is None:
                continue
            time_s = stamp * unit - self.file.origin if self.file.origin else stamp * unit
            if self.last is not None and time_s <= self.last:
                self.late += 1
                if self.late < _STRAGGLERS:
                    continue
                yield Trouble(True, Cause.DESYNC, f"the picture's clock jumps back by {float(self.last - time_s):.1f} s")
            self.last, self.late = time_s, 0
            yield Picture(time_s, float(time_s), (frame.duration or 0) * unit.numerator / unit.denominator, frame)


class _Sounds:
    """Decoded sound as mono at one rate, each piece numbered by time; small jitter of the stamps is not followed."""

    def __init__(self, file: _Opened, rate: int) -> None:
        self.file = file
        self.rate = rate
        self.resampler: AudioResampler | None = None
        self.block = AudioFifo()  # what waits to be resampled: a call for each small frame would cost more than the work
        self.shape: tuple[Any, ...] = ()
        self.begun_s: Fraction | None = None  # where this stretch of sound begins
        self.taken = 0  # samples of it so far, at its own rate
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
        if self.begun_s is None:
            self.unplaced.append(frame)
            if stamp is None:
                return  # some containers stamp only every few frames: the first stamp places those before it
            frames, self.unplaced = self.unplaced, []
            self.begun_s = stamp - sum(Fraction(f.samples, f.sample_rate) for f in frames[:-1])
            for each in frames:
                yield from self._take(each)
            return
        if stamp is not None and self.shape:
            ahead_s = float(stamp) - float(self.begun_s) - self.taken / self.shape[2]
            if abs(ahead_s) > _JITTER_S:
                if ahead_s < -1:
                    yield Trouble(False, Cause.DESYNC, f"the sound's clock jumps back by {-ahead_s:.1f} s")
                yield from self._begin(stamp)
        yield from self._take(frame)

    def _stamp(self, frame: AudioFrame) -> Fraction | None:
        if frame.pts is None or frame.time_base is None or (self.file.clockless and self.begun_s is not None):
            return None
        stamp = frame.pts * frame.time_base
        return stamp - self.file.origin if self.file.origin else stamp

    def _take(self, frame: AudioFrame) -> Iterator[Samples | Trouble]:
        assert self.begun_s is not None
        shape = (frame.format.name, frame.layout.name, frame.sample_rate)
        if shape != self.shape:
            if self.shape:
                yield from self._begin(self.begun_s + Fraction(self.taken, self.shape[2]))
            self.shape = shape
        self.taken += frame.samples
        frame.pts = None
        self.block.write(frame)
        if self.block.samples >= _BLOCK:
            yield from self._resample()

    def _begin(self, at_s: Fraction) -> Iterator[Samples | Trouble]:
        """End this stretch of sound; another begins at at_s."""
        yield from self.flush()
        self.begun_s, self.taken = at_s, 0

    def _resample(self) -> Iterator[Samples | Trouble]:
        assert self.begun_s is not None
        if self.resampler is None:
            # without it, floating-point sound is summed up to 3 dB louder than its channels
            options = {"rematrix_maxval": "1.0"}
            self.resampler = AudioResampler(format="fltp", layout="mono", rate=self.rate, options=options)
            self.next_out = round(self.begun_s * self.rate)
        frame = self.block.read()
        if frame is None:
            return
        frame.pts = None
        try:
            yield from self._number(self.resampler.resample(frame))
        except (FFmpegError, ValueError) as error:
            # damage made channels of it that nobody can mix: this much is lost, what follows has its place
            self.resampler, self.begun_s, self.taken = None, self.begun_s + Fraction(self.taken, self.shape[2]), 0
            yield Trouble(False, Cause.UNDECODABLE, f"the sound cannot be mixed to one channel: {_says(error)}")

    def flush(self) -> Iterator[Samples | Trouble]:
        """Give what is still held of this stretch."""
        if self.block.samples:
            yield from self._resample()
        if self.resampler is not None:
            yield from self._number(self.resampler.resample(None))
        self.resampler, self.block = None, AudioFifo()

    def _number(self, frames: Sequence[AudioFrame | None]) -> Iterator[Samples]:
        for frame in frames:
            if frame is not None:
                yield Samples(self.next_out, frame.to_ndarray()[0])
                self.next_out += frame.samples


def _says(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error).lower()[:120]
