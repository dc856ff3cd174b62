"""Clip lists as published: what each row asks for, and what is wrong with the rows that ask for nothing."""

from __future__ import annotations

import csv
import gc
import http.server
import json
import random
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest

from cmacc.ingest import BadRow, ClipRequest, Manifest, read_manifest
from cmacc.ingest.captions import Captions
from cmacc.shards.clip import source_id

AUDIOSET = """\
# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=22160, num_segs=22160, num_unique_labels=527, num_positive_labels=52882
# YTID, start_seconds, end_seconds, positive_labels
--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/07q6cd_,/m/0bt9lr,/m/0jbk"
--BfvyPmVMo, 20.000, 30.000, "/m/03l9g"
"""
VGGSOUND = """\
---g-f_I2yQ,1,"people marching",test
--0PQM4-hqg,30,"waterfall burbling, far away",train
"""
KINETICS = """\
label,youtube_id,time_start,time_end,split
testifying,---QUuC4vJs,84,94,validate
"eating, slowly",--3ouPhoy2A,20,30,test
"""
ACAV = "videoID,start,end\n--0lLLPA6w8,12.5,22.5\n"


def listed(tmp_path: Path, text: str, name: str = "list.csv") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def asks(manifest: Manifest) -> list[tuple[str, float, float | None, tuple[str, ...], str]]:
    return [(r.source, r.start_s, r.end_s, r.labels, r.split) for r in manifest.requests]


def reasons(manifest: Manifest) -> dict[int, str]:
    return {bad.row: bad.reason for bad in manifest.bad_rows}


def test_audioset_with_and_without_its_ontology(tmp_path: Path) -> None:
    path = listed(tmp_path, AUDIOSET, "eval_segments.csv")
    manifest = read_manifest(path, split="eval")
    assert asks(manifest) == [
        ("yt_--4gqARaEJE", 0.0, 10.0, ("/m/068hy", "/m/07q6cd_", "/m/0bt9lr", "/m/0jbk"), "eval"),
        ("yt_--BfvyPmVMo", 20.0, 30.0, ("/m/03l9g",), "eval"),
    ]
    assert [r.row for r in manifest.requests] == [4, 5]
    assert manifest.requests[0].address == "https://www.youtube.com/watch?v=--4gqARaEJE"
    assert manifest.requests[1].key == "yt_--BfvyPmVMo_20000_30000"
    listed(tmp_path, 'index,mid,display_name\n0,/m/068hy,"Domestic animals, pets"\n1,/m/0bt9lr,Dog\n', "class_labels_indices.csv")
    assert read_manifest(path).requests[0].labels == ("Domestic animals, pets", "/m/07q6cd_", "Dog", "/m/0jbk")


def test_vggsound_kinetics_and_acav100m(tmp_path: Path) -> None:
    assert asks(read_manifest(listed(tmp_path, VGGSOUND))) == [
        ("yt_---g-f_I2yQ", 1.0, 11.0, ("people marching",), "test"),
        ("yt_--0PQM4-hqg", 30.0, 40.0, ("waterfall burbling, far away",), "train"),
    ]
    assert asks(read_manifest(listed(tmp_path, KINETICS), split="all")) == [
        ("yt_---QUuC4vJs", 84.0, 94.0, ("testifying",), "validate"),
        ("yt_--3ouPhoy2A", 20.0, 30.0, ("eating, slowly",), "test"),
    ]
    for text in (ACAV, ACAV.split("\n", 1)[1]):
        assert asks(read_manifest(listed(tmp_path, text), split="all")) == [("yt_--0lLLPA6w8", 12.5, 22.5, (), "all")]


