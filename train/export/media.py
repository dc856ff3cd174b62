"""Sound and frames of any media file, by PyAV alone: what there is to prepare where there is no DALI."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmacc.train.loading.frames import Box, Finish

LONGEST_S = 600.0
"""Of a longer sound or film, the first ten minutes are looked at."""
UNDECODABLE = (av.error.FFmpegError, ValueError, IndexError, ArithmeticError)
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flac,wav,w64,aiff,mp3,aac,ogg,mpegts,mpeg,mpegvideo,asf,flv,ac3,amr,rm,dv,caf"
)
# a file may be a playlist in disguise: no such format, and no protocol at all
_OPEN = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
_EARLY = 0.25
"""Of the frame interval: a frame that comes this much after an instant is taken to be on screen at it."""
_SEEK_S = 5.0  # a film is decoded from its beginning if no more than so much lies before what is wanted

Source = str | os.PathLike[str] | bytes


class Film(NamedTuple):
    """frames: how many, of the first ten minutes; fps: how many a second, on average; height, width: as they lie in the file,
    pixels; aspect: width of a pixel over its height; start: time stamp of the first frame, None where they have none."""

    frames: int
    fps: float
    height: int
    width: int
    aspect: float
    start: int | None


@contextmanager
def open_media(source: Source) -> Iterator[Any]:
    """A media file, or its bytes, as PyAV has it. Raises OSError, or an FFmpegError for what is none."""
    with (
        io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as data,
        av.open(data, "r", container_options=_OPEN) as file,
    ):
        yield file


def read_sound(source: Source) -> tuple[Tensor, int]:
    """What is heard, the mean of all channels: float32 (n,), -1..1, and its rate in Hz.

    Raises ValueError where nothing decodes, OSError.
    """
    parts: list[NDArray[np.float32]] = []
    rate = samples = channels = 0
    try:
        with open_media(source) as file:
            stream = _stream(file.streams.audio, "sound")
            resampler = None
            for frame in file.decode(stream):
                if resampler is None:
                    rate = frame.sample_rate
                    # not planar: PyAV 18 ends the process at eight channels
                    resampler = av.AudioResampler(format="flt", layout=frame.layout, rate=rate)
                    channels = frame.layout.nb_channels
                parts += [made.to_ndarray().reshape(-1, channels).mean(1) for made in resampler.resample(frame)]
                samples += frame.samples
                if samples >= LONGEST_S * rate:
                    break
    except UNDECODABLE as error:
        if not parts:
            raise ValueError(f"{_name(source)} has no sound that decodes ({_reason(error)}); give a file with sound") from error
    if not parts:
        raise ValueError(f"{_name(source)} has no sound that decodes; give a file with sound")
    return torch.from_numpy(np.concatenate(parts).astype(np.float32)), rate


def read_film(source: Source) -> Film:
    """What is known of a film without decoding it. Raises ValueError where there is none."""
    try:
        with open_media(source) as file:
            stream = _stream(file.streams.video, "picture")
            packets = [p for p in file.demux(stream) if p.size]
            stamps = [p.pts for p in packets if p.pts is not None]
            rate = float(stream.average_rate or stream.guessed_rate or 25)
            start = min(stamps) if len(stamps) == len(packets) and stamps else None
            if start is not None and len(stamps) > 1:
                seconds = float((max(stamps) - start) * stream.time_base)
                rate = (len(stamps) - 1) / seconds if seconds > 0 else rate
                rate = float(stream.average_rate) if stream.average_rate and abs(rate / stream.average_rate - 1) < 0.01 else rate
            context, aspect = stream.codec_context, stream.sample_aspect_ratio or Fraction(1)
            aspect = aspect if Fraction(1, 4) <= aspect <= 4 else Fraction(1)
            count = min(len(packets), int(LONGEST_S * rate))
            found = Film(count, rate, context.height, context.width, float(aspect), start)
    except UNDECODABLE as error:
        raise ValueError(f"{_name(source)} has no picture that decodes ({_reason(error)}); give a film") from error
    if not found.frames or min(found.height, found.width) < 2:
        raise ValueError(f"{_name(source)} has no picture that decodes; give a film")
    return found


def read_frames(source: Source, film: Film, numbers: NDArray[np.integer], crop: Box, size: int) -> NDArray[np.uint8]:
    """Frames on screen at the instants number / fps, cut, scaled and upright: RGB, uint8 (n, size, size, 3).

    numbers: ascending. A frame that is missing is the one before it. Raises ValueError when none decodes.
    """
    wanted = (np.asarray(numbers) + _EARLY) / film.fps
    try:
        with open_media(source) as file:
            stream = _stream(file.streams.video, "picture")
            stream.codec_context.thread_count = 1
            if film.start is not None and wanted[0] > _SEEK_S:
                with suppress(av.error.FFmpegError):
                    file.seek(film.start + int(wanted[0] / stream.time_base), stream=stream)
            made = _on_screen(_timed(file, stream, film), wanted, Finish(crop, size, None))
        if made is None:  # sought too far, or not decodable from there
            with open_media(source) as file:
                made = _on_screen(
                    _timed(file, _stream(file.streams.video, "picture"), film), wanted, Finish(crop, size, None), late=True
                )
    except UNDECODABLE as error:
        raise ValueError(f"{_name(source)} has no picture that decodes ({_reason(error)}); give a film") from error
    if made is None:
        raise ValueError(f"{_name(source)} has no frame that decodes; give another film")
    return made


def _timed(file: Any, stream: Any, film: Film) -> Iterator[tuple[float, Any]]:
    """Frames that decode, with the seconds since the first one of the file."""
    for number, packet in enumerate(file.demux(stream)):
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            continue
        for frame in frames:
            known = film.start is not None and frame.pts is not None
            yield float((frame.pts - film.start) * stream.time_base) if known else number / film.fps, frame


def _on_screen(
    frames: Iterator[tuple[float, Any]], wanted: NDArray[np.float64], finish: Finish, late: bool = False
) -> NDArray[np.uint8] | None:
    """The finished frame at each instant (ascending, seconds): the last that began before it. None where the first frame is
    later than the first instant, unless `late`."""
    made: list[NDArray[np.uint8]] = []
    current: Any = None
    finished: NDArray[np.uint8] | None = None
    for seconds, frame in frames:
        if current is None and seconds > wanted[0] and not late:
            return None
        while current is not None and len(made) < len(wanted) and wanted[len(made)] < seconds:
            finished = _upright(finish(current), current) if finished is None else finished
            made.append(finished)
        if len(made) == len(wanted):
            break
        current, finished = frame, None
    if current is not None and len(made) < len(wanted):
        finished = _upright(finish(current), current) if finished is None else finished
        made += [finished] * (len(wanted) - len(made))
    return np.stack(made) if made else None


def _upright(picture: NDArray[np.uint8], frame: Any) -> NDArray[np.uint8]:
    """As the file says that it is to be turned; a copy, since the scaler uses its memory again."""
    return np.rot90(picture, round(frame.rotation / 90) % 4).copy()


def _stream(streams: Sequence[Any], what: str) -> Any:
    if not streams or streams[0].codec_context is None:
        raise ValueError(f"there is no {what} in it")
    streams[0].codec_context.thread_count = 1  # threads of a decoder that meets damaged bytes can wait for ever
    return streams[0]


def _name(source: Source) -> str:
    return "the file" if isinstance(source, bytes) else os.fspath(source)


def _reason(error: Exception) -> str:
    said = error.strerror if isinstance(error, av.error.FFmpegError) and error.strerror else error
    return (str(said) or type(error).__name__).rstrip(".").splitlines()[0]
