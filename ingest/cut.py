"""One clip in the making: takes pictures and sound as they are decoded, ends as a verified clip or a failure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from av.video.frame import VideoFrame

from cmacc.ingest.causes import Cause, IngestFailure
from cmacc.ingest.checks import Checks, check_audio, check_video, check_worth, measure
from cmacc.ingest.encode import VideoWriter, encode_audio, sound_rate
from cmacc.ingest.fingerprint import looks
from cmacc.ingest.manifest import ClipRequest
from cmacc.ingest.source import Picture, Samples, Source, Trouble
from cmacc.shards.clip import Clip, Facts
from cmacc.shards.profile import Profile


@dataclass(frozen=True)
class Limits:
    """What makes a clip, and what making it may cost.

    max_clip_s: of a clip that names no end. min_clip_s: a shorter one is too-short.
    slack_s: what may be missing at either end; the nearest picture and silence fill it, so that a clip is as long as asked.
    decoder_threads: for one source video. memory_mb: that the decoders of one child process may hold, MiB.
    max_video_s, max_streams: of a source video. max_frames: decoded in one pass over it. max_pixels: of one frame.
    """

    max_clip_s: float = 60.0
    min_clip_s: float = 0.3
    slack_s: float = 0.25
    decoder_threads: int = 1
    memory_mb: int = 4096
    max_video_s: float = 12 * 3600.0
    max_frames: int = 2_000_000
    max_pixels: int = 8192 * 4320
    max_streams: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.min_clip_s <= self.max_clip_s:
            raise ValueError(f"min_clip_s is {self.min_clip_s}; give more than 0 and at most max_clip_s ({self.max_clip_s})")
        if self.slack_s < 0 or self.decoder_threads < 0:
            raise ValueError(f"slack_s is {self.slack_s} and decoder_threads {self.decoder_threads}; give 0 or more")
        if self.memory_mb < 256:
            raise ValueError(f"memory_mb is {self.memory_mb}; no decoder does with less than 256")
        for name in ("max_video_s", "max_frames", "max_pixels"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give more than 0")
        if self.max_streams < 2:
            raise ValueError(f"max_streams is {self.max_streams}; a clip needs two, picture and sound")

    def admit(self, source: Source) -> None:
        """Raises IngestFailure (too-large) when already the headers of a source video say too much."""
        video = source.video.codec_context
        self._refuse(max(len(stream.container.streams) for stream in (source.video, source.audio)), self.max_streams, "streams")
        self._refuse(video.width * video.height, self.max_pixels, "pixels in a frame")
        self._refuse(float(source.duration_s or 0), self.max_video_s, "seconds")

    def bounded(self, moments: Iterator[Picture | Samples | Trouble], rate: int) -> Iterator[Picture | Samples | Trouble]:
        """One pass over a source video, its sound at `rate` Hz. Raises IngestFailure (too-large) where its headers lied."""
        pictures = 0
        for moment in moments:
            if isinstance(moment, Picture):
                pictures += 1
                self._refuse(pictures, self.max_frames, "frames to decode")
                self._refuse(moment.frame.width * moment.frame.height, self.max_pixels, "pixels in a frame")
                self._refuse(moment.at, self.max_video_s, "seconds")
            elif isinstance(moment, Samples):
                self._refuse(moment.first / rate, self.max_video_s, "seconds")
            yield moment

    @staticmethod
    def _refuse(found: float, most: float, what: str) -> None:
        if found > most:
            raise IngestFailure(Cause.TOO_LARGE, f"the source video has {found:.0f} {what}, more than {most:.0f}")


class Cut:
    """Frame i shows what the source shows at start + i/fps; sample j sounds at start + j/rate."""

    def __init__(self, request: ClipRequest, start_s: Fraction, end_s: Fraction, aspect: Fraction, profile: Profile,
                 limits: Limits, path: Path, checks: Checks | None = None) -> None:  # fmt: skip
        self.request, self.profile, self.limits, self.checks = request, profile, limits, checks or Checks()
        self.start_s = start_s
        # of the whole source, no frame more than it has; of a named interval, the nearest count
        count = (end_s - start_s) * profile.fps
        self.n_frames = math.floor(count) if request.end_s is None else round(count)
        self.end_s = start_s + Fraction(self.n_frames, profile.fps)
        rate = sound_rate(profile)
        self.first_sample = round(start_s * rate)
        self.n_samples = round(Fraction(self.n_frames, profile.fps) * rate)
        self.sound, self.heard = np.zeros(0, np.float32), np.zeros(0, bool)  # of full length from the first sample on
        self.held: Picture | None = None
        self.start, self.end = float(start_s), float(self.end_s)
        self.shown = self.start  # how far the pictures reach, seconds
        self.holes: list[tuple[float, float]] = []  # without a picture for longer than the slack
        self.sound_done = False
        self.trouble: dict[bool, Trouble] = {}
        self.writer = VideoWriter(path, aspect, profile, looks(self.n_frames))

    def too_short(self, source_s: Fraction | None) -> IngestFailure | None:
        """Why it is no use to begin, as far as can be known from the source's declared duration."""
        seconds = float(self.end_s - self.start_s)
        if seconds >= self.limits.min_clip_s:
            if source_s is None or self.start_s <= source_s + 1:
                return None
            return IngestFailure(Cause.TOO_SHORT, f"the source video ends at {float(source_s):.2f} s, before the clip begins")
        return IngestFailure(Cause.TOO_SHORT, f"only {max(seconds, 0):.2f} s, less than {self.limits.min_clip_s:g} s")

    @property
    def done(self) -> bool:
        """Nothing that is still to be decoded can belong to this clip."""
        return self.sound_done and self.writer.n_frames == self.n_frames

    def take(self, moment: Picture | Samples | Trouble) -> None:
        """Raises IngestFailure (desync) when a clock of the source jumps back within this clip."""
        if isinstance(moment, Picture):
            self._see(moment)
        elif isinstance(moment, Samples):
            self._hear(moment)
        else:
            if moment.cause is Cause.DESYNC and (self.held is not None or self.heard.any()):
                raise IngestFailure(moment.cause, moment.detail)
            self.trouble.setdefault(moment.picture, moment)

    def _hear(self, samples: Samples) -> None:
        at = samples.first - self.first_sample
        begin, end = max(at, 0), min(at + len(samples.data), self.n_samples)
        if begin < end:
            if not len(self.sound):
                self.sound, self.heard = np.zeros(self.n_samples, np.float32), np.zeros(self.n_samples, bool)
            self.sound[begin:end] = samples.data[begin - at : end - at]
            self.heard[begin:end] = True
        self.sound_done |= at + len(samples.data) >= self.n_samples

    def _see(self, picture: Picture) -> None:
        missing = min(picture.at, self.end) - max(self.shown, self.start)
        if self.held is None and missing > self.limits.slack_s:
            raise self._short(True, f"has no picture in the first {missing:.2f} s of the clip")
        if missing > self.limits.slack_s:
            self.holes.append((self.shown, picture.at))
        self.shown = picture.at + picture.duration_s
        slot = self._slot(picture.time_s, self.held.time_s if self.held else None)
        if slot > 0:
            self._show((self.held or picture).frame, min(slot, self.n_frames))
        self.held = picture

    def _slot(self, time_s: Fraction, before_s: Fraction | None) -> int:
        """The first frame that shows a picture of time_s, which follows one of before_s.

        Each instant of the grid shows the picture nearest to it, but none appears more than half a frame early. In whole
        numbers: ceil((time_s - early_s - start_s) * fps) with early_s = min(1 / (2 fps), (time_s - before_s) / 2).
        """
        fps, (n, d), (start_n, start_d) = self.profile.fps, time_s.as_integer_ratio(), self.start_s.as_integer_ratio()
        slot = -(-(2 * fps * (n * start_d - start_n * d) - d * start_d) // (2 * d * start_d))
        if before_s is None:
            return slot
        n0, d0 = before_s.as_integer_ratio()
        middle = (n * d0 + n0 * d) * start_d - 2 * start_n * d * d0
        return max(slot, -(-fps * middle // (2 * d * d0 * start_d)))

    def _show(self, frame: VideoFrame, until: int) -> None:
        self.writer.write(frame, until - self.writer.n_frames)

    def finish(self) -> Clip:
        """The clip, verified. Raises IngestFailure."""
        try:
            self._check_picture()
            self._check_sound()
            assert self.held is not None
            self._show(self.held.frame, self.n_frames)
            return self._clip(self.writer.close())
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let go of everything: a long source video has thousands of clips."""
        self.writer.abandon()
        self.held = None
        self.sound, self.heard = np.zeros(0, np.float32), np.zeros(0, bool)

    def _check_picture(self) -> None:
        if self.held is None:
            raise self._short(True, "has no picture in the interval")
        shown = max(self.shown, self.held.at + 1 / self.profile.fps)
        if (missing := self.end - shown) > self.limits.slack_s:
            raise self._short(True, f"has no picture in the last {missing:.2f} s of the clip")
        if self.holes and True in self.trouble:
            raise self._short(True, "")

    def _check_sound(self) -> None:
        at = np.flatnonzero(self.heard)
        if not len(at):
            raise self._short(False, "has no sound in the interval")
        rate = sound_rate(self.profile)
        for missing, where in ((at[0], "first"), (len(self.heard) - 1 - at[-1], "last")):
            if missing / rate > self.limits.slack_s:
                raise self._short(False, f"has no sound in the {where} {missing / rate:.2f} s of the clip")
        for begin_s, end_s in self.holes:
            begin, end = (max(round(at_s * rate) - self.first_sample, 0) for at_s in (begin_s, end_s))
            if np.count_nonzero(~self.heard[begin:end]) / rate > self.limits.slack_s:
                raise IngestFailure(Cause.UNDECODABLE, f"the source video has a hole at {begin_s:.2f} s, in picture and sound")
        # a picture that stays and sound that pauses are no fault where everything decodes
        if np.diff(at).max(initial=0) / rate > self.limits.slack_s and False in self.trouble:
            raise self._short(False, "")

    def _short(self, picture: bool, detail: str) -> IngestFailure:
        """What is missing and, if something did not decode, why."""
        trouble = self.trouble.get(picture)
        if trouble is not None:
            return IngestFailure(trouble.cause, trouble.detail)
        return IngestFailure(Cause.TOO_SHORT, f"the source video {detail}")

    def _clip(self, video: bytes) -> Clip:
        found = measure(
            self.sound, sound_rate(self.profile), self.writer.changes, self.writer.lumas, self.profile.fps, self.checks
        )
        check_worth(found, self.checks)
        audio = encode_audio(self.sound, self.profile)
        keyframes = check_video(video, self.n_frames, self.profile.fps)
        check_audio(audio, len(self.sound))
        width, height = self.writer.size
        request, profile = self.request, self.profile
        facts = Facts(
            source=request.source,
            start_s=float(self.start_s),
            end_s=float(self.end_s),
            duration_s=self.n_frames / profile.fps,
            n_frames=self.n_frames,
            fps=float(profile.fps),
            width=width,
            height=height,
            keyframes=keyframes,
            labels=request.labels,
            split=request.split,
            captions=self._captions(),
            **asdict(found),
        )
        return Clip(request.key, facts, {profile.video_member: video, profile.audio_member: audio})

    def _captions(self) -> tuple[tuple[float, float, str], ...]:
        """What is said within the clip, in seconds from its start."""
        length_s = self.n_frames / self.profile.fps

        def inside(at_s: float) -> float:
            return round(min(max(at_s - float(self.start_s), 0.0), length_s), 3)

        said = ((inside(begin_s), inside(end_s), text) for begin_s, end_s, text in self.request.captions)
        return tuple((begin_s, end_s, text) for begin_s, end_s, text in said if begin_s < end_s)
