"""All the clips of one source video in one pass: picture and sound cut at the same instants, encoded, verified."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from av.error import FFmpegError

from cmacc.ingest.causes import Cause, IngestFailure, failure_from
from cmacc.ingest.checks import Checks
from cmacc.ingest.cut import Cut, Limits
from cmacc.ingest.encode import sound_rate
from cmacc.ingest.manifest import ClipRequest
from cmacc.ingest.source import Media, Picture, Samples, Trouble, open_source
from cmacc.shards.clip import Clip
from cmacc.shards.profile import Profile

log = logging.getLogger(__name__)

T = TypeVar("T")
Moment = Picture | Samples | Trouble
Outcome = tuple[ClipRequest, Clip | IngestFailure]
_SKIP_S = 20  # a longer stretch that no clip wants is jumped over
_RUN_UP_S, _BLIND_RUN_UP_S = 1, 10


def transcode(
    media: Media | Path,
    requests: Sequence[ClipRequest],
    profile: Profile,
    limits: Limits | None = None,
    scratch: Path | None = None,
    checks: Checks | None = None,
) -> Iterator[Outcome]:
    """A clip or a failure for each request, in order of their ends. A full disk raises IngestFailure instead.

    media: the source video, as `fetched` gives it, or one file.
    scratch: where a folder for the clips in work is made, the system's temporary one by default.
    """
    limits = limits or Limits()
    media = Media(media) if isinstance(media, Path) else media
    with TemporaryDirectory(prefix="cut-", dir=scratch) as folder:
        try:
            cuts, failures = _plan(media, requests, profile, limits, Path(folder), checks)
        except IngestFailure as failure:
            if failure.cause.stops:
                raise
            yield from ((request, failure) for request in requests)
            return
        yield from failures
        for run in _runs(cuts):
            rate = sound_rate(profile)
            yield from _cut_run(run, limits.bounded(_moments(media, run[0].start_s, rate, limits.decoder_threads), rate), rate)


def _plan(
    media: Media, requests: Sequence[ClipRequest], profile: Profile, limits: Limits, folder: Path, checks: Checks | None
) -> tuple[list[Cut], list[Outcome]]:
    """The clips to cut, by start, and the requests for which that is already no use."""
    cuts: list[Cut] = []
    failures: list[Outcome] = []
    with open_source(media) as source:
        limits.admit(source)
        aspect = source.aspect
        whole = any(request.end_s is None for request in requests)
        first_s, last_s = source.span() if whole else (Fraction(0), Fraction(0))
        declared_s = source.duration_s
    for number, request in enumerate(requests):
        start_s = Fraction(round(request.start_s * 1000), 1000)
        if request.end_s is None:
            start_s = max(start_s, first_s)
            end_s = min(last_s, start_s + Fraction(limits.max_clip_s))
        else:
            end_s = Fraction(round(request.end_s * 1000), 1000)
        cut = Cut(request, start_s, end_s, aspect, profile, limits, folder / f"{number}.mp4", checks)
        if (short := cut.too_short(declared_s)) is not None:
            failures.append((request, short))
        else:
            cuts.append(cut)
    return sorted(cuts, key=lambda cut: (cut.start_s, cut.end_s)), failures


def _runs(cuts: Iterable[Cut]) -> Iterator[list[Cut]]:
    """Clips close enough to be decoded in one go."""
    run: list[Cut] = []
    for cut in cuts:
        if run and cut.start_s - max(c.end_s for c in run) > _SKIP_S:
            yield run
            run = []
        run.append(cut)
    if run:
        yield run


def _cut_run(run: list[Cut], moments: Iterator[Moment], rate: int) -> Iterator[Outcome]:
    later, active = deque(run), list[Cut]()
    last: Picture | None = None
    troubles: list[Trouble] = []

    def begin() -> Iterator[Outcome]:
        """The next clip listens from now on; what came before it may still be on display, or have gone wrong."""
        active.append(later.popleft())
        for earlier in (last, *troubles):
            if earlier is not None and (outcome := _step(active[-1], earlier)) is not None:
                yield active.pop().request, outcome
                return

    try:
        for moment in moments:
            while later and not isinstance(moment, Trouble) and _at(moment, rate) >= later[0].start - 1:
                yield from begin()
            if isinstance(moment, Picture):
                last = moment
            elif isinstance(moment, Trouble):
                troubles.append(moment)
            for cut in list(active):
                outcome = _step(cut, moment)
                if outcome is not None:
                    active.remove(cut)
                    yield cut.request, outcome
            if not active and not later:
                return
        while later:
            yield from begin()
        while active:
            cut = active.pop(0)
            yield cut.request, _guarded(cut.finish)
    except IngestFailure as failure:
        if failure.cause.stops:
            raise
        yield from ((cut.request, failure) for cut in chain(active, later))
    finally:
        for cut in chain(active, later):
            cut.abandon()


def _at(moment: Picture | Samples, rate: int) -> float:
    return moment.at if isinstance(moment, Picture) else moment.first / rate


def _step(cut: Cut, moment: Moment) -> Clip | IngestFailure | None:
    """What became of the clip with this moment; None while it needs more."""
    failure = _guarded(lambda: cut.take(moment))
    if failure is not None:
        cut.abandon()
        return failure
    return _guarded(cut.finish) if cut.done else None


def _guarded(act: Callable[[], T]) -> T | IngestFailure:
    try:
        return act()
    except (IngestFailure, FFmpegError, MemoryError) as error:
        return _failure(error)


def _failure(error: Exception) -> IngestFailure:
    """Raises it when it is the disk's fault and no clip's."""
    if isinstance(error, IngestFailure):
        return error
    if isinstance(error, OSError) and (failure := failure_from(error)).cause.stops:
        raise failure from error
    return IngestFailure(Cause.UNDECODABLE, f"no clip can be encoded from it: {error}")


def _moments(media: Media, start_s: Fraction, rate: int, threads: int) -> Iterator[Moment]:
    """Everything from start_s on or a little earlier, decoded from as late as the container lets us."""
    with open_source(media, threads) as source:
        run_up = _RUN_UP_S if source.exact_seek else _BLIND_RUN_UP_S
        if start_s > run_up and not source.clockless:
            source.seek(start_s - run_up)
            moments = source.play(rate)
            ahead: list[Moment] = []
            for moment in moments:
                ahead.append(moment)
                if isinstance(moment, Picture):
                    break
            first = ahead[-1] if ahead else None
            if isinstance(first, Picture) and first.time_s <= start_s:
                yield from chain(ahead, moments)
                return
            log.debug("no keyframe found before %.1f s, decoding from the start", float(start_s))
    with open_source(media, threads) as source:
        yield from source.play(rate)
