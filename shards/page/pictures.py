"""What a clip looks and sounds like, in pictures: frames, waveform, log-mel.

Media come as the bytes of a member, of our shards or of anybody's: no more than their first `LONGEST_S` seconds are decoded.
All raise av.FFmpegError or ValueError for bytes that hold no such thing.
"""

from __future__ import annotations

import io
import math
from itertools import takewhile
from typing import NamedTuple, TypeVar

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image

S = TypeVar("S", VideoStream, AudioStream)

LONGEST_S = 60.0
_RATES = (1000, 400_000)  # Hz
_PIXELS = 1 << 26
_WINDOW_S = 0.025
_BANDS = 64
_COLUMNS = 640  # of a log-mel picture, at most
_HOP_S = 0.01
_RANGE_DB = 80.0
_FLOOR = 1e-10
# by name, so that no playlist is opened, which could name files and addresses of its own
_FORMATS = {"format_whitelist": "mov,matroska,avi,flac,ogg,wav,mp3,mpeg,mpegts,flv,asf"}
_COLOURS = ((10, 10, 30), (52, 28, 98), (125, 36, 118), (198, 58, 92), (240, 120, 60), (252, 190, 90), (255, 244, 200))


class Sound(NamedTuple):
    """Mono, -1 to 1, float32 (n,), at `rate` Hz."""

    samples: NDArray[np.float32]
    rate: int

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


def open_media(data: bytes) -> InputContainer:
    """The bytes of a media file as PyAV has it; MP4, Matroska, WebM, AVI, MPEG, FLV, ASF, FLAC, Ogg, WAV and MP3 are known."""
    return av.open(io.BytesIO(data), "r", container_options=_FORMATS)


class Film(NamedTuple):
    """A moving picture as far as it is shown: seconds, frames; width and height in pixels."""

    seconds: float
    frames: int
    width: int
    height: int


def film(data: bytes) -> Film:
    """What is known of a video without decoding it."""
    with open_media(data) as file:
        stream = first_stream(file.streams.video, "picture")
        times = [
            (float(p.pts * p.time_base), float((p.duration or 0) * p.time_base))
            for p in file.demux(stream)
            if p.pts is not None and p.time_base is not None
        ]
        width, height = stream.codec_context.width, stream.codec_context.height
        if not 0 < width * height <= _PIXELS:
            raise ValueError(f"its picture is said to be {width} × {height} pixels")
    first = min((t for t, _ in times), default=0.0)
    shown = [(t - first, d) for t, d in times if t - first < LONGEST_S]
    return Film(min(max((t + d for t, d in shown), default=0.0), LONGEST_S), len(shown), width, height)


def frames(data: bytes, n: int, height: int) -> list[Image.Image]:
    """The frames in the middle of `n` equal parts of a clip, in their order, not higher than `height` pixels."""
    count = max(film(data).frames, 1)
    wanted = {int((i + 0.5) * count / n) for i in range(n)}
    found = []
    with open_media(data) as file:
        stream = first_stream(file.streams.video, "picture")
        for i, frame in takewhile(lambda pair: pair[0] <= max(wanted), enumerate(file.decode(stream))):
            if i in wanted:
                scale = min(1.0, height / frame.height)
                width = max(1, round(frame.width * scale))
                small = frame.reformat(width=width, height=max(1, round(frame.height * scale)), format="rgb24")
                found.append(Image.fromarray(small.to_ndarray()))
    if not found:
        raise ValueError("there is no whole frame in it")
    return found


def sound(data: bytes) -> Sound:
    """What is heard, mixed down to mono."""
    with open_media(data) as file:
        stream = first_stream(file.streams.audio, "sound")
        resampler = av.AudioResampler(format="flt", layout="mono")
        parts: list[NDArray[np.float32]] = []
        rate, samples = 0, 0
        for frame in file.decode(stream):
            rate = rate or frame.sample_rate
            if not _RATES[0] <= rate <= _RATES[1]:
                raise ValueError(f"its sound is said to have {rate} samples a second")
            parts += [p.to_ndarray()[0] for p in resampler.resample(frame)]
            samples += frame.samples
            if samples >= LONGEST_S * rate:
                break
    if not samples:
        raise ValueError("there is no whole sound in it")
    return Sound(np.concatenate(parts)[: round(LONGEST_S * rate)], rate)