def test_named_columns_in_csv_tsv_jsonl_and_parquet_ask_the_same(tmp_path: Path) -> None:
    rows = [
        {"url": "http://host/a.mp4", "start": 1.5, "end": 4.5, "labels": "dog|bark, loud", "split": "train"},
        {"url": "http://host/b.mp4", "start": None, "end": None, "labels": "cat", "split": ""},
    ]
    lines = [["" if v is None else str(v) for v in row.values()] for row in rows]
    csv = "\n".join([",".join(rows[0]), *(",".join(f'"{cell}"' for cell in line) for line in lines)])
    tsv = "\n".join(["\t".join(rows[0]), *("\t".join(line) for line in lines)])
    paths = [
        listed(tmp_path, csv, "a.csv"),
        listed(tmp_path, tsv, "a.tsv"),
        listed(tmp_path, "\ufeff" + "\n\n".join(map(json.dumps, rows)), "a.jsonl"),
        tmp_path / "a.parquet",
    ]
    duckdb.connect().execute(f"copy (from read_json('{paths[2]}')) to '{paths[3]}'")
    expected = [
        (source_id(url="http://host/a.mp4"), 1.5, 4.5, ("dog", "bark, loud"), "train"),
        (source_id(url="http://host/b.mp4"), 0.0, None, ("cat",), "dev"),
    ]
    for path in paths:
        assert asks(read_manifest(path, split="dev")) == expected, path.name


def test_addresses_of_every_kind(tmp_path: Path) -> None:
    text = "\n".join(
        (
            "https://youtu.be/dQw4w9WgXcQ?t=3",
            "https://www.youtube.com/watch?v=9bZkp7q19f0&list=PL1",
            "https://m.youtube.com/shorts/kJQP7kiw5Fk",
            "RgKAFK5djSk",
            "https://host/clip.webm",
            "folder/clip.mp4",
            "ftp://host/clip.mp4",
            "../clip.mp4",
        )
    )
    manifest = read_manifest(listed(tmp_path, text), url_template="http://127.0.0.1:80/{id}.mp4")
    assert [r.source for r in manifest.requests] == [
        "yt_dQw4w9WgXcQ",
        "yt_9bZkp7q19f0",
        "yt_kJQP7kiw5Fk",
        "yt_RgKAFK5djSk",
        source_id(url="https://host/clip.webm"),
        source_id(path=str(tmp_path / "folder/clip.mp4")),
    ]
    assert manifest.requests[3].address == "http://127.0.0.1:80/RgKAFK5djSk.mp4"
    assert manifest.requests[5].address == str(tmp_path / "folder" / "clip.mp4")
    assert set(reasons(manifest)) == {7, 8}


def test_bad_rows_say_what_is_wrong_and_cost_nothing_else(tmp_path: Path) -> None:
    text = """\
youtube_id,start,end
dQw4w9WgXcQ,0,10
,0,10
tooshort,0,10
9bZkp7q19f0,ten,20
9bZkp7q19f0,nan,20
9bZkp7q19f0,10,10
9bZkp7q19f0,12,10
9bZkp7q19f0,-3,10

dQw4w9WgXcQ,0.0001,10
9bZkp7q19f0,5
kJQP7kiw5Fk,0,10
"""
    manifest = read_manifest(listed(tmp_path, text))
    assert [(r.row, r.source, r.end_s) for r in manifest.requests] == [
        (2, "yt_dQw4w9WgXcQ", 10.0),
        (11, "yt_dQw4w9WgXcQ", 10.0),  # the same clip: the ledger's to tell
        (12, "yt_9bZkp7q19f0", None),
        (13, "yt_kJQP7kiw5Fk", 10.0),
    ]
    expected = {3: "no YouTube id", 4: "not a YouTube id", 5: "not a number", 6: "not a number", 7: "not after start",
                8: "not after start", 9: "negative"}  # fmt: skip
    found = reasons(manifest)
    assert set(found) == set(expected)
    for row, words in expected.items():
        assert words in found[row]


def test_broken_lines_are_bad_rows(tmp_path: Path) -> None:
    manifest = read_manifest(
        listed(tmp_path, '{"id": "dQw4w9WgXcQ"}\n{"id": \n[1]\n{"path": "../a.mp4"}\n{"path": "b.mp4"}', "a.jsonl")
    )
    assert len(manifest.requests) == 2
    assert set(reasons(manifest)) == {2, 3, 4}
    assert "leads out" in reasons(manifest)[4]


