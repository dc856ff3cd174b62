"""Films of any codec, rate and shape, as files or their bytes: what they are, and what is on in them at some instants.

Clips at rest all have one frame rate, one picture and one sound; these are files of labelled data sets, and what encoders are
tried on. The rule for them is that of `sound.read_sound`: a file that is cut short or does not decode is refused, never taken in
part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from cmacc.shards.probe import probe
from cmacc.train.loading.frames import Box, Finish
from cmacc.train.loading.sound import LONGEST_S, OPEN, Source, opened

_EARLY = 0.25
"""Of the frame interval: a frame that comes this much after an instant is taken to be on screen at it."""
_CLOCK = 120.0
"""Instants a second of a film whose frames come unevenly."""
_SEEK_S = 5.0  # a film is decoded from its beginning if no more than so much lies before what is wanted
_ATTACHED_PICTURE = 0x400


@dataclass(frozen=True)
class Film:
    """What a film says of its picture. frames: of an even clock of `fps` a second, whatever the file's own times. width, height:
    as it is to be seen, but for turning; aspect: width of a stored pixel over its height; turns: quarters to turn it by.
    """

    source: Source
    frames: int
    fps: float
    width: int
    height: int
    aspect: float
    turns: int

    @property
    def seconds(self) -> float:
        return self.frames / self.fps

    def pictures(self, numbers: Sequence[NDArray[np.int64]], crops: Sequence[Box], size: int) -> list[NDArray[np.uint8]]:
        """For each of some views the frames on screen at the instants number / fps, cut by its crop, scaled and upright: uint8
        (F, size, size, 3), RGB. The file is decoded once, up to the last of them.

        A frame that is not there is the one before it, or the first. Raises one of UNREADABLE.
        """
        first = min(int(each.min()) for each in numbers)
        made = self._pictures(numbers, crops, size, first / self.fps) if first > _SEEK_S * self.fps else None
        made = self._pictures(numbers, crops, size, None) if made is None else made
        if made is None:
            raise ValueError("none of its frames decodes")
        return made

    def _pictures(
        self, numbers: Sequence[NDArray[np.int64]], crops: Sequence[Box], size: int, sought: float | None
    ) -> list[NDArray[np.uint8]] | None:
        """sought: second from which on to decode. None where no frame decodes, or the first one is later than that."""
        made = [np.empty((len(each), size, size, 3), np.uint8) for each in numbers]
        wanted: dict[int, list[tuple[int, int]]] = {}
        for view, each in enumerate(numbers):
            for place, number in enumerate(each.tolist()):
                wanted.setdefault(number, []).append((view, place))
        left = sorted(wanted, reverse=True)
        finish = [Finish(_stored(crop, self.aspect), size, None) for crop in crops]

        def show(frame: Any, until: float) -> None:
            """Take `frame` for all that is wanted before second `until`."""
            pictures: dict[int, NDArray[np.uint8]] = {}
            while left and (left[-1] + _EARLY) / self.fps < until:
                for view, place in wanted[left.pop()]:
                    if view not in pictures:
                        pictures[view] = np.rot90(finish[view](frame), self.turns)
                    made[view][place] = pictures[view]

        before = None
        for at, frame in _timed(self.source, self.fps, sought):
            if before is not None:
                show(before, at)
            elif sought is not None and at > sought:
                return None
            before = frame
            if not left:
                return made
        if before is None:
            return None
        show(before, float("inf"))
        return made


def look_at(source: Source) -> Film:
    """What a file or its bytes hold, of the first ten minutes. Raises one of UNREADABLE, also for a file that is cut short."""
    with opened(source) as file:
        about = probe(file, "video")
        file.seek(0)
        with av.open(file, "r", container_options=OPEN, metadata_errors="ignore") as container:
            aspect = float(_picture(container).sample_aspect_ratio or 1)
    aspect = aspect if 0.25 <= aspect <= 4 else 1.0
    fps = about["fps"] if about["constant"] else max(about["fps"], _CLOCK)
    frames = max(1, round(min(about["seconds"], LONGEST_S) * fps))
    return Film(source, frames, fps, round(about["width"] * aspect), about["height"], aspect, about["rotation"] // 90 % 4)


def _timed(source: Source, fps: float, sought: float | None) -> Iterator[tuple[float, Any]]:
    """Frames with their seconds since the first one of the film, all or from the keyframe before second `sought` on."""
    with opened(source) as file, av.open(file, "r", container_options=OPEN, metadata_errors="ignore") as container:
        stream = _picture(container)
        codec, tick = stream.codec_context, stream.time_base
        codec.thread_count, codec.thread_type = 1, "NONE"  # threads of a decoder that meets damaged bytes can wait for ever
        origin: float | None = None
        if sought is not None:
            if tick is None or stream.start_time is None or container.format.name == "avi":
                return
            container.seek(stream.start_time + int(sought / tick), stream=stream)
            origin = float(stream.start_time * tick)
        for count, frame in enumerate(container.decode(stream)):
            # AVI has no times of display: its frames come at an even pace
            at = count / fps if frame.pts is None or tick is None else float(frame.pts * tick)
            origin = at if origin is None else origin
            yield at - origin, frame


def _picture(container: Any) -> Any:
    """The stream that `probe` tells of."""
    streams = [stream for stream in container.streams.video if not int(stream.disposition) & _ATTACHED_PICTURE]
    return min(streams, key=lambda stream: (not int(stream.disposition) & 1, stream.index))


def _stored(crop: Box, aspect: float) -> Box:
    """A crop of the picture as it is to be seen, in pixels as they are stored."""
    if aspect == 1:
        return crop
    top, left, height, width = crop
    return top, int(left / aspect) // 2 * 2, height, max(2, int(width / aspect) // 2 * 2)
