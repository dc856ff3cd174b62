"""Write the two members of a clip: the same frames and samples in, the same bytes out."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.codec.context import Flags
from av.container import Flags as ContainerFlags
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from cmacc.shards.profile import Profile

OPUS_RATE = 48_000
_QSCALE_LAMBDA = 118  # FFmpeg's FF_QP2LAMBDA
_SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


class Shaper:
    """Turns decoded frames of one source upright, to the profile's size and to 8-bit 4:2:0."""

    def __init__(self, frame: VideoFrame, aspect: Fraction, profile: Profile) -> None:
        self.turns = frame.rotation // 90 % 4 if frame.rotation % 90 == 0 else 0
        self.full_range = profile.codec == "mjpeg"
        width, height = round(frame.width * aspect), frame.height
        scale = min(1.0, profile.short_side / min(width, height))
        self.width, self.height = _even(width * scale), _even(height * scale)
        self.reformatter = VideoReformatter()  # a frame's own one would set up its filters for each frame anew

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the upright picture, pixels."""
        return (self.height, self.width) if self.turns % 2 else (self.width, self.height)

    def shape(self, frame: VideoFrame) -> VideoFrame:
        """The frame upright, of `size`, 8-bit 4:2:0 (full range for MJPEG)."""
        full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
        shaped = self.reformatter.reformat(
            frame,
            width=self.width,
            height=self.height,
            format="yuvj420p" if self.full_range else "yuv420p",
            interpolation=_SCALING,
            src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG if self.full_range else ColorRange.MPEG,
            threads=1,
        )
        if self.turns:
            shaped = _turn(shaped, self.turns)
        # a decoder's frame type would force the encoder's
        shaped.pict_type = PictureType.NONE
        return shaped


def _even(pixels: float) -> int:
    return max(2, 2 * round(pixels / 2))


def _turn(frame: VideoFrame, turns: int) -> VideoFrame:
    """The frame turned counter-clockwise by quarter turns."""
    planes = [np.rot90(plane_of(frame, i), turns) for i in range(3)]
    height, width = planes[0].shape
    turned = VideoFrame(width, height, frame.format.name)
    for i, plane in enumerate(planes):
        plane_of(turned, i)[:] = plane
    turned.color_range, turned.colorspace = frame.color_range, frame.colorspace
    return turned


def plane_of(frame: VideoFrame, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A view of one 8-bit plane, uint8 [height, width]."""
    plane = frame.planes[index]
    return np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]