def test_a_folder_a_file_and_their_labels(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.WEBM", "deep/er/c.mpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    manifest = read_manifest(tmp_path, split="train")
    assert [Path(r.address).name for r in manifest.requests] == ["a.WEBM", "b.mp4", "c.mpg"]
    assert all(r.start_s == 0 and r.end_s is None and r.split == "train" for r in manifest.requests)
    listed(tmp_path, "filename,digit,label,split\nb.mp4,7,bee,\nc.mpg,9,sea,test\n", "labels.csv")
    assert [(r.labels, r.split) for r in read_manifest(tmp_path, split="train").requests] == [
        ((), "train"),
        (("bee",), "train"),
        (("sea",), "test"),
    ]
    assert [r.labels for r in read_manifest(tmp_path, label_column="Digit").requests] == [(), ("7",), ("9",)]
    one = read_manifest(tmp_path / "b.mp4")
    assert [r.address for r in one.requests] == [str(tmp_path / "b.mp4")]
    assert read_manifest("http://host/x/y.mp4?token=1").requests[0].source == source_id(url="http://host/x/y.mp4?token=1")
    assert read_manifest("https://www.youtube.com/watch?v=dQw4w9WgXcQ").requests[0].key == "yt_dQw4w9WgXcQ_0_end"


def test_a_list_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases = {
        str(listed(tmp_path, "", "a.csv")): "names no clip",
        str(listed(tmp_path, "# only, a, comment\n", "b.csv")): "names no clip",
        str(listed(tmp_path, "name,colour\nx,red\n", "c.csv")): "name the columns",
        str(listed(tmp_path, "a\0b\0c", "d.csv")): "neither text nor Parquet",
        str(listed(tmp_path, "PAR1 and nothing else", "e.parquet")): "cannot be read",
        str(tmp_path / "missing.csv"): "cannot be read",
        str(tmp_path / "empty"): "names no clip",
        "http://127.0.0.1:9/list.csv": "cannot be read",
    }
    for source, words in cases.items():
        with pytest.raises(ValueError, match=words):
            read_manifest(source)
    with pytest.raises(ValueError, match="use one of"):
        read_manifest(tmp_path, format="excel")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="write where the video id goes"):
        read_manifest(tmp_path, url_template="http://host/")


def test_the_format_can_be_named(tmp_path: Path) -> None:
    path = listed(tmp_path, "dQw4w9WgXcQ,3,4,5\n")  # a label that looks like a number
    assert asks(read_manifest(path, format="vggsound")) == [("yt_dQw4w9WgXcQ", 3.0, 13.0, ("4",), "5")]
    assert asks(read_manifest(path, format="audioset")) == [("yt_dQw4w9WgXcQ", 3.0, 4.0, ("5",), "")]


def test_a_request_is_a_value() -> None:
    request = ClipRequest(1, "list.csv", "yt_dQw4w9WgXcQ", "https://host", 1.25, 3.5)
    assert request.key == "yt_dQw4w9WgXcQ_1250_3500"
    assert request == ClipRequest(1, "list.csv", "yt_dQw4w9WgXcQ", "https://host", 1.25, 3.5)


HOWTO = """\
video_id,category_1,category_2,rank,task_id
nVbIUDjzWY4,"Cars & Other Vehicles",Motorcycles,27,52907
CTPAZ2euJ2Q,Food and Entertaining,,3,1
"""
SAID = {
    "nVbIUDjzWY4": {"start": [4.0, 8.5, 11.5, 30], "end": [9.0, 12, 25.0, 31.0], "text": ["one ", "two", "three", "four"]},
    "-----------": {
        "start": [1.0, 5.0, 3.0],
        "end": [2.0, 4.0, 6.0],
        "text": ["first", "ends before it starts", "\u00e9t\u00e9"],
    },
    "broken_____": [1, 2],
}