def first_stream(streams: tuple[S, ...], what: str) -> S:
    """The first of a file's streams of a kind, to be decoded in this thread. Raises ValueError where there is none."""
    if not streams:
        raise ValueError(f"there is no {what} in it")
    if streams[0].codec_context is None:
        raise ValueError(f"the codec of its {what} is not known")
    # threads of a decoder that meets damaged bytes can wait for the interpreter's lock for ever, when PyAV logs
    streams[0].codec_context.thread_count = 1
    return streams[0]


def strip(pictures: list[Image.Image], height: int) -> Image.Image:
    """Pictures side by side, each of that height in pixels."""
    small = [p.resize((max(1, round(p.width * height / p.height)), height)) for p in pictures]
    whole = Image.new("RGB", (sum(p.width for p in small), height))
    x = 0
    for picture in small:
        whole.paste(picture, (x, 0))
        x += picture.width
    return whole


def waveform(samples: NDArray[np.float32], width: int, height: int) -> Image.Image:
    """Loudest and softest of each part of the sound, dark on white."""
    picture = np.full((height, width), 255, dtype=np.uint8)
    for x, part in enumerate(np.array_split(samples, width)):
        if len(part):
            top, bottom = ((1 - np.clip([part.max(), part.min()], -1, 1)) / 2 * (height - 1)).round().astype(int)
            picture[top : bottom + 1, x] = 60
    return Image.fromarray(picture).convert("RGB")


def mel(hertz: float) -> float:
    """HTK's mel scale."""
    return 2595 * math.log10(1 + hertz / 700)


def mel_filters(bands: int, n_fft: int, rate: int) -> NDArray[np.float64]:
    """Triangles of height 1, evenly spaced in mel from 0 Hz to half the rate; float64 (bands, n_fft // 2 + 1)."""
    corners = 700 * (10 ** (np.linspace(0, mel(rate / 2), bands + 2) / 2595) - 1)
    bins = np.linspace(0, rate / 2, n_fft // 2 + 1)
    rise = (bins - corners[:-2, None]) / np.diff(corners)[:-1, None]
    fall = (corners[2:, None] - bins) / np.diff(corners)[1:, None]
    return np.maximum(0, np.minimum(rise, fall))


def log_mel(heard: Sound, bands: int = _BANDS, hop: int | None = None) -> NDArray[np.float64]:
    """Decibels of power in mel bands, lowest band first; float64 (bands, columns).

    Column i is of the 25 ms around sample i * hop, under a Hann window; hop: 10 ms, or more where that makes too wide a picture.
    """
    samples, rate = heard
    window = max(2, round(_WINDOW_S * rate))
    n_fft = max(1 << math.ceil(math.log2(rate / 16)), 1 << math.ceil(math.log2(window)))  # bins of at most 16 Hz
    hop = hop or max(round(_HOP_S * rate), -(-len(samples) // _COLUMNS), 1)
    padded = np.pad(samples, window // 2 + window)
    starts = window + np.arange(len(samples) // hop + 1) * hop
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    power = np.abs(np.fft.rfft(padded[starts[:, None] + np.arange(window)] * hann, n=n_fft, axis=1)) ** 2
    return 10 * np.log10(np.maximum(mel_filters(bands, n_fft, rate) @ power.T, _FLOOR))


def log_mel_picture(heard: Sound) -> Image.Image:
    """Frequency upwards, time to the right, the loudest 80 dB from dark to bright; one pixel a band and a column."""
    decibels = log_mel(heard)[::-1]
    level = np.clip((decibels - max(decibels.max(), -60.0) + _RANGE_DB) / _RANGE_DB, 0, 1)
    picture = Image.fromarray((level * 255).astype(np.uint8), mode="L").convert("P")
    at = np.linspace(0, 1, len(_COLOURS))
    table = [np.interp(np.linspace(0, 1, 256), at, channel) for channel in zip(*_COLOURS, strict=True)]
    picture.putpalette(np.stack(table, axis=1).round().astype(np.uint8).tobytes())
    return picture
