"""Reading a remote file by ranges: the same bytes, the same clips, few requests; never a byte from the wrong place."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import yt_dlp
from hostile import Site, served
from test_ingest_media import clapper, ffmpeg

from cmacc.ingest import Cause, ClipRequest, FetchOptions, IngestFailure, Media, fetch, fetched, ranges, transcode
from cmacc.ingest.ranges import Meter, RangedFile, RangesRefused
from cmacc.ingest.source import File, open_source
from cmacc.shards.clip import Clip
from cmacc.shards.profile import profile

SMALL = profile("h264", short_side=64, gop=10)
BLOCK = 4096
BODY = random.Random(0).randbytes(60 * BLOCK + 123)
QUICK = FetchOptions(retries=1, socket_timeout_s=1, allow_private=True)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, so that small files will do."""
    monkeypatch.setattr(ranges, "BLOCK", BLOCK)
    monkeypatch.setattr("cmacc.ingest.fetch._SMALL", 0)
    monkeypatch.setattr("cmacc.ingest.fetch._OVERHEAD", 0)


@pytest.fixture(scope="module")
def downloader() -> Iterator[yt_dlp.YoutubeDL]:
    with yt_dlp.YoutubeDL({"quiet": True, "socket_timeout": 1}) as downloader:
        yield downloader


def opened(site: Site, downloader: yt_dlp.YoutubeDL, folder: Path, retries: int = 1, meter: Meter | None = None) -> RangedFile:
    return RangedFile(downloader, f"{site.address}/a", {"X-Who": "me"}, folder / "a", meter or Meter(), retries)


def request(start_s: float, end_s: float | None) -> ClipRequest:
    return ClipRequest(1, "list.csv", "url_0123456789abcdef", "a.mp4", start_s, end_s)


