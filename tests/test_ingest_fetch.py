"""Fetching with the real yt-dlp from a server on 127.0.0.1: what arrives, and the cause when nothing does."""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from yt_dlp.utils import DownloadError, ExtractorError, GeoRestrictedError, UnsupportedError

from cmacc.ingest import Cause, FetchOptions, IngestFailure, fetch
from cmacc.ingest.causes import failure_from

BODY = bytes(range(256)) * 4000
QUICK = FetchOptions(retries=1, socket_timeout_s=2)


class Site(BaseHTTPRequestHandler):
    """/status/N: that status. /cut/…: half the body, then the end. Anything else: BODY as the type that ?type= says."""

    protocol_version = "HTTP/1.1"
    asked: list[str] = []  # noqa: RUF012 (shared on purpose: one server at a time)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if found := re.match(r"/status/(\d+)/", self.path):
            self.answer(int(found[1]), b"")
        elif self.path.startswith("/page"):
            videos = "".join(f'<video src="/{n}.mp4"></video>' for n in range(2))
            self.answer(200, f"<html><body>{videos}</body></html>".encode(), {"Content-Type": "text/html"})
        elif self.path.startswith("/plain"):
            self.answer(200, b"<html><body>nothing to see</body></html>", {"Content-Type": "text/html"})
        elif self.path.startswith("/cut/"):
            self.answer(200, BODY[: len(BODY) // 2], {"Content-Length": str(len(BODY))})
            self.close_connection = True
        else:
            self.send_body()

    do_HEAD = do_GET

    def send_body(self) -> None:
        kind = re.search(r"type=([^&]+)", self.path)
        headers = {"Content-Type": kind[1]} if kind else {}
        first, last = 0, len(BODY) - 1
        if found := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(found[1]), min(int(found[2] or last), last)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(BODY)}"
        self.answer(206 if found else 200, BODY[first : last + 1], headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up early is no news."""


@pytest.fixture
def site() -> Iterator[str]:
    Site.asked.clear()
    with Server(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def cause(address: str, folder: Path, options: FetchOptions = QUICK) -> Cause:
    with pytest.raises(IngestFailure) as caught:
        fetch(address, folder, options)
    assert caught.value.detail
    return caught.value.cause


@pytest.mark.parametrize(
    "address",
    [
        *("/a.mp4", "/a.avi", "/a.ts", "/a.mpg", "/a.rm", "/a.3gp", "/a.MOV", "/a.webm", "/a.ivf", "/a", "/a.mp4?key=1"),
        *(
            f"/a.ts?type={kind}"
            for kind in ("text/plain", "text/html", "application/octet-stream", "text/vnd.trolltech.linguist")
        ),
    ],
)
def test_a_direct_link_arrives_whole(site: str, tmp_path: Path, address: str) -> None:
    path = fetch(site + address, tmp_path, QUICK)
    assert path.parent == tmp_path
    assert path.read_bytes() == BODY


def test_one_extraction_and_nothing_outside_the_folder(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    fetch(site + "/a.mp4", tmp_path / "there", FetchOptions())
    assert len(Site.asked) == 2, "one look and one download"
    assert list((tmp_path / "here").iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_local_file_is_used_in_place(tmp_path: Path) -> None:
    path = tmp_path / "a b.mp4"
    path.write_bytes(b"x")
    assert fetch(str(path), tmp_path / "elsewhere") == path
    assert cause(str(tmp_path / "missing.mp4"), tmp_path) is Cause.GONE
    assert cause(str(tmp_path), tmp_path) is Cause.GONE
    assert cause(path.as_uri(), tmp_path) is Cause.BAD_ROW
    assert cause("ftp://host/a.mp4", tmp_path) is Cause.BAD_ROW


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (404, Cause.GONE),
        (410, Cause.GONE),
        (401, Cause.FORBIDDEN),
        (403, Cause.FORBIDDEN),
        (429, Cause.RATE_LIMITED),
        (451, Cause.GEO_BLOCKED),
        (500, Cause.NETWORK),
        (503, Cause.NETWORK),
    ],
)
def test_a_status_has_its_cause(site: str, tmp_path: Path, status: int, expected: Cause) -> None:
    assert cause(f"{site}/status/{status}/a.mp4", tmp_path) is expected


def test_a_network_that_fails(site: str, tmp_path: Path) -> None:
    assert cause("http://127.0.0.1:9/a.mp4", tmp_path) is Cause.NETWORK
    assert cause("http://no-such-host.invalid/a.mp4", tmp_path) is Cause.NETWORK
    assert cause(site + "/cut/a.mp4", tmp_path) is Cause.NETWORK


def test_a_page_is_no_video(site: str, tmp_path: Path) -> None:
    assert cause(site + "/page", tmp_path) is Cause.NO_FORMAT
    assert cause(site + "/plain", tmp_path) is Cause.NO_FORMAT
    assert not any(path.endswith(".mp4") for path in Site.asked)


def test_a_source_that_is_too_large(site: str, tmp_path: Path) -> None:
    assert cause(site + "/a.mp4", tmp_path, FetchOptions(max_bytes=1000)) is Cause.NO_FORMAT


def test_options_say_what_to_change(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give 0 or more"):
        FetchOptions(rate_limit=-1)
    with pytest.raises(ValueError, match="give more than 0"):
        FetchOptions(socket_timeout_s=0)
    with pytest.raises(ValueError, match="Netscape"):
        FetchOptions(cookies=str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Private video. Sign in if you've been granted access to this video", Cause.PRIVATE),
        ("Video unavailable. This video is private", Cause.PRIVATE),
        ("Join this channel to get access to members-only content like this video", Cause.PRIVATE),
        ("Sign in to confirm your age. This video may be inappropriate for some users.", Cause.AGE_GATED),
        ("Sign in to confirm you’re not a bot. Use --cookies-from-browser or --cookies", Cause.BOT_CHECK),
        ("Video unavailable. The uploader has not made this video available in your country", Cause.GEO_BLOCKED),
        ("Video unavailable. This video has been removed by the uploader", Cause.GONE),
        ("Video unavailable. This video is no longer available because the YouTube account has been terminated.", Cause.GONE),
        ("Video unavailable", Cause.GONE),
        ("This live event will begin in 3 hours.", Cause.LIVE),
        ("Premieres in 2 days", Cause.LIVE),
        (
            "This content isn't available, try again later. The current session has been rate-limited by YouTube",
            Cause.RATE_LIMITED,
        ),
        ("Requested format is not available. Use --list-formats for a list", Cause.NO_FORMAT),
        ("unable to download video data: HTTP Error 403: Forbidden", Cause.FORBIDDEN),
        ("unable to write data: [Errno 28] No space left on device", Cause.DISK_FULL),
        ("Unable to extract yt initial data", Cause.EXTRACTOR),
    ],
)
def test_what_a_site_says_has_its_cause(message: str, expected: Cause) -> None:
    error = DownloadError("\x1b[0;31mERROR:\x1b[0m [youtube] dQw4w9WgXcQ: " + message)
    assert failure_from(error).cause is expected


def test_the_true_error_is_found_inside() -> None:
    def wrapped(inner: Exception) -> DownloadError:
        return DownloadError(f"ERROR: {inner}", (type(inner), inner, None))

    assert failure_from(wrapped(OSError(errno.ENOSPC, "full"))).cause is Cause.DISK_FULL
    assert failure_from(wrapped(ExtractorError("x", cause=OSError(errno.EDQUOT, "quota")))).cause is Cause.DISK_FULL
    assert failure_from(wrapped(GeoRestrictedError("not here"))).cause is Cause.GEO_BLOCKED
    assert failure_from(wrapped(UnsupportedError("http://host"))).cause is Cause.NO_FORMAT
    assert failure_from(wrapped(ConnectionResetError(104, "Connection reset by peer"))).cause is Cause.NETWORK
    assert failure_from(KeyError("videoDetails")).cause is Cause.EXTRACTOR


def test_each_cause_knows_whether_to_try_again() -> None:
    assert {c for c in Cause if c.stops} == {Cause.DISK_FULL}
    assert {c for c in Cause if c.parks} == {Cause.BOT_CHECK, Cause.RATE_LIMITED}
    assert {c for c in Cause if c.retry.times} - {c for c in Cause if c.stops or c.parks} == {
        Cause.LIVE,
        Cause.FORBIDDEN,
        Cause.NETWORK,
        Cause.EXTRACTOR,
        Cause.TIMEOUT,
        Cause.CRASH,
    }
    assert all(c.retry.after_s >= 3600 for c in Cause if c.parks)
