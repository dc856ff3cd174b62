"""Clip lists as published: what each row asks for, and what is wrong with the rows that ask for nothing."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import pytest

from cmacc.ingest import ClipRequest, Manifest, read_manifest
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
