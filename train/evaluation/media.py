"""Videos of any codec and rate, as files on a disk: what they are, and what is on in them at some instants.

Clips at rest all have one frame rate, one picture and one sound; files of a labelled data set have what they were given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from cmacc.shards.probe import probe
from cmacc.train.loading.frames import Box, Finish
from cmacc.train.loading.sound import OPEN


def reason(error: BaseException) -> str:
    """What such an error says, in a line."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(said).split())[:200]


@dataclass(frozen=True)
class Film:
    """What a video file says of its picture. width, height: as stored; turns: quarters by which it is to be turned."""

    path: Path
    frames: int
    fps: float
    width: int
    height: int
    turns: int

    @property
    def seconds(self) -> float:
        return self.frames / self.fps

    def pictures(self, numbers: Sequence[NDArray[np.int64]], crops: Sequence[Box], size: int) -> list[NDArray[np.uint8]]:
        """For each of some views the frames on screen at the middle of frame `numbers` of an even clock, cut by its crop, scaled
        and upright: uint8 (F, size, size, 3), RGB. The file is decoded once, up to the last of them.

        A frame that is not there is the one before it, or the first. Raises one of UNREADABLE.
        """
        made = [np.empty((len(each), size, size, 3), np.uint8) for each in numbers]
        wanted: dict[int, list[tuple[int, int]]] = {}
        for view, each in enumerate(numbers):
            for place, number in enumerate(each.tolist()):
                wanted.setdefault(number, []).append((view, place))
        left = sorted(wanted, reverse=True)
        finish = [Finish(crop, size, (self.height, self.width)) for crop in crops]

        def show(frame: Any, until: float) -> None:
            """Take `frame` for all that is wanted before second `until`."""
            pictures: dict[int, NDArray[np.uint8]] = {}
            while left and (left[-1] + 0.5) / self.fps < until:
                for view, place in wanted[left.pop()]:
                    if view not in pictures:
                        pictures[view] = np.rot90(finish[view](frame), self.turns)
                    made[view][place] = pictures[view]

        before, origin = None, None
        with self.path.open("rb") as file, av.open(file, "r", container_options=OPEN, metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count, stream.codec_context.thread_type = 1, "NONE"
            tick = stream.time_base
            for count, frame in enumerate(container.decode(stream)):
                # AVI has no times of display: its frames come at an even pace
                at = count / self.fps if frame.pts is None or tick is None else float(frame.pts * tick)
                origin = at if origin is None else origin
                if before is not None:
                    show(before, at - origin)
                before = frame
                if not left:
                    break
        if before is None:
            raise ValueError("none of its frames decodes")
        show(before, float("inf"))
        return made


def look_at(path: Path) -> Film:
    """Raises one of UNREADABLE; a file that is cut short is one of them."""
    with path.open("rb") as file:
        about = probe(file, "video")
    frames = max(1, round(about["seconds"] * about["fps"]))  # of an even clock, whatever the file's own times
    return Film(path, frames, about["fps"], about["width"], about["height"], about["rotation"] // 90 % 4)
