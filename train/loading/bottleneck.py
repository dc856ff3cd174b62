"""What holds a loader up: each stage alone, the others replaced by dummies, and the whole without each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cmacc.train.loading.loader import LoaderConfig, TrainingLoader
from cmacc.train.loading.reader import Clip, Decoded, Encoded, ViewReader
from cmacc.train.loading.sampler import Source
from cmacc.train.loading.views import View, ViewConfig

STAGES = ("look up", "read", "decode", "graph")
"""In the order in which a clip goes through them."""

ADVICE = {
    "look up": "put the catalog on a local disk",
    "read": "give a faster disk, or for a remote store CMACC_CACHE on a local one",
    "decode": "give more cores or a GPU, or re-shard with --transcode mjpeg or a smaller --short-side",
    "graph": "give more cores or a GPU, or draw fewer augmentations (view.blur is the dearest)",
}


@dataclass(frozen=True)
class Bottleneck:
    """Clips a second. whole: all stages. alone, without: by stage. stage: the one without which the loader gains most."""

    whole: float
    alone: dict[str, float]
    without: dict[str, float]

    @property
    def stage(self) -> str:
        return max(self.without, key=lambda name: self.without[name])

    def sentence(self) -> str:
        """What holds the loader up, what it costs, and what would help."""
        stage, free = self.stage, self.without[self.stage]
        return (
            f"The loader makes {self.whole:.0f} clips/s; {stage!r} holds it up (alone {self.alone[stage]:.0f} clips/s): were it "
            f"free, the loader would make {free:.0f} clips/s, {free / self.whole:.1f} times as many. "
            f"To speed it up, {ADVICE[stage]}."
        )


def find_bottleneck(
    sources: Sequence[Source],
    view: ViewConfig,
    config: LoaderConfig,
    *,
    seconds: float = 3.0,
    on_progress: Callable[[int], None] | None = None,
) -> Bottleneck:
    """Run the training loader 9 times for at least `seconds` each, after some batches to warm up.

    Reading is measured as the source is found: what the system has in memory already comes from there. From a local disk
    "read" reads all of each clip, of which a view needs but some, which "decode" reads.
    """
    done = 0

    def speed(dummies: set[str]) -> float:
        nonlocal done
        loader = TrainingLoader(sources, view, config, seed=0)
        loader.reader.close()
        loader.reader = _Partly(loader.reader, dummies)
        try:
            batches, clips = iter(loader), 0
            for _ in range(config.ahead + 2):  # made ahead while nobody waited
                next(batches)
            began = time.perf_counter()
            while clips == 0 or time.perf_counter() - began < seconds:
                clips += len(next(batches).ids)
            elapsed = time.perf_counter() - began
        finally:
            loader.close()
        done += 1
        if on_progress:
            on_progress(done)
        return clips / elapsed

    every = set(STAGES)
    return Bottleneck(
        speed(set()),
        {stage: speed(every - {stage}) for stage in STAGES},
        {stage: speed({stage}) for stage in STAGES},
    )


class _Partly(ViewReader):
    """A reader some of whose stages give again what they first gave."""

    def __init__(self, like: ViewReader, dummies: set[str]) -> None:
        super().__init__(
            like.datasets,
            like.view,
            batch=like.batch,
            device=like.device,
            decoder=like.decoder,
            threads=like.threads,
            deblock=like.deblock,
        )
        self._dummies = dummies
        self._first: dict[str, Any] = {}

    def _again(self, stage: str, make: Callable[[], Any]) -> Any:
        if stage not in self._dummies or stage not in self._first:
            self._first[stage] = made = make()
            return made
        return self._first[stage]

    def look_up(self, source: Sequence[int], row: Sequence[int]) -> list[Clip]:
        before = self._first.get("look up")
        clips = self._again("look up", lambda: super(_Partly, self).look_up(source, row))
        if "read" in self._dummies and before:  # what is not read again has to be of the same clips
            clips = self._first["look up"] = before
        return clips

    def read(self, clips: Sequence[Clip]) -> list[Encoded]:
        def work() -> list[Encoded]:
            found = super(_Partly, self).read(clips)
            if not self._dummies & {"read", "decode"}:
                return found
            # a file would be read while it is decoded; whole, which is more than a view needs
            return [(video if isinstance(video, bytes) else video.read(), sound) for video, sound in found]

        return self._again("read", work)

    def decode(self, clip: Clip, views: Sequence[View], video: Any, sound: bytes, out: Any = ()) -> Decoded:
        return self._again("decode", lambda: super(_Partly, self).decode(clip, views, video, sound, out))

    def make(self, decoded: Sequence[Decoded], views: Sequence[tuple[View, ...]]) -> tuple[list[Tensor], list[Tensor]]:
        return self._again("graph", lambda: super(_Partly, self).make(decoded, views))
