"""Fetching with the real yt-dlp from a server on 127.0.0.1: what arrives, and the cause when nothing does."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hostile import served
from test_ingest_media import clapper, clicks, ffmpeg, flashes
from yt_dlp.utils import DownloadError, ExtractorError, GeoRestrictedError, UnsupportedError

from cmacc.ingest import Cause, ClipRequest, FetchOptions, IngestFailure, Media, fetched, transcode
from cmacc.ingest.causes import failure_from
from cmacc.ingest.guard import _is_public, refuse_private
from cmacc.ingest.ranges import RangedFile
from cmacc.shards.clip import Clip
from cmacc.shards.profile import profile

BODY = bytes(range(256)) * 4000
QUICK = FetchOptions(retries=1, socket_timeout_s=2, allow_private=True)
SMALL = profile("h264", short_side=64, gop=10)


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


def whole(address: str, folder: Path, options: FetchOptions = QUICK) -> Path:
    with fetched(address, [(0.0, None)], folder, options) as media:
        assert media.sound is None
        assert isinstance(media.picture, Path)
        return media.picture


def cause(address: str, folder: Path, options: FetchOptions = QUICK) -> Cause:
    with pytest.raises(IngestFailure) as caught:
        whole(address, folder, options)
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
    path = whole(site + address, tmp_path)
    assert path.parent == tmp_path
    assert path.read_bytes() == BODY


def test_one_extraction_and_nothing_outside_the_folder(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    whole(site + "/a.mp4", tmp_path / "there", FetchOptions(allow_private=True))
    assert len(Site.asked) == 2, "one look and one download"
    assert list((tmp_path / "here").iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_local_file_is_used_in_place(tmp_path: Path) -> None:
    path = tmp_path / "a b.mp4"
    path.write_bytes(b"x")
    assert whole(str(path), tmp_path / "elsewhere", FetchOptions()) == path
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
    options = FetchOptions(max_bytes=len(BODY) - 1, allow_private=True)
    assert cause(site + "/a.mp4", tmp_path, options) is Cause.TOO_LARGE
    with served({"a.mp4": b"?"}, "endless") as endless:
        assert cause(endless.address + "/a.mp4", tmp_path, options) is Cause.TOO_LARGE
        assert endless.sent < len(BODY) + (16 << 20), "what the sockets hold is all that comes after it"
    (tmp_path / "new").mkdir()
    exact = FetchOptions(max_bytes=len(BODY), allow_private=True)
    with fetched(site + "/a.mp4", [(0.0, None)], tmp_path / "new", exact) as media:
        assert media.bytes == len(BODY)


HOSTILE = {
    "429": Cause.RATE_LIMITED,
    "403": Cause.FORBIDDEN,
    "404": Cause.GONE,
    "416": Cause.NETWORK,
    "500": Cause.NETWORK,
    "cut": Cause.NETWORK,
    "silent": Cause.NETWORK,
    "too-long": Cause.NETWORK,
    "empty": Cause.NETWORK,
    "loop": Cause.EXTRACTOR,
}


@pytest.mark.parametrize("behaviour", HOSTILE)
def test_a_hostile_server_has_its_cause(tmp_path: Path, behaviour: str) -> None:
    quick = FetchOptions(retries=1, socket_timeout_s=1, allow_private=True)
    with served({"a.mp4": BODY}, behaviour, polite=1) as site:
        assert cause(site.address + "/a.mp4", tmp_path, quick) is HOSTILE[behaviour]
        tried_again = {"500", "cut", "silent", "too-long"}
        if behaviour in tried_again:
            assert len(site.asked) == 3, "the look, the download, and once more"


def test_a_length_that_is_too_short_shows_when_it_is_cut(tmp_path: Path) -> None:
    with served({"a.mp4": clapper(tmp_path / "good.mp4").read_bytes()}, "too-short") as site:
        ((_, outcome),) = transcode(whole(site.address + "/a.mp4", tmp_path), [_request(0.0, 2.0)], SMALL)
    assert isinstance(outcome, IngestFailure)
    assert outcome.cause is Cause.UNDECODABLE


def test_a_connection_that_breaks_off_once_is_taken_up(tmp_path: Path) -> None:
    with served({"a.mp4": BODY}, "once-cut", polite=1) as site:
        assert whole(site.address + "/a.mp4", tmp_path).read_bytes() == BODY
        assert int(site.asked[2].range.removeprefix("bytes=").split("-")[0]) > len(BODY) // 4


def test_a_page_in_place_of_the_video_is_none(tmp_path: Path) -> None:
    with served({"a.mp4": BODY}, "html") as site:
        assert cause(site.address + "/a.mp4", tmp_path) is Cause.NO_FORMAT
    with served({"a.mp4": BODY}, "html", polite=1) as site:
        ((_, outcome),) = transcode(whole(site.address + "/a.mp4", tmp_path), [_request(0.0, 2.0)], SMALL)
        assert isinstance(outcome, IngestFailure)
        assert outcome.cause is Cause.UNDECODABLE


def test_a_drip_is_no_silence_so_the_wall_clock_has_to_end_it(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from cmacc.ingest import FetchOptions, fetched
options = FetchOptions(retries=0, socket_timeout_s=1, allow_private=True)
with fetched(sys.argv[1], [(0.0, None)], Path({str(tmp_path)!r}), options):
    print("here")
"""
    with served({"a.mp4": BODY}, "drip", polite=1) as site:
        with pytest.raises(subprocess.TimeoutExpired) as caught:
            subprocess.run([sys.executable, "-c", code, site.address + "/a.mp4"], capture_output=True, timeout=6)
        assert not caught.value.stdout
        assert len(site.asked) == 2


