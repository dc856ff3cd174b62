"""Frames by PyAV.

Tried: the whole frame to RGB, then torchvision's cut and resize, 32.0 ms of CPU a clip; swscale to where the cut is as large as
the output, 33.7. Both in the DataLoader's two workers; the first on two threads, where nothing is sent between processes, 31.3.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor
from torchvision.transforms.v2 import functional

from peers.task import Wanted


def frames(video: bytes, numbers: list[int]) -> Iterator[av.VideoFrame]:
    """The frames with these numbers, ascending, from the keyframe before the first to the last; one twice asked for comes once.

    Of Motion JPEG, where every packet is a frame, the wanted packets alone.
    """
    asked = set(numbers)
    with av.open(io.BytesIO(video)) as container:
        stream = container.streams.video[0]
        stream.thread_count, stream.thread_type = 1, "NONE"
        ticks = 1 / (stream.average_rate * stream.time_base)
        container.seek(int(numbers[0] * ticks), stream=stream)
        if stream.codec_context.name == "mjpeg":
            packets = (p for p in container.demux(stream) if p.pts is not None and round(p.pts / ticks) in asked)
            decoded = (frame for packet in packets for frame in packet.decode())
        else:
            decoded = container.decode(stream)
        for frame in decoded:
            number = round(frame.pts / ticks)
            if number in asked:
                yield frame
            if number >= numbers[-1]:
                break


def decode(video: bytes, view: Wanted) -> Tensor:
    """Frames of a view, cut and scaled: uint8 (F, 3, size, size)."""
    scaler = VideoReformatter()
    found = [scaler.reformat(frame, format="rgb24", threads=1).to_ndarray() for frame in frames(video, view.frames)]
    found += [found[-1]] * (len(view.frames) - len(found))
    top, left, height, width = view.crop
    pictures = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)[..., top : top + height, left : left + width]
    return functional.resize(pictures, [view.size, view.size], antialias=True)


def bare(video: bytes, view: Wanted) -> int:
    """Whole pictures scaled to the output size, RGB, and nothing else; how many."""
    scaler = VideoReformatter()
    size = view.size
    pictures = [scaler.reformat(f, size, size, "rgb24", threads=1).to_ndarray() for f in frames(video, view.frames)]
    return len(pictures)
