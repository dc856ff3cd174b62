"""Videos that are to be left out are recognised however they are written."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmacc.ingest import read_manifest
from cmacc.ingest.optout import OptOut
from cmacc.shards.clip import source_id

LIST = """\
# asked for by their makers

dQw4w9WgXcQ            # by letter
https://youtu.be/9bZkp7q19f0?t=3
yt_kJQP7kiw5Fk
yt_RgKAFK5djSk_10000_20000
https://Example.org/a%20b.mp4#part
file_0123456789abcdef
"""


@pytest.fixture
def optout(tmp_path: Path) -> OptOut:
    (tmp_path / "optout.txt").write_text(LIST)
    return OptOut.read(tmp_path / "optout.txt")


@pytest.mark.parametrize("id", ["dQw4w9WgXcQ", "9bZkp7q19f0", "kJQP7kiw5Fk"])
def test_a_youtube_video_is_the_same_in_every_form(optout: OptOut, id: str) -> None:
    forms = """{} yt_{} yt_{}_0_end yt_{}_5_10 https://youtu.be/{} youtu.be/{} http://www.youtube.com/watch?v={}&t=3
        youtube.com/watch?x=1&v={} https://m.youtube.com/shorts/{} https://music.youtube.com/watch?v={}
        https://www.youtube-nocookie.com/embed/{}?a=1 https://youtube.com/live/{} https://www.youtube.com/v/{}
        HTTPS://WWW.YOUTUBE.COM/watch?v={}""".replace("{}", id).split()
    assert [form for form in forms if not optout.opted_out(form)] == []
    other = "aaaaaaaaaaa"
    assert [form for form in forms if optout.opted_out(form.replace(id, other))] == []


def test_requests_are_matched_by_source_address_or_key(tmp_path: Path, optout: OptOut) -> None:
    rows = {
        "https://www.youtube.com/shorts/dQw4w9WgXcQ,0,5": True,
        "https://www.youtube.com/watch?v=RgKAFK5djSk,10,20": True,
        "https://www.youtube.com/watch?v=RgKAFK5djSk,10,21": False,
        "http://example.org:80/a%20b.mp4,0,5": True,
        "http://example.org/a.mp4,0,5": False,
        "clip.mp4,0,5": False,
    }
    (tmp_path / "list.csv").write_text("url,start,end\n" + "\n".join(rows))
    assert [optout.opted_out(r) for r in read_manifest(tmp_path / "list.csv").requests] == list(rows.values())
    assert optout.opted_out(source_id(url="https://Example.org/a%20b.mp4#part"))
    assert optout.opted_out("file_0123456789abcdef") and not optout.opted_out("file_0123456789abcde0")
    assert not OptOut().opted_out("dQw4w9WgXcQ")


def test_a_line_that_is_none_of_these_is_told(tmp_path: Path) -> None:
    path = tmp_path / "optout.txt"
    for line in ("short", "some words", "ftp://example.org/a.mp4", "/data/a.mp4", "http://", "yt_short_0_1"):
        path.write_text(f"# comment\ndQw4w9WgXcQ\n{line}\n")
        with pytest.raises(ValueError, match="line 3"):
            OptOut.read(path)
    with pytest.raises(ValueError, match="cannot be read"):
        OptOut.read(tmp_path / "missing.txt")
