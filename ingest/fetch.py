"""Fetch one source video: a local file is used in place, anything else goes through yt-dlp, as much of it as is wanted."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cmacc.ingest.addresses import youtube_id
from cmacc.ingest.causes import Cause, IngestFailure, failure_from
from cmacc.ingest.guard import refuse_private
from cmacc.ingest.ranges import Meter, RangedFile, RangesRefused
from cmacc.ingest.source import File, Media, declared_s
from cmacc.ingest.tables import MEDIA

if TYPE_CHECKING:
    from yt_dlp import YoutubeDL

log = logging.getLogger(__name__)

Span = tuple[float, float | None]  # (start, end) in seconds, None for the end of the source video
# containers that name where each instant lies, so that a part can be read without the rest
_SEEKABLE = {"mp4", "m4v", "m4a", "mov", "webm", "mkv"}
_LEAD_S, _TAIL_S = 12.0, 3.0  # read around a clip: from the keyframe before it on, and what is read ahead
_OVERHEAD = 1 << 20  # bytes: indexes, and blocks that are wanted in part
_MOST_OF_IT = 0.75  # from here on the whole file, in a few large requests
_SMALL = 4 << 20  # bytes; not worth many requests


@dataclass(frozen=True)
class FetchOptions:
    """How source videos are downloaded.

    short_side: pixels; the best format up to here is taken, H.264 with AAC in MP4 first. cookies: a Netscape cookie file.
    proxy: its URL. rate_limit: bytes per second, 0 without limit. socket_timeout_s: without a byte.
    retries: of one request. max_bytes: to download of one source video, 0 for any number. ranges: of a long source video fetch
    only what its clips need, where that is less. allow_private: connect to this machine and to private networks too.
    """

    short_side: int = 480
    cookies: str = ""
    proxy: str = ""
    rate_limit: int = 0
    socket_timeout_s: float = 20.0
    retries: int = 2
    max_bytes: int = 0
    ranges: bool = True
    allow_private: bool = False

    def __post_init__(self) -> None:
        for field in ("rate_limit", "retries", "max_bytes"):
            if getattr(self, field) < 0:
                raise ValueError(f"fetch option {field} is {getattr(self, field)}; give 0 or more")
        for field in ("short_side", "socket_timeout_s"):
            if getattr(self, field) <= 0:
                raise ValueError(f"fetch option {field} is {getattr(self, field)}; give more than 0")
        if self.cookies and not Path(self.cookies).is_file():
            raise ValueError(f"cookie file {self.cookies} is missing; export one in Netscape format, or leave cookies empty")


@contextmanager
def fetched(address: str, spans: Sequence[Span], scratch: Path, options: FetchOptions | None = None) -> Iterator[Media]:
    """The source video, to be read as long as the context lasts: a path is used in place, else it comes into `scratch`.

    spans: what is wanted of it; what lies between them may never be downloaded, but whatever is read is there.
    Whoever made `scratch` removes it. Raises IngestFailure, and so may reading.
    """
    options = options or FetchOptions()
    if "://" not in address:
        yield Media(_in_place(Path(address)))
        return
    if not re.match(r"https?://", address):
        raise IngestFailure(Cause.BAD_ROW, f"address {address[:80]} is not http or https; give local files as plain paths")
    if not options.allow_private:
        refuse_private(address)
    with ExitStack() as stack:
        try:
            download = _Download(address, spans, scratch, options, stack)
            picture, *sound = download.files()
        except IngestFailure:
            raise
        except Exception as error:
            raise failure_from(error) from error
        yield Media(picture, sound[0] if sound else None, download.meter)


def _in_place(path: Path) -> Path:
    try:
        if path.is_file():
            with path.open("rb"):
                return path
    except OSError as error:
        raise IngestFailure(Cause.FORBIDDEN, f"{path.name} cannot be read: {error.strerror}") from error
    raise IngestFailure(Cause.GONE, f"no file {path}")


class _Download:
    """One source video on its way, by ranges where that is less, else whole."""

    def __init__(self, address: str, spans: Sequence[Span], scratch: Path, options: FetchOptions, stack: ExitStack) -> None:
        import yt_dlp  # half a second that a run over local files does not pay

        self.address, self.spans, self.scratch, self.options, self.stack = address, spans, scratch, options, stack
        self.meter = Meter(options.rate_limit, options.max_bytes)
        parameters = _parameters(scratch, options) | {"progress_hooks": [_counts_in(self.meter)]}
        self.extractor = _extractor(address)
        # of plain media the one extractor is enough: setting up all of them takes as long as a small download
        self.ydl: YoutubeDL = stack.enter_context(yt_dlp.YoutubeDL(parameters, auto_init=self.extractor != "Generic"))
        if self.extractor == "Generic":
            self.ydl.add_info_extractor(yt_dlp.extractor.get_info_extractor("Generic")())

    def files(self) -> list[File]:
        """The file that holds everything, or one of the picture and one of the sound."""
        info = self.ydl.extract_info(self.address, download=False, ie_key=self.extractor)
        _check(self.address, info)
        formats = info.get("requested_formats") or [info]
        if not all(map(_is_direct, formats)):
            return [self._as_yt_dlp_does(info)]
        return [self._file(name, {**info, **each}) for name, each in zip(("picture", "sound"), formats, strict=False)]

    def _file(self, name: str, info: dict[str, Any]) -> File:
        extension = re.sub(r"\W", "", str(info.get("ext"))).lower()[:16]
        path = self.scratch / f"{name}.{extension}"
        if self.options.ranges and extension in _SEEKABLE and self.spans and all(end is not None for _, end in self.spans):
            try:
                return self._part(path, info)
            except RangesRefused as refused:
                log.debug("%s whole: %s", self.address, refused)
        return self._whole(path, info)

    def _part(self, path: Path, info: dict[str, Any]) -> File:
        """The file by ranges, if they are less than the whole of it; else filled. Raises RangesRefused."""
        # YouTube gives an address some seconds before it answers there; for a download yt-dlp waits by itself
        time.sleep(max((info.get("available_at") or 0) - time.time(), 0))
        headers = info.get("http_headers") or {}
        file = RangedFile(self.ydl, info["url"], headers, path, self.meter, self.options.retries)
        self.stack.callback(file.close)
        if file.size > _SMALL and (seconds := info.get("duration") or _seconds(file)):
            wanted = _wanted_s(self.spans, seconds) / seconds * file.size + _OVERHEAD * len(self.spans)
            if wanted < _MOST_OF_IT * file.size:
                return file
        self.meter.allow(file.size)
        file.fill()
        return path

    def _whole(self, path: Path, info: dict[str, Any]) -> Path:
        info.pop("requested_formats", None)
        try:
            done, _ = self.ydl.dl(str(path), info)
        except Exception as error:
            if getattr(error, "status", None) == 416:  # asked for what the server itself had said was there
                raise IngestFailure(Cause.NETWORK, f"the server contradicts itself: {error}") from error
            raise
        if not done or not path.is_file() or not path.stat().st_size:
            raise IngestFailure(Cause.NETWORK, f"nothing was downloaded from {self.address}")
        return path

    def _as_yt_dlp_does(self, info: dict[str, Any]) -> Path:
        """Playlists of segments and rarer protocols: downloaded, and merged by FFmpeg if need be."""
        self.ydl.process_ie_result(info, download=True)
        left = (".part", ".ytdl")
        files = [f for f in self.scratch.iterdir() if f.stem == "source" and f.suffix not in left and f.stat().st_size]
        if not files:
            raise IngestFailure(Cause.NETWORK, f"nothing was downloaded from {self.address}")
        return max(files, key=lambda f: f.stat().st_size)


def _extractor(address: str) -> str | None:
    """yt-dlp's name for who knows this address, where that is clear: it would try the patterns of 1,800 sites else."""
    if youtube_id(address):
        return "Youtube"
    return "Generic" if urlsplit(address).path.rpartition(".")[2].lower() in MEDIA else None


