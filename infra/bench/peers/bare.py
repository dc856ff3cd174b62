"""The physical limit: decode, scale and encode alone, in memory, once over each source video. No download, no sound, no file."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import av
from av.codec.context import Flags
from av.video.reformatter import VideoReformatter

from cmacc.ingest.encode import _SCALING, _video_codec  # the very settings, so that the two cannot drift apart
from cmacc.shards.profile import Profile


def bare_pass(data: bytes, spans: tuple[tuple[float, float], ...], profile: Profile) -> int:
    """Bytes of video made of the clips at `spans` (seconds, ascending, apart) of the source video `data`."""
    made = 0
    with av.open(io.BytesIO(data)) as source:
        stream = source.streams.video[0]
        stream.codec_context.thread_count = 1
        source.seek(int(spans[0][0] * 1_000_000), backward=True)
        frames = source.decode(stream)
        for start, end in spans:
            made += _clip(frames, Fraction(start), round((end - start) * profile.fps), profile)
    return made


def _clip(frames: Any, start_s: Fraction, count: int, profile: Profile) -> int:
    """Encode `count` frames from start_s on: each instant shows the first frame that comes at most half a frame before it."""
    codec, options = _video_codec(profile)
    encoder: Any = None
    scaler = VideoReformatter()
    made = shown = 0
    for frame in frames:
        times = min(round((frame.pts * frame.time_base - start_s) * profile.fps) + 1, count) - shown
        if times < 1:
            continue
        scale = min(1.0, profile.short_side / min(frame.width, frame.height))
        width, height = (2 * round(side * scale / 2) for side in (frame.width, frame.height))
        shaped = scaler.reformat(frame, width=width, height=height, format="yuv420p", interpolation=_SCALING, threads=1)
        shaped.pict_type = 0
        if encoder is None:
            encoder = av.CodecContext.create(codec, "w")
            encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
            encoder.framerate, encoder.time_base = Fraction(profile.fps), Fraction(1, profile.fps)
            encoder.gop_size, encoder.max_b_frames, encoder.thread_count = profile.gop, profile.b_frames, 1
            encoder.flags |= Flags.bitexact | Flags.closed_gop
            encoder.options = options
        for _ in range(times):
            shaped.pts, shaped.time_base = shown, Fraction(1, profile.fps)
            made += sum(packet.size for packet in encoder.encode(shaped))
            shown += 1
        if shown == count:
            break
    return made + sum(packet.size for packet in encoder.encode(None)) if encoder else made