@pytest.fixture
def spoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = tmp_path / "caption.json"
    path.write_text(json.dumps(SAID))
    return path


def test_howto100m_whole_with_captions_and_in_segments(tmp_path: Path, spoken: Path) -> None:
    path = listed(tmp_path, HOWTO, "HowTo100M_v1.csv")
    labels = [("Cars & Other Vehicles", "Motorcycles"), ("Food and Entertaining",)]
    ids = ["yt_nVbIUDjzWY4", "yt_CTPAZ2euJ2Q"]
    assert asks(read_manifest(path)) == [(i, 0.0, None, of, "") for i, of in zip(ids, labels, strict=True)]
    assert asks(read_manifest(listed(tmp_path, HOWTO.split("\n", 1)[1], "b.csv"), format="howto100m")) == asks(
        read_manifest(path)
    )
    whole, silent = read_manifest(path, captions=spoken).requests
    assert whole.end_s is None and [text for _, _, text in whole.captions] == ["one", "two", "three", "four"]
    assert silent.captions == ()

    manifest = read_manifest(path, captions=spoken, segment_s=10)
    assert [(r.row, r.start_s, r.end_s, r.labels, [text for *_, text in r.captions]) for r in manifest.requests] == [
        (2, 4.0, 14.0, labels[0], ["one", "two", "three"]),
        (2, 14.0, 24.0, labels[0], ["three"]),
        (2, 24.0, 31.0, labels[0], ["three", "four"]),
    ]
    assert "no captions" in reasons(manifest)[3]
    # 27 s by 5: a rest of 2 s is less than half and is dropped
    assert [r.end_s for r in read_manifest(path, captions=spoken, segment_s=5).requests] == [9.0, 14.0, 19.0, 24.0, 29.0]
    with pytest.raises(ValueError, match="seconds"):
        read_manifest(path, segment_s=0)


def test_captions_are_read_once_and_only_those_of_the_clip_go_along(tmp_path: Path, spoken: Path) -> None:
    captions = Captions(spoken)
    assert captions.of("-----------") == ((1.0, 2.0, "first"), (3.0, 6.0, "\u00e9t\u00e9"))
    assert captions.of("broken_____") == captions.of("unknown") == ()
    made = captions.path.stat().st_mtime_ns
    assert Captions(spoken).path.stat().st_mtime_ns == made
    assert [f.name for f in tmp_path.iterdir() if "captions" in f.name] == [captions.path.name]
    path = listed(tmp_path, "nVbIUDjzWY4,8,11\n")
    assert [c[2] for c in read_manifest(path, captions=captions).requests[0].captions] == ["one", "two"]
    for text in ("[1, 2]", '{"a": {"start": [1', "{}"):
        spoken.write_text(text)
        with pytest.raises(ValueError, match=r"captions .*caption\.json"):
            Captions(spoken, tmp_path / "own.sqlite")
    assert not (tmp_path / "own.sqlite").exists()