def _is_direct(info: dict[str, Any]) -> bool:
    return info.get("protocol") in ("http", "https") and not info.get("fragments") and not info.get("request_data")


def _seconds(file: RangedFile) -> float | None:
    try:
        return declared_s(file)
    except IngestFailure as failure:
        if file.failure is not None:
            raise
        log.debug("%s", failure)  # it is for the cutting to say what is wrong with the file
        return None


def _wanted_s(spans: Sequence[Span], seconds: float) -> float:
    """Seconds of a source video of so many that these spans and what is read around them cover together."""
    covered, reached = 0.0, 0.0
    for start, end in sorted((start - _LEAD_S, (seconds if end is None else end) + _TAIL_S) for start, end in spans):
        begin, stop = max(start, reached), min(end, seconds)
        covered += max(stop - begin, 0.0)
        reached = max(reached, stop)
    return covered


def _counts_in(meter: Meter) -> Callable[[dict[str, Any]], None]:
    """A progress hook of yt-dlp that counts in the meter, and ends a download that would cost too much."""
    seen: dict[str, int] = {}

    def hook(progress: dict[str, Any]) -> None:
        name, here = progress.get("filename", ""), progress.get("downloaded_bytes") or 0
        before, seen[name] = seen.get(name, 0), max(here, seen.get(name, 0))
        meter.count(seen[name] - before)
        meter.allow(meter.bytes - seen[name] + (progress.get("total_bytes") or 0))

    return hook


