"""Fetch one source video: a local file is used in place, anything else goes through yt-dlp, once."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmacc.ingest.causes import Cause, IngestFailure, failure_from

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FetchOptions:
    """How source videos are downloaded.

    short_side: pixels; the best format up to here is taken, H.264 with AAC in MP4 first. cookies: a Netscape cookie file.
    proxy: its URL. rate_limit: bytes per second, 0 without limit. pause_s: wait before each download, for a site's sake.
    socket_timeout_s: without a byte. retries: of one request. max_bytes: a larger source video is refused, 0 for any size.
    """

    short_side: int = 480
    cookies: str = ""
    proxy: str = ""
    rate_limit: int = 0
    pause_s: float = 0.0
    socket_timeout_s: float = 20.0
    retries: int = 2
    max_bytes: int = 0

    def __post_init__(self) -> None:
        for field in ("rate_limit", "pause_s", "retries", "max_bytes"):
            if getattr(self, field) < 0:
                raise ValueError(f"fetch option {field} is {getattr(self, field)}; give 0 or more")
        for field in ("short_side", "socket_timeout_s"):
            if getattr(self, field) <= 0:
                raise ValueError(f"fetch option {field} is {getattr(self, field)}; give more than 0")
        if self.cookies and not Path(self.cookies).is_file():
            raise ValueError(f"cookie file {self.cookies} is missing; export one in Netscape format, or leave cookies empty")


def fetch(address: str, dest_dir: Path, options: FetchOptions | None = None) -> Path:
    """The source video as a local file: `address` itself if it is a path, else downloaded into `dest_dir`.

    Whoever made `dest_dir` removes it. Raises IngestFailure.
    """
    if "://" not in address:
        return _in_place(Path(address))
    if not re.match(r"https?://", address):
        raise IngestFailure(Cause.BAD_ROW, f"address {address[:80]} is not http or https; give local files as plain paths")
    return _download(address, dest_dir, options or FetchOptions())


def _in_place(path: Path) -> Path:
    try:
        if path.is_file():
            with path.open("rb"):
                return path
    except OSError as error:
        raise IngestFailure(Cause.FORBIDDEN, f"{path.name} cannot be read: {error.strerror}") from error
    raise IngestFailure(Cause.GONE, f"no file {path}")


def _download(address: str, dest_dir: Path, options: FetchOptions) -> Path:
    import yt_dlp  # half a second that a run over local files does not pay

    try:
        with yt_dlp.YoutubeDL(_parameters(dest_dir, options)) as downloader:
            info = downloader.extract_info(address, download=False)
            _check(address, info)
            downloader.process_ie_result(info, download=True)
    except IngestFailure:
        raise
    except Exception as error:
        raise failure_from(error) from error
    files = [f for f in dest_dir.iterdir() if f.stem == "source" and f.suffix not in (".part", ".ytdl") and f.stat().st_size]
    if not files:
        if options.max_bytes:
            raise IngestFailure(Cause.NO_FORMAT, f"{address} is larger than max_bytes ({options.max_bytes})")
        raise IngestFailure(Cause.NETWORK, f"nothing was downloaded from {address}")
    return max(files, key=lambda f: f.stat().st_size)


def _check(address: str, info: dict[str, Any] | None) -> None:
    if info is None:
        raise IngestFailure(Cause.NO_FORMAT, f"nothing to download at {address}")
    if info.get("_type") in ("playlist", "multi_video"):
        raise IngestFailure(Cause.NO_FORMAT, f"{address} is a page or a playlist of several videos; give the address of one")
    if info.get("live_status") in ("is_live", "is_upcoming") or info.get("is_live"):
        raise IngestFailure(Cause.LIVE, f"{address} is a live stream that has not ended")


def _parameters(dest_dir: Path, options: FetchOptions) -> dict[str, Any]:
    import imageio_ffmpeg

    side = f"[height<={options.short_side}]"
    parameters: dict[str, Any] = {
        "outtmpl": {"default": "source.%(ext)s"},
        "paths": {"home": str(dest_dir), "temp": str(dest_dir)},
        "cachedir": str(dest_dir / "cache"),
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
        "http_chunk_size": 10 << 20,
        "sleep_interval": options.pause_s,
    }
    optional = {
        "cookiefile": options.cookies,
        "proxy": options.proxy,
        "ratelimit": options.rate_limit,
        "max_filesize": options.max_bytes,
    }
    return parameters | {name: value for name, value in optional.items() if value}


class _Quiet:
    """yt-dlp's logger: its messages are debug notes to us, for errors are raised as well."""

    def debug(self, message: str) -> None:
        log.debug("%s", message)

    info = warning = error = debug