class VideoWriter:
    """One MP4 of a constant frame rate at `path`; it begins with the first frame, which sets its size.

    changes: of each frame written, the mean absolute luma change from the one before, 0..255, over every fourth pixel of every
    fourth line; 0 for the first. lumas: of the frames numbered in `looks` (ascending), uint8 [height, width].
    """

    def __init__(self, path: Path, aspect: Fraction, profile: Profile, looks: Sequence[int] = ()) -> None:
        self.path, self.aspect, self.profile = path, aspect, profile
        self.looks = looks
        self.changes: list[float] = []
        self.lumas: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
        self.shaper: Shaper | None = None
        self.luma: np.ndarray[Any, np.dtype[np.int16]] | None = None
        self.container: Any = None
        self.stream: Any = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), pixels; (0, 0) before the first frame."""
        return self.shaper.size if self.shaper else (0, 0)

    @property
    def n_frames(self) -> int:
        """Written so far."""
        return len(self.changes)

    def write(self, frame: VideoFrame, times: int) -> None:
        """Show a decoded frame `times` times."""
        if times < 1:
            return
        if self.shaper is None:
            self.shaper = Shaper(frame, self.aspect, self.profile)
        shaped = self.shaper.shape(frame)
        if self.container is None:
            self._open(shaped)
        plane = plane_of(shaped, 0)
        self.lumas += [plane] * sum(self.n_frames <= look < self.n_frames + times for look in self.looks)
        luma = plane[::4, ::4].astype(np.int16)
        change = int(np.abs(luma - self.luma).sum()) / luma.size if self.luma is not None else 0.0
        self.luma = luma
        for repeat in range(times):
            shaped.pts, shaped.time_base = self.n_frames, Fraction(1, self.profile.fps)
            self.container.mux(self.stream.encode(shaped))
            self.changes.append(0.0 if repeat else change)

    def _open(self, first: VideoFrame) -> None:
        profile = self.profile
        # faststart moves the index to the front at the end, which needs a real file
        self.container = av.open(str(self.path), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"})
        self.container.flags |= ContainerFlags.bitexact.value
        codec, options = _video_codec(profile)
        self.stream = self.container.add_stream(codec, rate=profile.fps, options=options)
        context = self.stream.codec_context
        context.width, context.height, context.pix_fmt = first.width, first.height, first.format.name
        context.colorspace, context.color_range = first.colorspace, first.color_range
        context.time_base = Fraction(1, profile.fps)
        context.gop_size, context.max_b_frames = profile.gop, profile.b_frames
        context.thread_count = 1
        context.flags |= Flags.bitexact | (Flags.closed_gop if profile.gop > 1 else 0)
        if profile.codec == "mjpeg":
            context.flags |= Flags.qscale
            context.global_quality = profile.quality * _QSCALE_LAMBDA

    def close(self) -> bytes:
        """The finished file."""
        self.container.mux(self.stream.encode(None))
        self._let_go()
        return self.path.read_bytes()

    def abandon(self) -> None:
        """Leave no file, whether it is finished or not."""
        self._let_go()
        self.path.unlink(missing_ok=True)

    def _let_go(self) -> None:
        """Of the encoder, which holds 11 MB for as long as anything refers to it, and of pictures."""
        if self.container is not None:
            self.container.close()
        self.container = self.stream = self.luma = None


def _video_codec(profile: Profile) -> tuple[str, dict[str, str]]:
    if profile.codec == "h264":
        # mbtree reads memory that it never wrote: the same frames would give other bytes now and then
        exact = "scenecut=0:open-gop=0:threads=1:lookahead-threads=1:mbtree=0:cpu-independent=1"
        exact = f"keyint={profile.gop}:min-keyint={profile.gop}:{exact}"
        return "libx264", {"preset": "veryfast", "crf": str(profile.quality), "x264-params": exact}
    if profile.codec == "vp9":
        options = {"deadline": "realtime", "cpu-used": "8", "crf": str(profile.quality), "b": "0", "lag-in-frames": "0"}
        return "libvpx-vp9", options | {"auto-alt-ref": "0", "keyint_min": str(profile.gop)}
    return "mjpeg", {}


def encode_audio(sound: np.ndarray[Any, np.dtype[np.float32]], profile: Profile) -> bytes:
    """Mono float32 sound in [-1, 1] (clipped beyond), at `sound_rate(profile)`, as a FLAC or an Ogg Opus file."""
    codec, form, options = ("flac", "flac", {}) if profile.audio_codec == "flac" else ("libopus", "ogg", {"b": "48k"})
    pcm = np.clip(np.rint(sound * 32768.0), -32768, 32767).astype(np.int16)
    out = io.BytesIO()
    container: Any
    with av.open(out, "w", format=form, options={"fflags": "+bitexact"}) as container:
        container.flags |= ContainerFlags.bitexact.value
        stream: Any = container.add_stream(codec, rate=sound_rate(profile), layout="mono", options=options)
        stream.codec_context.format = "s16"
        stream.codec_context.thread_count = 1
        stream.codec_context.flags |= Flags.bitexact
        frame = AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = sound_rate(profile), 0, Fraction(1, sound_rate(profile))
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def sound_rate(profile: Profile) -> int:
    """Hz of the audio member: Opus knows 48 kHz alone."""
    return OPUS_RATE if profile.audio_codec == "opus" else profile.audio_rate