MPD = """<?xml version="1.0"?>
<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT{seconds}S" profiles="x">
<Period>
<AdaptationSet contentType="video" mimeType="video/{kind}"><Representation id="v" codecs="{video}" bandwidth="500000" width="96"
 height="64"><BaseURL>{picture}</BaseURL><SegmentBase indexRange="0-1"/></Representation></AdaptationSet>
<AdaptationSet contentType="audio" mimeType="audio/{kind}"><Representation id="a" codecs="{audio}" bandwidth="90000"
 audioSamplingRate="48000"><BaseURL>{sound}</BaseURL><SegmentBase indexRange="0-1"/></Representation></AdaptationSet>
</Period></MPD>"""


def _request(start_s: float, end_s: float | None) -> ClipRequest:
    return ClipRequest(1, "list.csv", "url_0123456789abcdef", "a.mp4", start_s, end_s)


def _apart(folder: Path, kind: str) -> tuple[Path, Path, Path]:
    """(picture, sound, both as yt-dlp would merge them) of a clapper in the ways that files come apart."""
    suffix = "webm" if kind == "webm" else "mp4"
    path = clapper(folder / f"a.{suffix}", seconds=24, claps=(1.0, 2.52, 20.2), gop=50)
    picture, sound, merged = folder / f"v.{suffix}", folder / f"s.{suffix}", folder / f"both.{suffix}"
    coding: list[object] = ["-c", "copy"]
    if kind == "b-frames":  # without an edit list the first picture stands two frames after zero
        coding = ["-c:v", "libx264", "-bf", 2, "-use_editlist", 0]
    late = ["-output_ts_offset", 5] if kind == "late" else []
    parts = ["-movflags", "dash+global_sidx+empty_moov+frag_keyframe+default_base_moof"] if kind == "parts" else []
    ffmpeg("-i", path, "-an", *coding, *parts, *late, picture)
    ffmpeg("-i", path, "-vn", "-c", "copy", *parts, sound)
    ffmpeg("-i", picture, "-i", sound, "-c", "copy", "-map", "0:v", "-map", "1:a", merged)
    return picture, sound, merged


@pytest.mark.parametrize("kind", ["mp4", "webm", "b-frames", "late", "parts"])
def test_two_files_are_cut_as_one_that_was_merged(tmp_path: Path, kind: str) -> None:
    picture, sound, merged = _apart(tmp_path, kind)
    requests = [_request(0.5, 3.5), _request(18.0, 22.0), _request(0.0, None)]
    apart = {r.key: made for r, made in transcode(Media(picture, sound), requests, SMALL)}
    for request, one in transcode(merged, requests, SMALL):
        two = apart[request.key]
        assert isinstance(one, Clip) and isinstance(two, Clip), (one, two)
        seen, heard = flashes(two.members["mp4"]), clicks(two.members["flac"])
        assert len(seen) == len(heard) == {0.5: 2, 18.0: 1, 0.0: 3}[request.start_s]
        assert np.allclose(seen, flashes(one.members["mp4"]), atol=0.041)
        assert np.allclose(heard, clicks(one.members["flac"]), atol=0.01)
        # within a frame of each other, but for the delay of the sound's encoder, which a file in parts does not note
        assert np.allclose(seen, heard, atol=0.041 + 0.022 * (kind == "parts"))
        assert abs(one.facts.n_frames - two.facts.n_frames) <= 1


