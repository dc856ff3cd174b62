"""Small clips for tests: a moving picture and a tone, encoded by PyAV."""

from __future__ import annotations

import io
from fractions import Fraction
from functools import lru_cache

import av
import numpy as np

from cmacc.shards.clip import Clip, Facts
from cmacc.shards.profile import Profile, profile


def tiny_profile(**changes: object) -> Profile:
    """An H.264 profile that encodes in a few milliseconds: 32 pixels, 8 frames a second, FLAC at 8 kHz."""
    return profile("h264", **{"short_side": 32, "fps": 8, "gop": 4, "b_frames": 0, "audio_rate": 8000, **changes})


@lru_cache(maxsize=64)
def video_bytes(
    seed: int = 0, frames: int = 8, fps: int | Fraction = 8, width: int = 48, height: int = 32, gop: int = 4
) -> bytes:
    """An MP4 with H.264 in it, picture only: noise over a moving ramp."""
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = stream.codec_context.time_base = 1 / Fraction(fps)
        stream.codec_context.gop_size = gop
        stream.options = {"preset": "ultrafast", "bf": "0", "sc_threshold": "0", "threads": "1"}
        ramp = np.linspace(0, 200, width)[None, :, None]
        for i in range(frames):
            picture = np.roll(np.broadcast_to(ramp, (height, width, 3)), 3 * i, axis=1) + rng.integers(0, 40, (height, width, 3))
            frame = av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")
            frame.pts = i
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def coded_video(codec: str, container: str = "mp4", n: int = 12, side: int = 32) -> bytes:
    """A video of `n` frames at 8 a second, each frame grey of its own."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for i in range(n):
            picture = np.full((side, side, 3), 20 * (i % 12), np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode(None))
    return out.getvalue()


@lru_cache(maxsize=64)
def audio_bytes(seed: int = 0, seconds: float = 1.0, rate: int = 8000, codec: str = "flac") -> bytes:
    """A mono tone as FLAC, or as Opus in Ogg (48 kHz)."""
    rate = 48_000 if codec == "opus" else rate
    t = np.arange(round(seconds * rate)) / rate
    tone = (8000 * np.sin(2 * np.pi * (220 + 20 * (seed % 16)) * t)).astype(np.int16)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="ogg" if codec == "opus" else "flac") as out:
        stream = out.add_stream("libopus" if codec == "opus" else "flac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        resampler = av.AudioResampler(format=stream.format, layout="mono", rate=rate, frame_size=stream.frame_size or 4096)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            out.mux(stream.encode(part))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def make_clip(
    i: int = 0,
    *,
    labels: tuple[str, ...] = (),
    split: str = "",
    seconds: float = 1.0,
    source: str | None = None,
    audio: str = "flac",
) -> Clip:
    """Clip number i: real video and audio (a few kB), facts that agree with them. Clips of one `source` share a source video."""
    frames = round(8 * seconds)
    source = source or f"yt_{i // 2:011d}"
    start = 10.0 * i
    facts = Facts(
        source=source, start_s=start, end_s=start + seconds, duration_s=seconds, n_frames=frames, fps=8.0, width=48, height=32,
        keyframes=tuple(range(0, frames, 4)), loudness_db=-12.0 - i % 7, motion=float(i % 10), labels=labels, split=split,
    )  # fmt: skip
    members = {"mp4": video_bytes(i % 8, frames), audio: audio_bytes(i % 8, seconds, codec=audio)}
    return Clip(f"{source}_{round(start * 1000)}_{round((start + seconds) * 1000)}", facts, members)
