"""Encoding with PyAV: the trials that measure a clip, and the MP4 writer. One thread each, so same input, same bytes."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from cmacc.ingest.world.sound import RATE, Wave

SOURCE_CRF = (17, 23)  # one a file: how far a clip shrinks when encoded anew then tells the upload's quality, not the class
TRIAL_CRF = 23
AUDIO_BIT_RATE = 64_000
# x264's AVX-512 macroblock tree reads stale memory at some widths: the same frames then give other bytes now and then
EXACT = {"x264-params": "asm=sse4.2"}


def _x264(stream: av.VideoCodecContext, width: int, height: int, fps: int, crf: int) -> None:
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.time_base, stream.framerate = Fraction(1, fps), Fraction(fps)
    stream.thread_count = 1
    stream.options = {"preset": "veryfast", "crf": str(crf), "g": str(fps), "sc_threshold": "0", "forced-idr": "1", **EXACT}


def trial_video(frames: NDArray[np.uint8], fps: int) -> NDArray[np.float64]:
    """Mean bytes of a keyframe and of another frame of `frames` (T, 3H/2, W) as re-encoded later, (2,)."""
    encoder = av.CodecContext.create("libx264", "w")
    assert isinstance(encoder, av.VideoCodecContext)
    _x264(encoder, frames.shape[2], frames.shape[1] * 2 // 3, fps, TRIAL_CRF)
    packets = []
    for number, array in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(array, "yuv420p")
        frame.pts = number
        packets += encoder.encode(frame)
    packets += encoder.encode(None)
    return np.array([np.mean([packet.size for packet in packets if packet.is_keyframe == key]) for key in (True, False)])


def trial_audio(sound: Wave) -> int:
    """Bytes of `sound` (S,) in FLAC."""
    encoder = av.CodecContext.create("flac", "w")
    assert isinstance(encoder, av.AudioCodecContext)
    encoder.sample_rate, encoder.layout, encoder.format = RATE, "mono", "s16"
    size = 0
    for first in range(0, len(sound), 4608):
        frame = av.AudioFrame.from_ndarray(_s16(sound[first : first + 4608]), "s16", "mono")
        frame.sample_rate, frame.pts = RATE, first
        size += sum(packet.size for packet in encoder.encode(frame))
    return size + sum(packet.size for packet in encoder.encode(None))


def _s16(sound: Wave) -> NDArray[np.int16]:
    return np.clip(np.round(sound * 32767), -32768, 32767).astype(np.int16)[None]


def write_mp4(path: Path, scenes: Iterable[tuple[NDArray[np.uint8], Wave]], fps: int, crf: int) -> None:
    """Write (frames, sound) pairs one after another as H.264 and AAC; every pair starts on a keyframe."""
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as out:
        audio = out.add_stream("aac", rate=RATE, layout="mono", options={"aac_coder": "fast"})
        audio.bit_rate = AUDIO_BIT_RATE
        video: av.VideoStream | None = None
        shown = heard = 0
        for frames, sound in scenes:
            if video is None:
                video = out.add_stream("libx264", rate=fps)
                _x264(video.codec_context, frames.shape[2], frames.shape[1] * 2 // 3, fps, crf)
            for number, array in enumerate(frames):
                picture = av.VideoFrame.from_ndarray(array, "yuv420p")
                picture.pts, shown = shown, shown + 1
                if number == 0:
                    picture.pict_type = av.video.frame.PictureType.I
                out.mux(video.encode(picture))
            chunk = av.AudioFrame.from_ndarray(sound[None].astype(np.float32), "fltp", "mono")
            chunk.sample_rate, chunk.pts, heard = RATE, heard, heard + len(sound)
            out.mux(audio.encode(chunk))
        if video is not None:
            out.mux(video.encode(None))
        out.mux(audio.encode(None))
