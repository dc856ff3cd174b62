"""Clips encoded anew, in processes of their own: what ingest does with source videos, for the clips of a data set."""

from __future__ import annotations

import io
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing import get_context

from cmacc.ingest import Checks, ClipRequest, IngestFailure, Limits, Media, transcode
from cmacc.ingest.child import die_with
from cmacc.shards.clip import AUDIO, VIDEO, Clip
from cmacc.shards.options import change
from cmacc.shards.profile import Profile
from cmacc.shards.profile import profile as named_profile

log = logging.getLogger(__name__)

_DAY_S = 86_400.0
_KEEP_ALL = Checks(silent="column", still="column")


def parse_profile(text: str) -> Profile:
    """`h264`, or `h264:short_side=112,fps=16,gop=16`. Raises ValueError with a sentence."""
    name, _, changes = text.partition(":")
    pairs = [pair.partition("=") for pair in changes.split(",") if pair]
    if wrong := next((p for p in pairs if not p[1]), None):
        raise ValueError(f"profile {text!r} has {wrong[0]!r} without a value; write it as in h264:fps=16,gop=16")
    return change(named_profile(name), {field.strip(): value for field, _, value in pairs})


def transcoder(profile: Profile, workers: int | None = None) -> Callable[[Iterator[Clip]], Iterator[Clip]]:
    """A function from clips to the same clips of `profile`, in their order; key, source, instants, labels and captions stay.

    What cannot be decoded is left out, with a warning that names it, and so is what kills the process that decodes it.
    """
    return lambda clips: _transcoded(clips, profile, workers or os.cpu_count() or 1)


def _transcoded(clips: Iterable[Clip], profile: Profile, workers: int) -> Iterator[Clip]:
    waiting: deque[tuple[Clip, Future[Clip]]] = deque()
    source = iter(clips)
    with ExitStack() as held:
        pool = _pool(held, workers)
        while True:
            for clip in source:
                waiting.append((clip, pool.submit(encode_anew, clip, profile)))
                if len(waiting) >= 2 * workers:
                    break
            if not waiting:
                return
            clip, task = waiting.popleft()
            try:
                yield task.result()
            except IngestFailure as failure:
                log.warning("clip %s is left out: %s", clip.key, failure)
            except BrokenProcessPool:
                # one of those in work killed its process, and nobody knows which: each alone, then on with all the cores
                for one in (clip, *(c for c, _ in waiting)):
                    yield from _alone(one, profile)
                waiting.clear()
                pool = _pool(held, workers)


def _alone(clip: Clip, profile: Profile) -> Iterator[Clip]:
    with ExitStack() as held:
        try:
            yield _pool(held, 1).submit(encode_anew, clip, profile).result()
        except IngestFailure as failure:
            log.warning("clip %s is left out: %s", clip.key, failure)
        except BrokenProcessPool:
            log.warning("clip %s is left out: the process that decoded it died", clip.key)


def _pool(held: ExitStack, workers: int) -> ProcessPoolExecutor:
    fresh = get_context("spawn")
    return held.enter_context(ProcessPoolExecutor(workers, mp_context=fresh, initializer=die_with, initargs=(os.getpid(),)))


def encode_anew(clip: Clip, profile: Profile) -> Clip:
    """One clip of another profile, from the bytes of its members. Raises IngestFailure."""
    video = next((clip.members[m] for m in VIDEO if m in clip.members), b"")
    sound = next((clip.members[m] for m in AUDIO if m in clip.members), None)
    media = Media(io.BytesIO(video), None if sound is None else io.BytesIO(sound))
    request = ClipRequest(0, "", clip.facts.source, clip.key)
    limits = Limits(max_clip_s=_DAY_S)
    _, made = next(transcode(media, [request], profile, limits, checks=_KEEP_ALL))
    if isinstance(made, IngestFailure):
        raise made
    old = clip.facts
    facts = replace(
        made.facts, source=old.source, start_s=old.start_s, end_s=old.end_s, labels=old.labels, split=old.split,
        captions=old.captions, duplicate_of=old.duplicate_of,
    )  # fmt: skip
    return Clip(clip.key, facts, made.members)