def _check(address: str, info: dict[str, Any] | None) -> None:
    if info is None:
        raise IngestFailure(Cause.NO_FORMAT, f"nothing to download at {address}")
    if info.get("_type") in ("playlist", "multi_video"):
        raise IngestFailure(Cause.NO_FORMAT, f"{address} is a page or a playlist of several videos; give the address of one")
    if info.get("live_status") in ("is_live", "is_upcoming") or info.get("is_live"):
        raise IngestFailure(Cause.LIVE, f"{address} is a live stream that has not ended")


def _parameters(scratch: Path, options: FetchOptions) -> dict[str, Any]:
    import imageio_ffmpeg

    side = f"[height<={options.short_side}]"
    parameters: dict[str, Any] = {
        "outtmpl": {"default": "source.%(ext)s"},
        "paths": {"home": str(scratch), "temp": str(scratch)},
        "cachedir": str(scratch / "cache"),
        "logger": _Quiet(),
        "quiet": True,
        "noprogress": True,
        "no_color": True,
        "noplaylist": True,
        # an entry of a playlist is never looked into: the playlist itself is refused
        "extract_flat": "in_playlist",
        "playlist_items": "1",
        "format": f"bv*{side}+ba/b{side}/wv*+ba/w/b",
        "format_sort": [f"res:{options.short_side}", "vcodec:h264", "acodec:aac", "ext:mp4:m4a"],
        "ffmpeg_location": imageio_ffmpeg.get_ffmpeg_exe(),
        "socket_timeout": options.socket_timeout_s,
        "retries": options.retries,
        "fragment_retries": options.retries,
        "extractor_retries": options.retries,
        "file_access_retries": 0,
        "retry_sleep_functions": {"http": lambda n: min(2**n, 8), "fragment": lambda n: min(2**n, 8)},
        "skip_unavailable_fragments": False,
        "continuedl": True,
        "updatetime": False,
        # no http_chunk_size: yt-dlp takes whatever part it gets for the beginning. YouTube's formats bring their own
    }
    optional = {
        "cookiefile": options.cookies,
        "proxy": options.proxy,
        "ratelimit": options.rate_limit,
    }
    return parameters | {name: value for name, value in optional.items() if value}


class _Quiet:
    """yt-dlp's logger: its messages are debug notes to us, for errors are raised as well."""

    def debug(self, message: str) -> None:
        log.debug("%s", message)

    info = warning = error = debug
