"""Video bytes to finished frames, on CPU threads: the part of the graph that DALI has no CPU decoder for.

Only what the wanted frames depend on is decoded: from the keyframe before the first to the packet of the last, without frames
in between that no other frame refers to. Cropping, scaling and the way to RGB are one pass over the pixels that are wanted.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

UNDECODABLE = (ValueError, av.error.FFmpegError, IndexError)
"""What bad content raises. An OSError is not among them: a source that fails is no reason to skip a clip."""

Box = tuple[int, int, int, int]
"""Top, left, height, width of a crop, pixels, all even: chroma has half the resolution."""

_HALVED_CHROMA = ("yuv420p", "yuvj420p")
_SCALING = int(Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT)  # chroma between pixels, not that of every other one
_OPENING = {"codec_whitelist": "none", "max_ts_probe": "0"}
"""Nothing is decoded, nor read, to learn what an MP4's header says already."""


def decode_frames(
    video: bytes | io.RawIOBase,
    numbers: NDArray[np.integer],
    *,
    crop: Box | None = None,
    size: int | None = None,
    stated: tuple[int, int] | None = None,
    deblock: bool = True,
) -> NDArray[np.uint8]:
    """Frames by number, ascending, of an MP4 with a constant frame rate: uint8 (n, height, width, 3), RGB.

    video: its bytes, or a file of them, of which only the parts that are needed are read. crop: of each picture. size: side of
    the square that is made of it, bilinear, averaging where it shrinks. stated: height and width that the pictures should have.
    deblock: H.264 by its loop filter, as it should be; without it decoding takes an eighth less, and pictures of 112 pixels are
    0.75/255 off on average, 1.4 at most, over 36 real recordings. A frame that is not there is the one before it. Raises
    ValueError or an FFmpegError when none of the frames decodes, or the pictures are of another size, and what reading the file
    raises.
    """
    return decode_crops(video, numbers, (crop,), size=size, stated=stated, deblock=deblock)[0]


def decode_crops(
    video: bytes | io.RawIOBase,
    numbers: NDArray[np.integer],
    crops: Sequence[Box | None],
    *,
    size: int | None = None,
    stated: tuple[int, int] | None = None,
    deblock: bool = True,
    out: Sequence[NDArray[np.uint8]] = (),
) -> list[NDArray[np.uint8]]:
    """The same frames cut in several ways, decoded once; otherwise as `decode_frames`. out: arrays to fill, not new ones."""
    places: dict[int, list[int]] = {}
    for place, number in enumerate(np.asarray(numbers).tolist()):
        places.setdefault(number, []).append(place)
    made, found = list(out), set()
    file = io.BytesIO(video) if isinstance(video, bytes) else video
    file.seek(0)
    with av.open(file, "r", container_options=_OPENING) as container:
        if not container.streams.video:
            raise ValueError("there is no video in it")
        stream = container.streams.video[0]
        if not stream.average_rate or not stream.time_base:
            raise ValueError("the video member states no frame rate")
        codec = stream.codec_context
        codec.thread_count, codec.thread_type = 1, "NONE"
        if not deblock and codec.codec.name == "h264":
            codec.options = {"skip_loop_filter": "all"}
        finish = [Finish(crop, size, stated) for crop in crops]
        for number, frame in _decoded(container, stream, set(places)):
            pictures = [each(frame) for each in finish]
            made = made or [np.empty((len(numbers), *picture.shape), np.uint8) for picture in pictures]
            for whole, picture in zip(made, pictures, strict=True):
                whole[places[number]] = picture
            found.add(number)
    if not found:
        raise ValueError(f"no frame from number {min(places)} on decodes")
    before = min(found)
    for number in places:
        if number in found:
            before = number
            continue
        for whole in made:
            whole[places[number]] = whole[places[before][0]]
    return made


