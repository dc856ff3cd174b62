"""Source videos for the ingest bench, made from a seed: panning scenes with grain and moving things, with sound."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

SOUND_RATE = 44_100
_KEYFRAME_S = 4  # as video sites have them
_SCENE_S = 7.5
_EXTENSIONS = (".mp4", ".webm", ".mov", ".avi", ".mkv")

Span = tuple[float, float]


@dataclass(frozen=True)
class Video:
    """A file `<id>.mp4` that the server has, and the (start, end) of its clips, seconds."""

    id: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Look:
    """width, height: pixels. seconds: of one source video. discs: that cross a scene. swing: of the texture, and grain: of the
    film, standard deviation, both in luma steps."""

    width: int = 640
    height: int = 360
    fps: int = 30
    seconds: float = 60.0
    discs: int = 3
    swing: float = 48.0
    grain: float = 1.5


def make_media(folder: Path, count: int, spans: tuple[Span, ...], look: Look | None = None, distinct: int = 4) -> list[Video]:
    """`count` source videos in `folder`, of which `distinct` differ: the others are the same bytes under other names."""
    folder.mkdir(parents=True)
    paths = [folder / f"bench{number:06d}.mp4" for number in range(count)]
    first, rest = paths[:distinct], paths[distinct:]
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(render, first, range(len(first)), [look or Look()] * len(first)))
    for number, path in enumerate(rest):
        os.link(first[number % len(first)], path)
    return [Video(path.stem, spans) for path in paths]


def link_media(folder: Path, real: Path, clip_s: float) -> list[Video]:
    """The media files of `real` that have picture and sound, linked into `folder`: their first `clip_s` seconds are a clip."""
    folder.mkdir(parents=True)
    videos = []
    for path in sorted(p for p in real.iterdir() if p.suffix in _EXTENSIONS):
        try:
            with av.open(str(path)) as container:
                seconds = (container.duration or 0) / 1e6
                if not (container.streams.video and container.streams.audio):
                    continue
        except av.FFmpegError:
            continue
        if seconds > 1:
            # whole milliseconds, less one frame that the sound may lack
            video = Video(f"media{len(videos):06d}", ((0.0, min(clip_s, int(seconds * 1000 - 100) / 1000)),))
            (folder / f"{video.id}.mp4").symlink_to(path.resolve())
            videos.append(video)
    return videos


def render(path: Path, seed: int, look: Look) -> None:
    """One source video."""
    rng = np.random.default_rng([2009, 9805, seed])
    scenes = _Scenes(rng, look)
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as out:
        audio = out.add_stream("aac", rate=SOUND_RATE, layout="stereo", options={"aac_coder": "fast"})
        audio.bit_rate = 96_000
        video = out.add_stream("libx264", rate=look.fps)
        video.width, video.height, video.pix_fmt = look.width, look.height, "yuv420p"
        video.codec_context.thread_count = 1
        video.codec_context.gop_size = _KEYFRAME_S * look.fps
        video.options = {"preset": "veryfast", "crf": "23"}
        for number in range(round(look.seconds * look.fps)):
            if number % look.fps == 0:
                sound = av.AudioFrame.from_ndarray(_sound(rng, number // look.fps, seed), "fltp", "stereo")
                sound.sample_rate, sound.pts, sound.time_base = (
                    SOUND_RATE,
                    number // look.fps * SOUND_RATE,
                    Fraction(1, SOUND_RATE),
                )
                out.mux(audio.encode(sound))
            frame = av.VideoFrame.from_ndarray(scenes.frame(number), "yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, look.fps)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        out.mux(audio.encode(None))


def _sound(rng: np.random.Generator, second: int, seed: int) -> NDArray[np.float32]:
    """A second of stereo sound (2, S): a few partials that swell, and noise."""
    t = second + np.arange(SOUND_RATE) / SOUND_RATE
    pitch = 110 * 2 ** ((seed % 24) / 12)
    tones = sum(np.sin(2 * np.pi * pitch * k * t) * (1 + np.sin(0.7 * k * t)) / k for k in (1, 2, 3, 5, 8))
    left = 0.08 * tones + 0.02 * rng.standard_normal(SOUND_RATE)
    return np.stack([left, 0.7 * left + 0.01 * rng.standard_normal(SOUND_RATE)]).astype(np.float32)


class _Scenes:
    """Frames (3H/2, W) uint8 in planar 4:2:0: a window that drifts over a texture, discs that cross it, film grain."""

    def __init__(self, rng: np.random.Generator, look: Look) -> None:
        self.rng, self.look = rng, look
        self.grain = (look.grain * rng.standard_normal((2 * look.height, 2 * look.width))).astype(np.int16)
        self.y, self.x = np.mgrid[: look.height, : look.width].astype(np.int16)
        self.scene = -1

    def _new_scene(self) -> None:
        look, rng = self.look, self.rng
        size = (2 * look.width, 2 * look.height)
        self.luma = _texture(rng, *size, (8, 24, 80, 240), look.swing)
        self.chroma = [_texture(rng, look.width, look.height, (4, 12), 16) for _ in range(2)]
        self.drift = rng.uniform(-1, 1, 2) * look.height / 16  # pixels a second: half a window in a scene at most
        self.discs = [
            (rng.uniform(0.05, 0.2) * look.height, *rng.uniform(0, 1, 4), rng.integers(30, 220)) for _ in range(look.discs)
        ]

    def frame(self, number: int) -> NDArray[np.uint8]:
        look = self.look
        t = number / look.fps
        if int(t / _SCENE_S) != self.scene:
            self.scene = int(t / _SCENE_S)
            self._new_scene()
        t -= self.scene * _SCENE_S
        dx, dy = (int(side / 2 + speed * t) for side, speed in zip((look.width, look.height), self.drift, strict=True))
        gx, gy = self.rng.integers(0, (look.width, look.height))
        luma = self.luma[dy : dy + look.height, dx : dx + look.width].astype(np.int16)
        for radius, x, y, vx, vy, tone in self.discs:
            cx, cy = look.width * ((x + (vx - 0.5) * 0.5 * t) % 1), look.height * ((y + (vy - 0.5) * 0.5 * t) % 1)
            rows, columns = (slice(max(int(c - radius), 0), int(c + radius) + 1) for c in (cy, cx))
            inside = (self.x[rows, columns] - cx) ** 2 + (self.y[rows, columns] - cy) ** 2 < radius**2
            luma[rows, columns][inside] = luma[rows, columns][inside] // 4 + tone * 3 // 4
        luma += self.grain[gy : gy + look.height, gx : gx + look.width]
        planes = [np.clip(luma, 16, 235).astype(np.uint8)]
        x, y = dx // 2, dy // 2
        planes += [plane[y : y + look.height // 2, x : x + look.width // 2] for plane in self.chroma]
        return np.concatenate([plane.ravel() for plane in planes]).reshape(look.height * 3 // 2, look.width)


def _texture(rng: np.random.Generator, width: int, height: int, octaves: tuple[int, ...], swing: float) -> NDArray[np.uint8]:
    """Smooth noise (height, width) around 128: octaves of so many cells across, each half as strong as the one before."""
    total = np.zeros((height, width), np.float32)
    for power, cells in enumerate(octaves):
        small = rng.integers(0, 256, (max(2, cells * height // width), cells), np.uint8)
        large = av.VideoFrame.from_ndarray(small, "gray").reformat(width=width, height=height, interpolation="BICUBIC")
        total += (large.to_ndarray().astype(np.float32) - 128) / 2**power
    return np.clip(128 + swing * total / 128, 16, 235).astype(np.uint8)