def test_captions_in_a_column(tmp_path: Path) -> None:
    said = [[0, 1.5, "hey"], {"start": 2, "end": 3, "text": "you"}]
    rows = [{"id": "dQw4w9WgXcQ", "captions": said}, {"id": "9bZkp7q19f0", "captions": [["x"]]}]
    manifest = read_manifest(listed(tmp_path, "\n".join(map(json.dumps, rows)), "a.jsonl"))
    assert manifest.requests[0].captions == ((0.0, 1.5, "hey"), (2.0, 3.0, "you"))
    assert "captions" in reasons(manifest)[2]
    with (tmp_path / "b.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "captions"], ["dQw4w9WgXcQ", json.dumps(said)]])
    assert read_manifest(tmp_path / "b.csv").requests[0].captions == manifest.requests[0].captions


def test_published_lists_as_they_are_found(tmp_path: Path) -> None:
    clip = ("yt_---QUuC4vJs", 84.0, 94.0, ("testifying",), "validate")
    for text in (
        "\ufefflabel,youtube_id,time_start,time_end,split,is_cc\r\ntestifying,---QUuC4vJs,84,94,validate,0\r\n",
        'Label , "YouTube ID",Time Start,TIME-END, Split,\ntestifying , ---QUuC4vJs , 84 , 94 , validate,\n',
        "testifying,---QUuC4vJs,84,94,validate\n",
        "\x81\x00rubbish\nlabel,youtube_id,time_start,time_end,split\ntestifying,---QUuC4vJs,84,94,validate\n",
    ):
        assert asks(read_manifest(listed(tmp_path, text))) == [clip], text
    test_split = "youtube_id,time_start,time_end,split\n---QUuC4vJs,84,94,test\n"
    assert asks(read_manifest(listed(tmp_path, test_split))) == [("yt_---QUuC4vJs", 84.0, 94.0, (), "test")]
    (tmp_path / "wide.csv").write_text(KINETICS, encoding="utf-16")
    assert asks(read_manifest(tmp_path / "wide.csv"))[1][3] == ("eating, slowly",)

    listed(tmp_path, json.dumps([{"id": "/m/068hy", "name": "Domestic animals, pets", "child_ids": []}]), "ontology.json")
    named = read_manifest(listed(tmp_path, AUDIOSET.replace("\n", "\r\n")))
    assert named.requests[0].labels == ("Domestic animals, pets", "/m/07q6cd_", "/m/0bt9lr", "/m/0jbk")
    bare = read_manifest(listed(tmp_path, AUDIOSET.replace('"', "").replace("03l9g", "03l9g,")))
    assert [r.labels for r in bare.requests] == [named.requests[0].labels, ("/m/03l9g",)]


PRIVATE = """\
127.0.0.1 127.1 2130706433 0x7f000001 0x7f.1 0177.0.0.1 127.0.0.1. localhost LOCALHOST. a.localhost printer.local db.internal
10.0.0.1 172.16.3.4 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 0 224.0.0.1 255.255.255.255 198.18.0.1 4294967297 1.2.3.4.5
[::1] [::] [fe80::1] [fe80::1%25eth0] [fc00::1] [::ffff:127.0.0.1] [::ffff:7f00:1] [64:ff9b::7f00:1] [2002:7f00:1::] [ff02::1]
\uff11\uff12\uff17.0.0.1 \u2460\u2461\u2466.0.0.1 127\u30020.0.1 127.0.0.1%2f 192.168.1.1:8080
"""
PUBLIC = [
    "example.org",
    "93.184.216.34",
    "1.1.1.1",
    "[2606:4700:4700::1111]",
    "local.example.org",
    "10.example.org",
    "8.8.8.8:80",
]


def test_addresses_of_private_networks_are_refused_unless_allowed(tmp_path: Path) -> None:
    path = listed(tmp_path, "url\n" + "".join(f"http://{host}/a.mp4\n" for host in PRIVATE.split() + PUBLIC))
    manifest = read_manifest(path)
    assert [r.address for r in manifest.requests] == [f"http://{host}/a.mp4" for host in PUBLIC]
    refused = reasons(manifest)
    assert len(refused) == len(PRIVATE.split())
    assert all("--allow-private" in reason for reason in refused.values())
    assert len(read_manifest(path, allow_private=True).requests) == len(PRIVATE.split() + PUBLIC)
    # the operator's own word
    assert len(read_manifest("http://127.0.0.1:9/a.mp4").requests) == 1
    assert read_manifest(listed(tmp_path, "HTTPS://example.org/A.mp4")).requests[0].address == "https://example.org/A.mp4"
    own = listed(tmp_path, "dQw4w9WgXcQ,0,10\n")
    assert read_manifest(own, url_template="http://127.0.0.1/{id}?{x}").requests[0].address == "http://127.0.0.1/dQw4w9WgXcQ?{x}"


def test_files_outside_the_folder_are_refused_unless_allowed(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    rows = ["../a.mp4", "b/../../a.mp4", "file:///etc/a.mp4", "FILE:/etc/a.mp4", "file://host/a.mp4", "/data/a.mp4", "b/../a.mp4"]
    path = listed(tmp_path / "lists", "path\n" + "\n".join(rows))
    manifest = read_manifest(path)
    assert [r.address for r in manifest.requests] == ["/data/a.mp4", str(tmp_path / "lists" / "a.mp4")]
    refused = reasons(manifest)
    assert set(refused) == {2, 3, 4, 5, 6} and all("--allow-private" in reason for reason in refused.values())
    taken = read_manifest(path, allow_private=True)
    outside = str(tmp_path / "a.mp4")
    assert [r.address for r in taken.requests[:4]] == [outside, outside, "/etc/a.mp4", "/etc/a.mp4"]
    assert "no file of this machine" in reasons(taken)[6]


def test_a_password_is_refused_and_told_nowhere(tmp_path: Path) -> None:
    rows = [f"{address}" for address in (
        "http://me:secret@host/a.mp4", "ftp://me:secret@host/a.mp4", "http://me:secret@127.0.0.1/", "http://me:secret@h:port/a",
        "file://me:secret@host/a.mp4", "//me:secret@host/../../../a", "http://me:secret@/a", "http://example.org\\@127.0.0.1/",
    )]  # fmt: skip
    for column in ("url", "path", "id"):
        manifest = read_manifest(listed(tmp_path, f"{column},label\n" + "".join(f"{row},x\n" for row in rows)))
        assert len(manifest.bad_rows) >= 7, column
        assert "secret" not in " ".join(reasons(manifest).values())
    assert read_manifest(listed(tmp_path, "url\nhttps://me:secret@youtu.be/dQw4w9WgXcQ\n")).requests[0].source == "yt_dQw4w9WgXcQ"
    assert len(read_manifest(listed(tmp_path, "url\nhttp://youtube.com:80@127.0.0.1/watch?v=dQw4w9WgXcQ\n")).bad_rows) == 1
    with pytest.raises(ValueError, match="without") as refused:
        read_manifest("https://me:secret@host/list.csv")
    assert "secret" not in str(refused.value)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_list_from_a_url_is_kept_while_it_is_read(tmp_path: Path, served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aside").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "aside"))
    path = listed(tmp_path, "path\nhttps://example.org/a.mp4\n/etc/a.mp4\na.mp4\n")
    manifest = read_manifest(f"{served}/list.csv")
    path.unlink()
    for _ in range(2):
        assert [type(row) for row in manifest] == [ClipRequest, BadRow, BadRow]
    assert "--allow-private" in reasons(manifest)[3] and "give a URL" in reasons(manifest)[4]
    assert manifest.name == f"{served}/list.csv"
    assert len(list((tmp_path / "aside").iterdir())) == 1
    del manifest
    gc.collect()
    assert not list((tmp_path / "aside").iterdir())


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_long_list_is_never_held(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"long.{kind}"
    rows = "from (select lpad(i::varchar, 11, 'a') as id, i % 60 as start, i % 60 + 10 as end from range(20000) t(i))"
    written = {"csv": "header, delimiter ','", "jsonl": "format json", "parquet": "format parquet"}[kind]
    duckdb.connect().execute(f"copy ({rows}) to '{path}' ({written})")
    manifest = read_manifest(path)
    tracemalloc.start()
    try:
        count = sum(isinstance(row, ClipRequest) for row in manifest)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 20_000
    assert peak < 4e6  # held, the requests alone would be 7 MB


def test_an_open_quote_or_a_long_line_costs_itself(tmp_path: Path) -> None:
    lines = [f'{i:011}, {i}, {i + 10}, "/m/a,/m/b"' for i in range(40)]
    lines[5] = lines[5][:-1]  # would be closed by the quote of the next row
    lines[39] = lines[39][:-1]
    lines[20] = "x" * 3_000_000
    lines[30] = '"' + "y" * 200_000  # longer than a csv field may be
    manifest = read_manifest(listed(tmp_path, "\n".join(lines)))
    assert set(reasons(manifest)) == {6, 21, 31, 40}
    assert "quote" in reasons(manifest)[6] and "longer" in reasons(manifest)[21]
    assert len(manifest.requests) == 36
    # in a table of one's own, a cell may hold line ends
    table = 'id,label\ndQw4w9WgXcQ,"two\nlines"\n9bZkp7q19f0,"open\nkJQP7kiw5Fk,"next"\nRgKAFK5djSk,last\n'
    manifest = read_manifest(listed(tmp_path, table))
    assert [(r.row, r.labels) for r in manifest.requests] == [(2, ("two\nlines",)), (5, ("next",)), (6, ("last",))]
    assert set(reasons(manifest)) == {4}


def test_text_that_no_database_keeps_is_a_bad_row(tmp_path: Path) -> None:
    lines = [
        '{"id": "dQw4w9WgXcQ", "label": "\\ud800"}', '{"id": "dQw4w9WgXcQ", "label": "a\\u0000"}', "[" * 100_000,
        '{"url": "http://example.org/\\udfff"}', '{"id": "dQw4w9WgXcQ", "start": 1' + "0" * 400 + "}", '{"path": "\\udc80"}',
        '{"id": "dQw4w9WgXcQ", "start": {"a": 1}}', '{"id": "dQw4w9WgXcQ"}',
    ]  # fmt: skip
    manifest = read_manifest(listed(tmp_path, "\n".join(lines), "a.jsonl"))
    assert set(reasons(manifest)) == set(range(1, 8))
    for reason in reasons(manifest).values():
        reason.encode()


def test_rubbish_in_a_list_never_stops_it(tmp_path: Path) -> None:
    rng = random.Random(5)
    rows = 60
    lists = [
        [f'{i:011}, {i}.000, {i + 10}.000, "/m/{i},/m/x"' for i in range(rows)],
        ["label,youtube_id,time_start,time_end,split", *(f'"a {i}, b",{i:011},{i},{i + 10},train' for i in range(rows))],
        ["url\tstart\tlabel", *(f"https://example.org/{i}.mp4\t{i}\tdog" for i in range(rows))],
        [json.dumps({"id": f"{i:011}", "start": i, "labels": ["a", "b"]}) for i in range(rows)],
        [f"https://youtu.be/{i:011}" for i in range(rows)],
    ]
    path = tmp_path / "list"
    for trial in range(300):
        lines = [line.encode() for line in lists[trial % len(lists)]]
        struck = {rng.randrange(1, len(lines)) for _ in range(rng.randrange(1, 4))}
        for at in struck:
            line = lines[at]
            cut = rng.randrange(len(line))
            lines[at] = rng.choice((
                lambda: rng.randbytes(rng.randrange(1, 200)).replace(b"\n", b"").replace(b"\r", b""),
                lambda line=line, cut=cut: line[:cut] + b"\0" + line[cut:],
                lambda line=line, cut=cut: line[:cut] + b'"' + line[cut:],
                lambda line=line, cut=cut: line[:cut] + rng.randbytes(3).replace(b"\n", b"").replace(b"\r", b"") + line[cut:],
                lambda line=line, cut=cut: line[:cut] + b"z" * 150_000 + line[cut:],
                lambda line=line, cut=cut: line[:cut],
                lambda line=line: line * 3,
                lambda: b'{"id":' * 5000,
                lambda: b",,,,,\t\t\t;;;",
            ))()  # fmt: skip
        path.write_bytes(b"\n".join(lines))
        manifest = read_manifest(path)
        found = list(manifest)
        intact = {i + 1 for i in range(len(lines)) if i not in struck} - ({1} if trial % len(lists) in (1, 2) else set())
        assert intact <= {row.row for row in found if isinstance(row, ClipRequest)}, trial
        assert all(len(row.reason) <= 300 for row in found if isinstance(row, BadRow))