def _decoded(
    container: av.container.InputContainer, stream: av.VideoStream, wanted: set[int]
) -> Iterator[tuple[int, av.VideoFrame]]:
    """The wanted frames and their numbers; what they do not depend on is passed over."""
    assert stream.average_rate and stream.time_base
    per_frame, origin = float(1 / (stream.average_rate * stream.time_base)), stream.start_time or 0
    codec = stream.codec_context
    alone = _alone(codec)
    missing, last = set(wanted), max(wanted)

    def taken(frames: list[av.VideoFrame]) -> Iterator[tuple[int, av.VideoFrame]]:
        for frame in frames:
            if frame.pts is not None and (number := round((frame.pts - origin) / per_frame)) in wanted:
                yield number, frame

    if min(wanted) > 0:
        container.seek(origin + int(min(wanted) * per_frame), stream=stream)
    for packet in container.demux(stream):
        if packet.pts is None:  # the end
            continue
        number = round((packet.pts - origin) / per_frame)
        if number not in wanted and alone(packet):
            if number > last and codec.codec.name == "mjpeg":
                break
            continue
        yield from taken(codec.decode(packet))
        missing.discard(number)
        if not missing:  # all the last one refers to came before it
            break
    yield from taken(codec.decode(None))


def _alone(codec: av.VideoCodecContext) -> Callable[[av.Packet], bool]:
    """Whether no other frame refers to the one in a packet, so that it need not be decoded for their sake."""
    if codec.codec.name == "mjpeg":
        return lambda packet: True
    extra = codec.extradata or b""
    if codec.codec.name != "h264" or len(extra) < 5 or extra[0] != 1:
        return lambda packet: False
    length = (extra[4] & 3) + 1  # bytes before each NAL unit, which hold its size (ISO/IEC 14496-15, 5.2.4.1)

    def unreferenced(packet: av.Packet) -> bool:
        data, at = memoryview(packet), 0
        while at + length < len(data):
            head = data[at + length]
            if head & 31 in (1, 2, 5):  # of a slice: nal_ref_idc is the same for all of a picture (H.264, 7.4.1)
                return not head & 96
            at += length + int.from_bytes(data[at : at + length], "big")
        return False

    return unreferenced


class Finish:
    """Decoded pictures of one clip to RGB, cut and scaled: uint8 (height, width, 3). Raises ValueError."""

    def __init__(self, crop: Box | None, size: int | None, stated: tuple[int, int] | None) -> None:
        self.crop, self.size, self.stated = crop, size, stated
        # one scaler for all frames and no threads of its own: `frame.to_ndarray` makes a new one each time, at twice the cost
        self._scaler = VideoReformatter()
        self._cut: av.VideoFrame | None = None

    def __call__(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        if self.stated and (frame.height, frame.width) != self.stated:
            said = f"its pictures are {frame.width}x{frame.height}, the catalog says {self.stated[1]}x{self.stated[0]}"
            raise ValueError(said)
        if self.crop:
            frame = self._cropped(frame, self.crop)
        # Scaled into planes: swscale has vector code for full chroma there alone, and takes half the time. Where nothing is to
        # be scaled, its way into planes leaves them as they were: with whatever was in that memory before.
        scales = self.size is not None and (frame.height, frame.width) != (self.size, self.size)
        form = "gbrp" if scales else "rgb24"
        made = self._scaler.reformat(frame, self.size, self.size, format=form, interpolation=_SCALING, threads=1)
        if not scales:
            return _pixels(made.planes[0])[:, : 3 * made.width].reshape(made.height, made.width, 3)
        green, blue, red = (_pixels(plane)[:, : made.width] for plane in made.planes)
        return np.stack((red, green, blue), axis=-1)

    def _cropped(self, frame: av.VideoFrame, crop: Box) -> av.VideoFrame:
        """A frame of its own, always the same: the scaler is done with it before the next."""
        if frame.format.name not in _HALVED_CHROMA:
            frame = self._scaler.reformat(frame, format="yuv420p", threads=1)
        top, left, height, width = crop
        if top + height > frame.height or left + width > frame.width:
            raise ValueError(f"its pictures are {frame.width}x{frame.height}, too small for the crop asked for")
        if self._cut is None:
            self._cut = av.VideoFrame(width, height, frame.format.name)
            self._cut.color_range, self._cut.colorspace = frame.color_range, frame.colorspace
        for plane, (source, target) in enumerate(zip(frame.planes, self._cut.planes, strict=True)):
            y, x, h, w = crop if plane == 0 else (top // 2, left // 2, height // 2, width // 2)
            _pixels(target)[:, :w] = _pixels(source)[y : y + h, x : x + w]
        return self._cut


def _pixels(plane: Any) -> NDArray[np.uint8]:
    """Bytes of a plane, uint8 (height, bytes a line), shared."""
    return np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
