"""The `cmacc` command: its help, the tools that need no flow, and one clear sentence for whatever is wrong."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from media import make_clip, tiny_profile

from cmacc.flows.cli import main
from cmacc.shards.dataset import Dataset
from cmacc.shards.writer import DatasetWriter
from cmacc.train.config import RECIPES, change, from_json, recipe

COMMANDS = (
    "sample-world", "ingest", "reshard", "inspect", "lint", "extract", "recipes", "pretrain", "replay", "evaluate", "export",
    "report", "embed", "search", "run", "demo",
)  # fmt: skip
TINY = (
    "steps=4", "log_every=2", "eval_every=4", "checkpoint.steps=4", "loader.batch=4", "view.frames=4", "view.size=24",
    "view.view_s=0.3", "objective.dictionary=16", "objective.candidates=32", "eval_split=", "split=",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "set"
    with DatasetWriter(path, tiny_profile()) as writer:
        for i in range(8):
            writer.add(make_clip(i))
    return path


def here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command in this process, which saves the seconds of importing torch; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["cmacc", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert here(monkeypatch, name, "--help") == 0
    assert f"Example: cmacc {name}" in " ".join(capsys.readouterr().out.split())


def test_from_data_set_to_export_and_embeddings(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cmacc(*words: object) -> str:
        assert here(monkeypatch, *map(str, words)) == 0
        return capsys.readouterr().out

    run = tmp_path / "run"
    cmacc("pretrain", data, "--out", run, *(part for option in TINY for part in ("--set", option)))
    assert (run / "picture.png").exists()
    assert "R@5" in cmacc("evaluate", run, "--on", f"retrieval:{data}", "--split", "", "--views", 1)
    cmacc("export", run, "--out", tmp_path / "export", "--no-programs")
    cmacc("embed", tmp_path / "export", data, "--name", "tiny", "--batch", 4)
    columns = Dataset.open(data).catalog
    for name in ("video-tiny", "audio-tiny"):
        norms = np.linalg.norm(columns.column(name).astype(np.float32), axis=1)
        assert np.allclose(norms, 1, atol=1e-2)
    assert json.loads(cmacc("inspect", data, "--json"))["added_columns"] == {"audio-tiny": [8, 128], "video-tiny": [8, 128]}


def test_a_refusal_from_the_installed_command(cmacc) -> None:  # type: ignore[no-untyped-def]
    assert cmacc("inspect", "nowhere", code=1).stderr.startswith("cmacc: nowhere does not exist")


def test_ctrl_c_says_how_to_go_on(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Dataset, "open", lambda url: signal.raise_signal(signal.SIGINT))
    assert here(monkeypatch, "inspect", str(data)) == 130
    assert capsys.readouterr().err == "stopped; the same command continues\n"


def test_the_page_of_a_data_set(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, sheet = tmp_path / "page.html", tmp_path / "sheet.png"
    some = ("--page", str(page), "--sheet", str(sheet), "--where", "motion >= 2", "--clips", "3", "--seed", "1")
    assert here(monkeypatch, "inspect", str(data), *some) == 0
    assert f"page: {page}" in capsys.readouterr().out and sheet.stat().st_size > 1000
    assert page.read_text().count("<article") == 3 and "6 clips: motion &gt;= 2" in page.read_text()
    assert here(monkeypatch, "inspect", str(data), "--page", str(page), "--where", "nothing > 1") == 1
    assert "where 'nothing > 1' is not understood" in capsys.readouterr().err
    assert here(monkeypatch, "inspect", str(data), "--split", "train") == 1
    assert "give --page FILE.html" in capsys.readouterr().err


def test_recipes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert here(monkeypatch, "recipes") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in RECIPES)
    assert here(monkeypatch, "recipes", "paper", "--set", "train.batch=64") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "loader.batch" in line)
    assert line.replace("│", " ").split()[:5] == ["loader.batch", "64", "clips", "a", "step,"]  # the rest may be folded
    assert here(monkeypatch, "recipes", "demo", "--json", "--set", "objective.tau=0.5") == 0
    assert from_json(json.loads(capsys.readouterr().out)) == change(recipe("demo"), {"objective.tau": 0.5})


def test_lint_and_reshard(cmacc, data: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert "no fault" in cmacc("lint", data).stdout
    cmacc("reshard", data, "--out", tmp_path / "few", "--where", "duration_s > 0", "--limit", 3, "--order", "shuffle:1")
    assert len(Dataset.open(tmp_path / "few")) == 3
    shard = next((tmp_path / "few").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-2000])
    assert "truncated" in cmacc("lint", tmp_path / "few", code=1).stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("ingest", "none.csv", "--out", "x"), "none.csv"),
        (("ingest", "none.csv", "--out", "x", "--workers", "0"), "workers is 0; give 1 to"),
        (("ingest", "none.csv", "--out", "s3://bucket/x"), "s3://bucket/x is not a local folder"),
        (("ingest", "none.csv", "--out", "x", "--profile", "h266"), "profile 'h266' is not known; use one of"),
        (("ingest", "none.csv", "--out", "x", "--retry", "rain"), "there is no cause 'rain' to retry"),
        (("pretrain", "nowhere", "--out", "x"), "nowhere does not exist; give the folder"),
        (("pretrain", "nowhere", "--out", "x", "--set", "objective.tau=cold"), "objective.tau"),
        (("pretrain", "nowhere", "--out", "x", "--set", "objective.tua=1"), "option objective.tua; did you mean objective.tau?"),
        (
            ("pretrain", "nowhere", "--out", "x", "--set", "objective.pool=fresh", "--set", "objective.selector=fifo"),
            "picks nothing",
        ),
        (("pretrain", "nowhere", "--out", "x", "--ranks", "-1"), "ranks is -1; give 1 or more, or 0 for one on each GPU"),
        (("recipes", "soup"), "recipe 'soup' is not known; use one of paper, paper-r2plus1d, small-cpu, demo"),
        (("replay", "nowhere"), "nowhere holds no batch that failed; give RUN/failed/step-…"),
        (("pretrain", "nowhere", "--out", "x", "--recipe", "soup"), "recipe 'soup' is not known"),
        (("pretrain", "3=nowhere", "1=x", "--out", "x"), "nowhere does not exist; give the folder"),
        (("pretrain", "3=", "--out", "x"), "the address of a data set is empty ('3='); give a folder"),
        (("pretrain", "much=nowhere", "--out", "x"), "wrote, or a number as its weight instead of 'much'"),
        (("pretrain", "s4://x/y", "--out", "x"), "s4://x/y cannot be read"),
        (("pretrain", "EMPTY", "--out", "x"), "has no clip; ingest into it, or give another data set"),
        (("pretrain", "0=DATA", "--out", "x", "--set", "split="), "weights are 0.0; give each data set a number above 0"),
        (("pretrain", "nan=DATA", "--out", "x", "--set", "split="), "weights are nan; give"),
        (("pretrain", "9999=DATA", "1=DATA", "--out", "x", "--set", "split="), "weight 1.0 is below 1/4096 of the sum; give at"),
        (("pretrain", "DATA", "--out", "x"), "is in split 'train'; its splits are ''"),
        (("pretrain", "DATA", "--out", "x", "--set", "split"), "option 'split' has no value; write it as name=value"),
        (("pretrain", "nowhere", "--out", "x", "--set", f"seed={1 << 64}"), "give 0 or more, below 2^63"),
        (("pretrain", "nowhere", "--out", "x", "--set", "loader.threads=1000000"), "loader.threads is 1000000; give a number up"),
        (("bench", "loader", "nowhere"), "nowhere does not exist; give the folder"),
        (("bench", "loader", "EMPTY"), "has no clip; ingest into it"),
        (("bench", "loader", "DATA", "--split", "none"), "is in split 'none'; its splits are ''"),
        (("bench", "loader", "0=DATA"), "weights are 0.0; give each data set a number above 0"),
        (("bench", "loader", "DATA", "--set", "loader.batch=none"), "loader.batch: Input should be a valid integer"),
        (("bench", "loader", "DATA", "--set", f"loader.streams={10**12}"), "there is not enough memory (Unable to allocate"),
        (("evaluate", "nowhere"), "there is nothing to evaluate on"),
        (("evaluate", "nowhere", "--on", "retrieval:x"), "x does not exist; give the folder"),
        (("evaluate", "nowhere", "--on", "retrieval:DATA"), "nowhere holds no checkpoint"),
        (("evaluate", "nowhere", "--on", "esc51:x"), "'esc51:x' names nothing to evaluate on; give --on esc50:DIR"),
        (("evaluate", "nowhere", "--on", "esc50:nowhere"), "nowhere is no folder; give the one that holds"),
        (("evaluate", "nowhere", "--on", "retrieval:x", "--crops", "2"), "crops is 2; give 1, the middle, or 3"),
        (("evaluate", "nowhere", "--on", "retrieval:x", "--protocol", "svn"), "no protocol 'svn'; use svm, logistic, knn"),
        (("reshard", "nowhere", "--out", "x"), "nowhere does not exist"),
        (("inspect", "nowhere"), "nowhere does not exist"),
        (("export", "nowhere", "--out", "x"), "nowhere holds no checkpoint"),
        (("sample-world", "x", "--clips", "0"), "clips"),
        (("run", "ingest"), "PREFECT_API_URL is not set"),
    ],
)
def test_one_sentence_for_what_is_wrong(
    arguments: tuple[str, ...],
    sentence: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """DATA is a data set of 8 clips without a split, EMPTY one of none."""
    monkeypatch.chdir(tmp_path)
    with DatasetWriter(tmp_path / "empty", tiny_profile()):
        pass
    places = {"DATA": str(data), "EMPTY": str(tmp_path / "empty")}
    assert here(monkeypatch, *(a.replace("DATA", places["DATA"]).replace("EMPTY", places["EMPTY"]) for a in arguments)) == 1
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "x" / "dataset.json").exists()


def test_a_full_disk_is_one_sentence_and_loses_nothing(  # type: ignore[no-untyped-def]
    cmacc, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's own limit on a file's size stands in for the full disk: a checkpoint does not fit."""
    run = tmp_path / "run"
    options = [part for option in TINY for part in ("--set", option)]
    limited = " ".join(
        ["ulimit -f 200;", "trap '' XFSZ;", "exec", *map(shlex.quote, cmacc.command("pretrain", data, "--out", run, *options))]
    )
    done = subprocess.run(
        ["bash", "-c", limited], env=cmacc.environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list((run / "checkpoints").iterdir()) == []
    assert here(monkeypatch, "pretrain", str(data), "--out", str(run), *options) == 0
    assert (run / "checkpoints" / "latest").exists()
