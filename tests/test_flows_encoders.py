"""The commands that use trained encoders, in this process: export, embed, search, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_flows_cli import here
from test_train_trained import save
from train_data import TINY, clips, with_members, write_dataset

from cmacc.shards.dataset import Dataset
from cmacc.train.export.trained import load_trained
from cmacc.train.model import CrossModal


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and a data set of 6 clips, whose last one does not decode."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(4)
    save(folder / "run" / "checkpoints", 3, CrossModal(TINY.encoders, TINY.objective), TINY)
    some = clips()[:6]
    write_dataset(folder / "data", [*some[:5], with_members(some[5], flac=b"bad")])
    (folder / "query.flac").write_bytes(some[1].members["flac"])
    (folder / "query.mp4").write_bytes(some[1].members["mp4"])
    return folder


@pytest.fixture(autouse=True)
def _at_home(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setenv("XDG_CACHE_HOME", str(world / "cache"))


def test_exported_embedded_searched(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert here(monkeypatch, "export", "run", "--out", "exported", "--no-programs") == 0
    said = "exported to exported: video.safetensors, audio.safetensors, encoders.json, README.md"
    assert said in capsys.readouterr().out
    assert load_trained("exported").hash == load_trained("run").hash

    assert here(monkeypatch, "embed", "exported", "data", "--batch", "4") == 0
    assert "data: columns video-exported and audio-exported" in capsys.readouterr().out

    key = str(Dataset.open("data").keys[1])
    for query in (("--audio", "query.flac"), ("--video", "query.mp4", "--model", "run"), ("--key", key, "--other-videos")):
        assert here(monkeypatch, "search", "data", *query, "--top", "3", "--page", "page.html") == 0
        out = capsys.readouterr().out
        assert "cosine" in out and "1 of 6 clips have no embedding" in out and "page: page.html" in out
        table = [line for line in out.splitlines() if line.startswith("│ ")]
        assert [line.split()[1] for line in table] == ["1", "2", "3"] and all("label" in line for line in table)
        assert (world / "page.html").read_text().count("<article") == 4
    assert key not in "".join(table)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("export", "run", "exported"), "there is no folder to export to; write: cmacc export run --out exported"),
        (("export", "run"), "write: cmacc export run --out exports/mine"),
        (("embed", "run", "nowhere"), "nowhere does not exist"),
        (("search", "data"), "give one query: --audio FILE, --video FILE or --key KEY"),
        (("search", "data", "--audio", "a", "--key", "b"), "give one query"),
        (("search", "data", "--audio", "query.flac", "--to", "taste"), "--to is 'taste'; give video or audio"),
        (("search", "data", "--audio", "query.flac", "--by", "video"), "--by is for a clip of the data set; give it with --key"),
        (("search", "data", "--audio", "query.flac", "--other-videos"), "--other-videos is for a clip of the data set"),
        (("search", "data", "--audio", "query.flac", "--top", "0"), "--top is 0; give 1 or more"),
        (("search", "data", "--audio", "none.flac"), "none.flac is no file"),
        (("search", "data", "--key", "none"), "has the key 'none'"),
        (("search", "data", "--key", "none", "--name", "x"), "has the key 'none'"),
        (("search", "data", "--audio", "query.flac", "--name", "x"), "no embeddings 'x'"),
    ],
)
def test_one_sentence_for_what_is_wrong(
    arguments: tuple[str, ...], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert here(monkeypatch, *arguments) == 1
    said = capsys.readouterr().err
    assert sentence in said and "Traceback" not in said and len(said.strip().splitlines()) == 1