@pytest.mark.parametrize("ranges", [False, True])
@pytest.mark.parametrize("kind", ["parts", "webm"])
def test_picture_and_sound_come_apart_and_are_not_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranges: bool, kind: str
) -> None:
    picture, sound, _ = _apart(tmp_path, kind)
    for name, value in (("fetch._SMALL", 0), ("fetch._OVERHEAD", 0), ("ranges.BLOCK", 4096)):
        monkeypatch.setattr(f"cmacc.ingest.{name}", value)
    codecs = {"parts": ("mp4", "avc1.64000a", "mp4a.40.2"), "webm": ("webm", "vp8", "opus")}[kind]
    words = dict(zip(("kind", "video", "audio"), codecs, strict=True))
    page = MPD.format(seconds=24, picture=picture.name, sound=sound.name, **words).encode()
    (tmp_path / "scratch").mkdir()
    options = FetchOptions(retries=1, socket_timeout_s=2, allow_private=True, ranges=ranges)
    with served({"a.mpd": page, picture.name: picture.read_bytes(), sound.name: sound.read_bytes()}) as site:
        with fetched(site.address + "/a.mpd", [(0.5, 3.5)], tmp_path / "scratch", options) as media:
            assert isinstance(media.picture, RangedFile if ranges else Path)
            assert media.sound is not None
            ((_, two),) = transcode(media, [_request(0.5, 3.5)], SMALL)
        size = picture.stat().st_size + sound.stat().st_size
        assert media.bytes < size if ranges else media.bytes == size
        assert {a.path.partition("?")[0] for a in site.asked} == {"/a.mpd", f"/{picture.name}", f"/{sound.name}"}
    assert isinstance(two, Clip), two
    ((_, local),) = transcode(Media(picture, sound), [_request(0.5, 3.5)], SMALL)
    assert isinstance(local, Clip)
    assert two.members == local.members


GUARDED = """
import socket, sys
from pathlib import Path
from cmacc.ingest import FetchOptions, IngestFailure, fetched
from cmacc.ingest.guard import guard_sockets
guard_sockets(sys.argv[3:])
resolve = socket.getaddrinfo
socket.getaddrinfo = lambda host, *more, **named: resolve("127.0.0.1" if host == "video.example" else host, *more, **named)
def say(act):
    try:
        print(act())
    except IngestFailure as failure:
        print(failure.cause, "--allow-private" in failure.detail)
def fetch(url):
    options = FetchOptions(retries=0, socket_timeout_s=5, allow_private="127.0.0.1" in url)
    with fetched(url, [(0.0, None)], Path(sys.argv[2]), options) as media:
        return f"fetched {media.bytes}"
def connect(host, port):
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as line:
        line.connect((host, int(port)))
    return "connected"
for what in sys.argv[1].split():
    say(lambda: fetch(what) if what.startswith("http") else connect(*what.split("|")))
"""


def guarded(what: list[str], folder: Path, *allowed: str) -> list[str]:
    """What a guarded process of its own says about each address, or a socket's `host|port`."""
    command = [sys.executable, "-c", GUARDED, " ".join(what), str(folder), *allowed]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.splitlines()


def test_a_guarded_process_connects_to_nothing_private(tmp_path: Path) -> None:
    with served({"a.mp4": BODY}) as site, served({"a.mp4": BODY}, f"away:{site.address}/a.mp4") as other:
        port = site.address.rpartition(":")[2]
        mapped = ("::ffff:127.0.0.1", "64:ff9b::a00:1")
        hosts = ("127.0.0.1", "localhost", "::1", "169.254.169.254", "10.0.0.1", "fe80::1", *mapped)
        # the last goes through yt-dlp, which wraps what it is told: a name that leads inwards
        asked = [*(f"{host}|{port}" for host in hosts), f"http://video.example:{port}/a.mp4"]
        assert guarded(asked, tmp_path) == ["forbidden True"] * len(asked)
        # an address that may be connected to, and sends on to one that may not
        assert guarded([f"{other.address}/a.mp4"], tmp_path, other.address) == ["forbidden True"]
        assert (len(other.asked), len(site.asked)) == (1, 0)
        asked = [f"127.0.0.1|{port}", f"{site.address}/a.mp4"]
        assert guarded(asked, tmp_path, site.address) == ["connected", f"fetched {len(BODY)}"]


def test_an_address_that_is_private_is_refused_before_anything_is_asked(site: str, tmp_path: Path) -> None:
    assert cause(site + "/a.mp4", tmp_path, FetchOptions()) is Cause.FORBIDDEN
    assert Site.asked == []
    for host in ("localhost", "127.0.0.1:80", "[::1]", "[::ffff:10.0.0.1]", "192.168.1.1", "0.0.0.0", "u:p@169.254.169.254:80"):
        with pytest.raises(IngestFailure, match="--allow-private"):
            refuse_private(f"http://{host}/a.mp4")
    with pytest.raises(IngestFailure) as caught:
        refuse_private("http://[bad/a.mp4")
    assert caught.value.cause is Cause.BAD_ROW
    refuse_private("https://www.youtube.com/watch?v=x")
    refuse_private("https://8.8.8.8/a.mp4")


def test_which_addresses_are_public() -> None:
    public = ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
    assert all(map(_is_public, public))
    private = [
        "100.64.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "fc00::1",
        "fe80::1%eth0",
        "2002:7f00:1::",
        "ff02::1",
        "::",
        "a.example",
    ]
    assert not any(map(_is_public, private))


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
