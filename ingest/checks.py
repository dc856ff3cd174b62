"""Read back what was written, and tell a clip that is worth nothing."""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.packet import Packet

from cmacc.ingest.causes import Cause, IngestFailure


def check_video(data: bytes, n_frames: int, fps: int) -> tuple[int, ...]:
    """Frame numbers of the keyframes, after decoding the first, middle and last group of pictures.

    Raises IngestFailure (undecodable) unless there are n_frames frames, first a keyframe, and those groups decode in full.
    """
    try:
        with av.open(io.BytesIO(data), "r") as container:
            stream = container.streams.video[0]
            if len(container.streams) != 1:
                raise IngestFailure(Cause.UNDECODABLE, "the video as written holds more than its picture")
            packets = [packet for packet in container.demux(stream) if packet.size]
            groups = _groups(packets)
            for index in sorted({0, len(groups) // 2, len(groups) - 1}):
                stream.codec_context.flush_buffers()
                decoded = sum(len(packet.decode()) for packet in groups[index]) + len(stream.codec_context.decode(None))
                if decoded != len(groups[index]):
                    raise IngestFailure(Cause.UNDECODABLE, f"of {len(groups[index])} written frames {decoded} decode")
            starts = [packet for packet in packets if packet.is_keyframe]
            keyframes = tuple(round((packet.pts or 0) * packet.time_base * fps) for packet in starts)
    except (FFmpegError, IndexError) as error:
        raise IngestFailure(Cause.UNDECODABLE, f"the video as written does not decode: {error}") from error
    if len(packets) != n_frames or keyframes[:1] != (0,):
        raise IngestFailure(Cause.UNDECODABLE, f"{len(packets)} frames were written instead of {n_frames}")
    return keyframes


def _groups(packets: list[Packet]) -> list[list[Packet]]:
    groups: list[list[Packet]] = []
    for packet in packets:
        if packet.is_keyframe or not groups:
            groups.append([])
        groups[-1].append(packet)
    return groups


def check_audio(data: bytes, n_samples: int) -> None:
    """Raises IngestFailure (undecodable) unless the audio decodes to n_samples samples."""
    try:
        with av.open(io.BytesIO(data), "r") as container:
            decoded = sum(frame.samples for frame in container.decode(audio=0))
    except (FFmpegError, IndexError) as error:
        raise IngestFailure(Cause.UNDECODABLE, f"the sound as written does not decode: {error}") from error
    if decoded != n_samples:
        raise IngestFailure(Cause.UNDECODABLE, f"{decoded} samples were written instead of {n_samples}")


def loudness_db(sound: np.ndarray[Any, np.dtype[np.float32]]) -> float:
    """RMS of float32 sound, dBFS; -120 for digital silence."""
    power = float(np.mean(np.square(sound, dtype=np.float64))) if len(sound) else 0.0
    return max(-120.0, 10 * float(np.log10(max(power, 1e-12))))


def check_worth(loudness: float, motion: float, silence_db: float, still_motion: float) -> None:
    """Raises IngestFailure: silent below silence_db (dBFS), still below still_motion (mean luma change, 0..255)."""
    if loudness < silence_db:
        raise IngestFailure(Cause.SILENT, f"the sound is at {loudness:.0f} dBFS, below {silence_db:.0f}")
    if motion < still_motion:
        raise IngestFailure(Cause.STILL, f"the picture stands still: its luma changes by {motion:.3f} of 255 a frame")
