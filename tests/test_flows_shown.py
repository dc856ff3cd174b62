"""What the commands print: plain words, sizes with a unit, nothing of a data set that a terminal would obey."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from cmacc.flows import console
from cmacc.flows.cli import app, main
from cmacc.flows.shown import described, resharded

DONE = {
    "selected": 1240, "written": 40, "there": 1190, "duplicates": 15, "near": 0, "shards": 1, "bytes": 3 << 20,
    "fingerprint": "ab" * 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({}, {
            "clips": "1,230: 40 encoded now, 1,190 there from before", "size": "3.0 MiB in 1 shard", "fingerprint": "ab" * 32,
            "left out": "15 with the key of an earlier one, 10 that cannot be decoded",
        }),
        ({"written": 1240, "there": 0, "duplicates": 0}, {
            "clips": "1,240 encoded", "size": "3.0 MiB in 1 shard", "fingerprint": "ab" * 32,
        }),
        ({"written": 0, "there": 1240, "duplicates": 0, "near": 2, "shards": 1200}, {
            "clips": "1,240, all there from before", "size": "3.0 MiB in 1,200 shards", "fingerprint": "ab" * 32,
            "left out": "2 nearly the same as an earlier one",
        }),
    ],
)  # fmt: skip
def test_a_reshard_in_words(change: dict[str, int], lines: dict[str, str]) -> None:
    assert resharded({**DONE, **change}, "encoded") == lines


def test_a_data_set_in_words() -> None:
    facts: dict[str, Any] = {
        "clips": 1240, "hours": 0.6889, "bytes": 5 << 30, "shards": 20, "sources": 1, "splits": {"": 1000, "eval": 240},
        "labels": {}, "duplicates": 0, "added_columns": {"mine": [1240], "video": [1240, 128]}, "members": ["mp4", "json"],
        "profile": None, "provenance": {"reshard": {"sources": [{"url": "s3://a"}], "where": "x > 1", "limit": None}},
        "fingerprint": "f",
    }  # fmt: skip
    assert described(facts) == {
        "clips": "1,240, 0.689 hours", "size": "5.0 GiB in 20 shards", "source videos": "1", "splits": "(none) 1,000, eval 240",
        "added columns": "mine, video (128 numbers a clip)", "members": "mp4, json", "made from": "s3://a, where x > 1",
        "fingerprint": "f",
    }  # fmt: skip


def test_nothing_printed_is_markup_or_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "out_console", console.Console(width=40))
    console.print_table("a[/b]", {"labels": "[red]x[/y] \x1b[2J", "long": "f" * 64})
    said = capsys.readouterr().out
    assert "a[/b]" in said and "[red]x[/y] \ufffd[2J" in said and said.count("f") == 64


def test_commands_are_in_the_order_of_the_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["cmacc", "--help"])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().out
    names = (
        "plan", "sample-world", "ingest", "status", "index", "reshard", "inspect", "lint", "extract", "embed", "search",
        "recipes", "pretrain", "replay", "evaluate", "report", "export", "run", "server-setup", "demo",
    )  # fmt: skip
    places = [said.index(f"│ {name} ") for name in names]
    assert places == sorted(places) and len(names) == len(app.registered_commands)
