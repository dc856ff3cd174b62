"""Video bytes to frames, on CPU threads: the part of the graph that DALI has no CPU decoder for."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import VideoReformatter


def decode_frames(video: bytes, start: int, count: int, stride: int) -> np.ndarray:
    """Frames start, start + stride, ... of an MP4, uint8 (count, height, width, 3), RGB.

    Frames past the end repeat the last one. Frame numbers are those of the constant frame rate the shards room
    writes. Raises ValueError when no frame in that range decodes.
    """
    wanted = start + stride * np.arange(count)
    found: dict[int, np.ndarray] = {}
    with av.open(io.BytesIO(video), "r") as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        stream.thread_type = "NONE"
        if not stream.average_rate or not stream.time_base:
            raise ValueError("the video member states no frame rate")
        per_frame = 1 / (stream.average_rate * stream.time_base)
        origin = stream.start_time or 0
        if stream.codec_context.codec.name == "mjpeg":
            frames: Iterable[av.VideoFrame] = _intra_frames(container, stream, set(wanted.tolist()), origin, per_frame)
        else:
            if start:
                container.seek(origin + int(start * per_frame), stream=stream)
            frames = container.decode(stream)
        # One scaler for all frames and no threads of its own: `frame.to_ndarray` makes a new one each time, at twice the cost.
        to_rgb = VideoReformatter()
        for frame in frames:
            if frame.pts is None:
                continue
            number = round((frame.pts - origin) / per_frame)
            if number >= start and (number - start) % stride == 0:
                found[number] = to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()
            if number >= wanted[-1]:
                break
    if not found:
        raise ValueError(f"no frame from number {start} on decodes")
    last = found[max(found)]
    return np.stack([found.get(number, last) for number in wanted.tolist()])


def _intra_frames(
    container: av.container.InputContainer, stream: av.VideoStream, wanted: set[int], origin: int, per_frame: Fraction
) -> Iterator[av.VideoFrame]:
    """Every frame stands alone: decode the wanted packets, pass over the others."""
    for packet in container.demux(stream):
        if packet.pts is not None and round((packet.pts - origin) / per_frame) in wanted:
            yield from packet.decode()