def blocks(site: Site) -> list[tuple[int, int]]:
    """(first, count) of each range asked for, in blocks."""
    asked = [tuple(map(int, a.range.removeprefix("bytes=").split("-"))) for a in site.asked]
    assert all(first % BLOCK == 0 for first, _ in asked)
    return [(first // BLOCK, -(-(last + 1) // BLOCK) - first // BLOCK) for first, last in asked]


def test_it_reads_like_the_file_itself_and_fetches_nothing_twice(downloader: yt_dlp.YoutubeDL, tmp_path: Path) -> None:
    rng, meter = random.Random(1), Meter()
    with served({"a": BODY}) as site, opened(site, downloader, tmp_path, meter=meter) as file:
        assert (file.size, file.seekable(), file.readable(), file.writable()) == (len(BODY), True, True, False)
        for _ in range(40):
            at, count = rng.randrange(len(BODY) + 50), rng.choice([0, 1, 100, BLOCK, 3 * BLOCK + 5])
            assert file.seek(at) == at == file.tell()
            assert file.read(count) == BODY[at : at + count]
        assert file.seek(-5, 2) == len(BODY) - 5
        assert file.read(10) == BODY[-5:]
        assert file.read(10) == b""
        got = [n for first, count in blocks(site) for n in range(first, first + count)]
        assert len(got) == len(set(got))
        assert meter.bytes == site.sent <= len(BODY)
        file.fill()
        assert (tmp_path / "a").read_bytes() == BODY
        assert meter.bytes == site.sent == len(BODY)


def test_it_reads_ahead_the_more_the_longer_it_is_read_in_a_row(downloader: yt_dlp.YoutubeDL, tmp_path: Path) -> None:
    with served({"a": BODY}) as site, opened(site, downloader, tmp_path) as file:
        file.seek(20 * BLOCK)
        assert file.read(12 * BLOCK) == BODY[20 * BLOCK : 32 * BLOCK]
        file.seek(18 * BLOCK)
        assert file.read(12 * BLOCK) == BODY[18 * BLOCK : 30 * BLOCK]
    assert blocks(site) == [(0, 1), (20, 1), (21, 1), (22, 2), (24, 4), (28, 8), (18, 1), (19, 1)]
    with served({"a": BODY}) as site, opened(site, downloader, tmp_path) as file:
        file.fill()
        assert [count for _, count in blocks(site)] == [1, ranges._MOST, 20], "at most 10 MiB at once"


def test_cookies_and_headers_go_with_it(tmp_path: Path, downloader: yt_dlp.YoutubeDL, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    urlopen = downloader.urlopen
    monkeypatch.setattr(downloader, "urlopen", lambda request: (sent.append(dict(request.headers)), urlopen(request))[1])
    with served({"a": BODY}) as site, opened(site, downloader, tmp_path):
        assert sent == [{"X-Who": "me", "Accept-Encoding": "identity", "Range": f"bytes=0-{BLOCK - 1}"}]


@pytest.mark.parametrize(
    "behaviour", ["whole", "late", "short", "too-long", "too-short", "gzip", "html", "empty", "endless", "416"]
)
def test_what_cannot_be_trusted_from_the_start_is_refused(downloader: yt_dlp.YoutubeDL, tmp_path: Path, behaviour: str) -> None:
    with served({"a": BODY}, behaviour) as site, pytest.raises(RangesRefused):
        opened(site, downloader, tmp_path)
    assert not (tmp_path / "a").exists()
    assert len(site.asked) == 1, "no use to ask again"


@pytest.mark.parametrize(
    "behaviour",
    ["late", "short", "grown", "other", "too-long", "too-short", "gzip", "html", "empty", "endless", "416", "cut", "500"],
)
def test_a_file_that_changes_is_a_network_failure(downloader: yt_dlp.YoutubeDL, tmp_path: Path, behaviour: str) -> None:
    with served({"a": BODY}, behaviour, polite=2) as site, opened(site, downloader, tmp_path) as file:
        assert file.read(2 * BLOCK) == BODY[: 2 * BLOCK]
        with pytest.raises(IngestFailure) as caught:
            file.read(BLOCK)
        assert caught.value.cause is Cause.NETWORK
        asked = len(site.asked)
        assert asked == (4 if behaviour in ("cut", "500") else 3)
        file.seek(9 * BLOCK)
        with pytest.raises(IngestFailure, match=caught.value.cause):
            file.read(1)
        assert len(site.asked) == asked, "once it has failed nothing more is asked"


@pytest.mark.parametrize(("status", "expected"), [(429, Cause.RATE_LIMITED), (403, Cause.FORBIDDEN), (404, Cause.GONE)])
@pytest.mark.parametrize("polite", [0, 1])
def test_a_status_has_its_cause_and_is_not_tried_again(
    downloader: yt_dlp.YoutubeDL, tmp_path: Path, status: int, expected: Cause, polite: int
) -> None:
    with served({"a": BODY}, str(status), polite) as site, pytest.raises(IngestFailure) as caught:
        opened(site, downloader, tmp_path).read(2 * BLOCK)
    assert caught.value.cause is expected
    assert len(site.asked) == polite + 1


def test_what_breaks_off_is_taken_up_where_it_broke(downloader: yt_dlp.YoutubeDL, tmp_path: Path) -> None:
    with served({"a": BODY}, "once-cut", polite=1) as site, opened(site, downloader, tmp_path) as file:
        file.fill()
        assert (tmp_path / "a").read_bytes() == BODY
    (_, (first, count), (again, rest)) = blocks(site)[:3]
    assert first < again < first + count == again + rest


def test_a_server_that_turns_to_the_whole_file_is_believed(downloader: yt_dlp.YoutubeDL, tmp_path: Path) -> None:
    with served({"a": BODY}, "whole", polite=2) as site, opened(site, downloader, tmp_path) as file:
        file.seek(5 * BLOCK)
        assert file.read(BLOCK) + file.read(BLOCK) == BODY[5 * BLOCK : 7 * BLOCK]
        assert file.read(BLOCK) == BODY[7 * BLOCK : 8 * BLOCK]
        assert len(site.asked) == 3


def test_the_rate_and_the_bytes_are_limited(
    downloader: yt_dlp.YoutubeDL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = []
    monkeypatch.setattr(ranges.time, "sleep", slept.append)
    meter = Meter(rate_limit=10 * BLOCK, max_bytes=9 * BLOCK)
    with served({"a": BODY}) as site, opened(site, downloader, tmp_path, meter=meter) as file:
        file.read(8 * BLOCK)
        assert slept[-1] == pytest.approx(0.8, abs=0.3), "nobody slept in truth, so it adds up"
        file.seek(40 * BLOCK)
        with pytest.raises(IngestFailure) as caught:
            file.read(9 * BLOCK)
    assert caught.value.cause is Cause.TOO_LARGE


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """64 s in every container that seeks exactly."""
    folder = tmp_path_factory.mktemp("long")
    how = {"fps": 10, "claps": (3.0, 31.0, 32.5, 60.0), "size": (64, 32), "gop": 20}
    first, webm = clapper(folder / "clapper.mp4", seconds=64, rate=32000, **how), clapper(folder / "a.webm", seconds=64, **how)  # type: ignore[arg-type]
    parts = "empty_moov+frag_keyframe+default_base_moof"
    kinds = {"first": "faststart", "last": "0", "parts": parts, "indexed": f"dash+global_sidx+{parts}"}
    for kind, flags in kinds.items():
        ffmpeg("-i", first, "-c", "copy", "-movflags", flags, folder / f"{kind}.mp4")
    assert (folder / "first.mp4").read_bytes().index(b"moov") < 100
    return {"webm": webm} | {kind: folder / f"{kind}.mp4" for kind in kinds}


@pytest.mark.parametrize("kind", ["first", "last", "indexed", "parts", "webm"])
def test_clips_are_the_same_bit_by_bit_and_cost_less(long: dict[str, Path], tmp_path: Path, kind: str) -> None:
    path, spans = long[kind], [(30.0, 33.0), (2.0, 4.0)]
    data = path.read_bytes()
    requests = [request(*span) for span in spans]
    with served({path.name: data}) as site:
        with fetched(f"{site.address}/{path.name}", spans, tmp_path, QUICK) as media:
            made = {r.key: clip for r, clip in transcode(media, requests, SMALL)}
            assert isinstance(media.picture, RangedFile)
        whole = {r.key: clip for r, clip in transcode(path, requests, SMALL)}
        assert {key: (clip, clip.members) for key, clip in made.items()} == {k: (c, c.members) for k, c in whole.items()}  # type: ignore[union-attr]
        assert all(isinstance(clip, Clip) for clip in made.values())
        if kind == "parts":  # without an index every part up to the clip is looked at
            assert media.bytes <= len(data)
        else:
            assert media.bytes < len(data) / 2, (media.bytes, len(data))


@pytest.mark.parametrize(
    "spans", [[(0.0, None)], [(0.0, 60.0)], [(s, s + 5.0) for s in range(0, 60, 12)], [(30.0, 33.0), (5.0, None)]]
)
def test_a_file_that_is_wanted_for_the_most_part_comes_whole(
    long: dict[str, Path], tmp_path: Path, spans: list[tuple[float, float | None]]
) -> None:
    data = long["first"].read_bytes()
    with served({"a.mp4": data}) as site, fetched(f"{site.address}/a.mp4", spans, tmp_path, QUICK) as media:
        assert isinstance(media.picture, Path)
        assert media.picture.read_bytes() == data
        assert media.bytes == len(data)


def test_ranges_can_be_forbidden_and_are_not_for_every_container(long: dict[str, Path], tmp_path: Path) -> None:
    data = long["first"].read_bytes()
    for name, options in (("a.mp4", FetchOptions(ranges=False, allow_private=True)), ("a.ts", QUICK)):
        with served({name: data}) as site, fetched(f"{site.address}/{name}", [(30.0, 33.0)], tmp_path, options) as media:
            assert isinstance(media.picture, Path)
            assert media.picture.read_bytes() == data


@pytest.mark.parametrize("behaviour", ["whole", "late"])
def test_where_ranges_are_refused_the_whole_file_comes(long: dict[str, Path], tmp_path: Path, behaviour: str) -> None:
    data = long["first"].read_bytes()
    wanted = [(30.0, 33.0)]
    with served({"a.mp4": data}, behaviour) as site, fetched(f"{site.address}/a.mp4", wanted, tmp_path, QUICK) as media:
        assert isinstance(media.picture, Path)
        assert media.picture.read_bytes() == data


FAILS = {
    "429": Cause.RATE_LIMITED,
    "403": Cause.FORBIDDEN,
    "404": Cause.GONE,
    "500": Cause.NETWORK,
    "silent": Cause.NETWORK,
    "cut": Cause.NETWORK,
    "late": Cause.NETWORK,
    "html": Cause.NETWORK,
}


@pytest.mark.parametrize("behaviour", FAILS)
@pytest.mark.parametrize("later", [0, 2])
def test_a_failure_comes_through_ffmpeg_as_what_it_is(long: dict[str, Path], tmp_path: Path, behaviour: str, later: int) -> None:
    data, wanted = long["last"].read_bytes(), [(30.0, 33.0)]
    with served({"a.mp4": data}) as site, fetched(f"{site.address}/a.mp4", wanted, tmp_path, QUICK) as media:
        assert isinstance(media.picture, RangedFile)
        site.behaviour, site.polite = behaviour, len(site.asked) + later
        ((_, outcome),) = transcode(media, [request(*wanted[0])], SMALL)
    assert isinstance(outcome, IngestFailure)
    assert outcome.cause is FAILS[behaviour]
    assert outcome is media.picture.failure


def test_no_packet_is_given_away_of_which_a_part_is_missing(long: dict[str, Path]) -> None:
    data = long["first"].read_bytes()

    class Failing(io.BytesIO):
        def __init__(self, ends: int) -> None:
            super().__init__(data)
            self.ends = ends

        def read(self, count: int | None = -1) -> bytes:
            if self.tell() >= self.ends:
                raise IngestFailure(Cause.RATE_LIMITED, "enough")
            return super().read(count)

    def sizes(file: File) -> Iterator[int]:
        with open_source(Media(file)) as source:
            yield from (packet.size for _, packet in source._packets())

    whole = list(sizes(long["first"]))
    for ends in (200_000, 500_001, 700_002):
        given: list[int] = []
        with pytest.raises(IngestFailure, match="rate-limited: enough"):
            for size in sizes(Failing(ends)):
                given.append(size)
        assert 10 < len(given) < len(whole)
        assert given == whole[: len(given)]


def test_a_full_disk_ends_the_run_from_within_ffmpeg(
    long: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, wanted = long["first"].read_bytes(), [(30.0, 33.0)]
    with served({"a.mp4": data}) as site, fetched(f"{site.address}/a.mp4", wanted, tmp_path, QUICK) as media:
        assert isinstance(media.picture, RangedFile)
        with Path("/dev/full").open("r+b", buffering=0) as full, pytest.raises(IngestFailure) as caught:
            monkeypatch.setattr(media.picture, "file", full)
            list(transcode(media, [request(*wanted[0])], SMALL))
    assert caught.value.cause is Cause.DISK_FULL


def test_what_is_not_available_yet_is_waited_for(long: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    look = yt_dlp.YoutubeDL.extract_info
    soon = fetch.time.time() + 60
    monkeypatch.setattr(yt_dlp.YoutubeDL, "extract_info", lambda *a, **k: look(*a, **k) | {"available_at": soon})
    monkeypatch.setattr(fetch.time, "sleep", slept.append)
    with served({"a.mp4": long["first"].read_bytes()}) as site:
        with fetched(f"{site.address}/a.mp4", [(30.0, 33.0)], tmp_path, QUICK):
            assert 30 < max(slept) <= 60
        (tmp_path / "whole").mkdir()
        with fetched(f"{site.address}/a.mp4", [(30.0, None)], tmp_path / "whole", QUICK):
            assert max(slept[1:]) > 30


def test_how_much_of_a_source_its_clips_need() -> None:
    assert fetch._wanted_s([(100.0, 110.0)], 1000.0) == 25
    assert fetch._wanted_s([(100.0, 110.0), (105.0, 120.0)], 1000.0) == 35
    assert fetch._wanted_s([(0.0, 10.0)], 1000.0) == 13
    assert fetch._wanted_s([(990.0, 1005.0), (2000.0, 2010.0)], 1000.0) == 22
