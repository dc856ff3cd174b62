"""The clapper: videos made for the ingest tests, with a white frame and a click at the same instants, and how to find them."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
from av.audio.frame import AudioFrame
from av.video.frame import VideoFrame

from cmacc.ingest.encode import plane_of

CODECS = {
    "mp4": ("libx264", "aac"),
    "mkv": ("libx264", "ac3"),
    "webm": ("libvpx", "libopus"),
    "ts": ("libx264", "aac"),
    "avi": ("mpeg4", "libmp3lame"),
    "flv": ("flv", "libmp3lame"),
    "mpg": ("mpeg2video", "mp2"),
    "mov": ("mjpeg", "pcm_s16le"),
}


def clapper(
    path: Path,
    *,
    seconds: float = 4.0,
    claps: Sequence[float] = (1.0, 2.52),
    times: Sequence[float] | None = None,
    fps: int = 25,
    size: tuple[int, int] = (96, 64),
    gop: int = 12,
    picture: bool = True,
    sound: bool = True,
    moving: bool = True,
    level: float = 0.01,
    pix_fmt: str = "",
    codecs: tuple[str, str] | None = None,
    rate: int = 48000,
    channels: str = "stereo",
    sound_delay_s: float = 0.0,
    interleave: bool = True,
) -> Path:
    """Write a video. times: of the frames, seconds, `fps` a second by default. level: of the noise between the clicks."""
    video_codec, audio_codec = codecs or CODECS[path.suffix[1:]]
    packets: list[av.Packet] = []
    times = times or [i / fps for i in range(round(seconds * fps))]
    with av.open(str(path), "w") as out:
        if picture:
            video = out.add_stream(video_codec, rate=fps)
            video.width, video.height = size
            video.pix_fmt = pix_fmt or ("yuvj420p" if video_codec == "mjpeg" else "yuv420p")
            video.codec_context.gop_size = gop
            video.codec_context.time_base = Fraction(1, fps) if video_codec in ("mpeg4", "mpeg2video") else Fraction(1, 1000)
            video.codec_context.thread_count = 1
            if video_codec == "libx264":
                video.options = {"x264-params": "mbtree=0"}  # which reads memory it never wrote: other bytes now and then
        if sound:
            audio = out.add_stream(audio_codec, rate=rate, layout=channels)
            audio.codec_context.thread_count = 1
        if picture:
            for time_s, luma in zip(times, _pictures(times, claps, size, moving), strict=True):
                frame = VideoFrame.from_ndarray(luma, "gray").reformat(format=video.pix_fmt, dst_color_range="MPEG", threads=1)
                frame.time_base = video.codec_context.time_base
                frame.pts = round(time_s / frame.time_base)
                packets += video.encode(frame)
            packets += video.encode(None)
        if sound:
            wave = _sound(seconds, claps, rate, level)
            frame = AudioFrame.from_ndarray(
                np.repeat((wave * 32767).astype(np.int16)[None], len(audio.layout.channels), 0), "s16p", channels
            )
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), round(sound_delay_s * rate)
            packets += [*audio.encode(frame), *audio.encode(None)]
        out.start_encoding()
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base) if interleave else packets:
            out.mux(packet)
    return path


def _pictures(times: Sequence[float], claps: Sequence[float], size: tuple[int, int], moving: bool) -> list[np.ndarray]:
    width, height = size
    y, x = np.mgrid[:height, :width]
    frames = []
    for i, time_s in enumerate(times):
        until = times[i + 1] if i + 1 < len(times) else time_s + 0.04
        flash = moving and any(time_s <= clap + 1e-6 < until for clap in claps)
        frames.append(np.full((height, width), 255, np.uint8) if flash else (64 + (x + y + 4 * i * moving) % 64).astype(np.uint8))
    return frames


def _sound(seconds: float, claps: Sequence[float], rate: int, level: float) -> np.ndarray:
    wave = level * np.random.default_rng(0).standard_normal(round(seconds * rate))
    click = 0.9 * np.sin(2 * np.pi * 1000 * np.arange(round(0.01 * rate)) / rate)
    for clap in claps:
        at = round(clap * rate)
        wave[at : at + len(click)] = click[: len(wave) - at]
    return np.clip(wave, -1, 1)


def ffmpeg(*arguments: object) -> None:
    """Run the packaged ffmpeg, for what PyAV does not write: rotation, encryption, edit lists."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-y", *map(str, arguments)]
    subprocess.run(command, check=True)


def origin(path: Path) -> float:
    """Seconds on the containers' own clock at which the first frame or sample stands."""
    with av.open(str(path)) as container:
        return (container.start_time or 0) / 1e6


@cache
def truth(path: Path) -> tuple[list[float], list[float]]:
    """(flashes, clicks) of a source, seconds from its origin, by decoding each stream alone and counting samples."""
    with av.open(str(path)) as container:
        begin = next(f.pts * f.time_base for f in container.decode(audio=0) if f.pts is not None)
    at = origin(path)
    return [t - at for t in flashes(path)], [t + float(begin) - at for t in clicks(path.read_bytes())]


def flashes(video: bytes | Path) -> list[float]:
    """Seconds at which a white picture appears."""
    with av.open(str(video) if isinstance(video, Path) else io.BytesIO(video)) as container:
        frames = container.decode(video=0)
        seen = [(float(f.pts * f.time_base), plane_of(f, 0).mean() > 180) for f in frames]
    return [now for (_, before), (now, white) in pairwise([(0.0, False), *seen]) if white and not before]


def clicks(audio: bytes) -> list[float]:
    """Seconds at which a click begins."""
    wave, rate = samples(audio)
    loud = np.flatnonzero(np.abs(wave) > 0.3)
    return [float(at) / rate for at in loud[np.diff(loud, prepend=-rate) > rate // 10]]


def samples(audio: bytes) -> tuple[np.ndarray, int]:
    """(float32 [n], Hz)"""
    with av.open(io.BytesIO(audio)) as container:
        frames = list(container.decode(audio=0))
        planes = [f.to_ndarray()[0] if f.format.is_planar else f.to_ndarray()[0, :: len(f.layout.channels)] for f in frames]
        pieces = [plane / (32768 if plane.dtype == np.int16 else 1) for plane in planes]
        return np.concatenate(pieces).astype(np.float32), frames[0].sample_rate


def test_the_clapper_claps_where_it_says(tmp_path: Path) -> None:
    path = clapper(tmp_path / "a.mov", claps=(1.0, 2.52))
    assert flashes(path) == [1.0, 2.52]
    assert np.allclose(clicks(path.read_bytes()), [1.0, 2.52], atol=0.001)
