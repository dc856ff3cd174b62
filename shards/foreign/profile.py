"""Whether the clips of foreign shards are all alike, and as one of our profiles could have made them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from cmacc.shards.clip import AUDIO, VIDEO
from cmacc.shards.foreign.notes import Notes
from cmacc.shards.profile import AUDIO_CODECS, FOREIGN, VIDEO_CODECS, Profile

_SOUND_TOLERANCE_S = 0.1


class Alike:
    """Whether all clips are as one of our profiles could have made them."""

    def __init__(self, members: tuple[str, ...]) -> None:
        media = [m for m in members if m in VIDEO or m in AUDIO]
        self._pair = (media[0], media[1]) if len(media) == 2 and media[0] == "mp4" and media[1] in AUDIO_CODECS else None
        self._video = next((m for m in media if m in VIDEO), None)
        self._looks: set[tuple[Any, ...]] = set()
        self._fits = self._pair is not None
        self._gop, self._reordered = 1, False
        self.rotated = 0

    def add(self, notes: Notes, keys: set[str]) -> None:
        for sample in notes.samples():
            if sample.key in keys and not (self._video and "error" in sample.media.get(self._video, {"error": ""})):
                if self._video and sample.media[self._video]["rotation"]:
                    self.rotated += 1
                if self._pair and self._fits and not set(self._pair) - set(sample.media):
                    self._fits = self._compare(sample.media[self._pair[0]], sample.media[self._pair[1]])

    def _compare(self, video: dict[str, Any], sound: dict[str, Any]) -> bool:
        assert self._pair is not None
        if "error" in sound:
            return True  # a sample that was left out
        fps, short = video["fps"], min(video["width"], video["height"])
        nominal = max(1, round(fps))
        self._looks.add((video["codec"], nominal, short, sound["rate"]))
        marks = [*video["keyframes"], video["frames"]]
        self._gop = max(self._gop, *(b - a for a, b in pairwise(marks)))
        self._reordered |= video["reordered"]
        return (
            len(self._looks) == 1 and video["codec"] in VIDEO_CODECS and sound["codec"] == self._pair[1]
            and Profile(FOREIGN, fps=nominal).is_rate(fps) and video["constant"] and marks[0] == 0
            and not video["sound"] and not video["rotation"]
            and video["frames"] == round(video["seconds"] * fps) and short >= 16 and short % 2 == 0
            and abs(video["seconds"] - sound["seconds"]) <= _SOUND_TOLERANCE_S
        )  # fmt: skip

    def profile(self) -> Profile | None:
        """None when they are not alike. quality cannot be seen, and is the default."""
        if not self._fits or self._pair is None or not self._looks:
            return None
        codec, fps, short, rate = next(iter(self._looks))
        b_frames = min(2, self._gop - 1) if self._reordered else 0
        return Profile(
            name=FOREIGN, codec=codec, short_side=short, fps=fps, gop=self._gop, b_frames=b_frames,
            audio_codec=self._pair[1], audio_rate=rate,  # type: ignore[arg-type]
        )  # fmt: skip
