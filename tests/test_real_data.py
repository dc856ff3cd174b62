"""Real recordings, where the folder that holds them is there: every file ends as a clip or as a row with a named cause."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cmacc.flows.ingest import ingest
from cmacc.ingest import Cause, Ledger
from cmacc.ingest.world import serve
from cmacc.shards.dataset import Dataset
from cmacc.shards.lint import lint
from cmacc.train.encoders import EncoderConfig, build_encoders
from cmacc.train.loader import LoaderConfig, evaluation_batches
from cmacc.train.probe import linear_probe, read_labelled_sounds, sound_features
from cmacc.train.trained import Trained
from cmacc.train.views import ViewConfig

SMALL = {"short_side": 64, "fps": 10, "gop": 10, "workers": 2, "timeout_s": 120.0}
MEDIA_ALONE = ("labels.csv",)


def outcomes(home: Path) -> dict[str, tuple[str, str]]:
    """Name of each source file: (state, cause)."""
    with Ledger(home / "ingest" / "ledger.sqlite") as ledger:
        return {Path(str(row["address"])).name: (str(row["state"]), str(row["cause"])) for row in ledger.rows()}


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file() and path.name not in MEDIA_ALONE}


def batches(home: Path) -> Iterator[torch.Tensor]:
    dataset = Dataset.open(home)
    for batch in evaluation_batches(dataset, ViewConfig(frames=4, view_s=0.4, size=32), LoaderConfig(batch=8), dataset.rows()):
        assert torch.isfinite(batch.video).all()
        assert torch.isfinite(batch.audio).all()
        yield batch.ids


def test_every_good_recording_becomes_a_clip(real_data: Path, tmp_path: Path) -> None:
    counts = ingest.fn([str(real_data / "clips")], str(tmp_path / "data"), **SMALL)
    assert counts["rows"] == counts["done"] == len(files(real_data / "clips")), outcomes(tmp_path / "data")
    assert not lint(tmp_path / "data")
    assert len(torch.cat(list(batches(tmp_path / "data")))) == counts["done"]


def test_every_odd_file_ends_as_a_clip_or_with_a_cause(real_data: Path, tmp_path: Path) -> None:
    counts = ingest.fn([str(real_data / "odd")], str(tmp_path / "data"), **SMALL)
    found = outcomes(tmp_path / "data")
    assert set(found) == files(real_data / "odd")
    assert counts["done"] + counts["failed"] == counts["rows"] == len(found)
    assert {cause for state, cause in found.values() if state == "failed"} <= set(Cause) - {Cause.CRASH, Cause.TIMEOUT}
    assert counts["done"] > 0
    assert not lint(tmp_path / "data")
    assert len(torch.cat(list(batches(tmp_path / "data")))) == counts["done"]


def test_the_same_over_http(real_data: Path, tmp_path: Path) -> None:
    """Through yt-dlp's generic extractor: the files that have the plain endings of the web."""
    names = sorted(name for name in files(real_data / "clips") if name.endswith(".mp4"))[:6]
    names += sorted(name for name in files(real_data / "odd") if name.endswith((".webm", ".mp4")))[:6]
    links = tmp_path / "served"
    links.mkdir()
    for name in names:
        here = next(path for folder in ("clips", "odd") if (path := real_data / folder / name).exists())
        (links / name).write_bytes(here.read_bytes())
    local, remote = tmp_path / "local", tmp_path / "remote"
    with contextlib.suppress(ValueError):
        ingest.fn([str(links)], str(local), **SMALL)
    with serve(links) as url:
        table = tmp_path / "list.csv"
        table.write_text("url\n" + "".join(f"{url}/{name}\n" for name in names))
        ingest.fn([str(table)], str(remote), allow_private=True, **SMALL)
    assert outcomes(remote) == outcomes(local)


def test_talker_with_labels(real_data: Path, tmp_path: Path) -> None:
    ingest.fn([str(real_data / "grid")], str(tmp_path / "data"), label_column="digit", **SMALL)
    dataset = Dataset.open(tmp_path / "data")
    assert len(dataset) == 120
    assert len({labels for labels in dataset.catalog.labels() if labels}) == 10
    assert np.abs(dataset.catalog.column("duration_s") - 3).max() < 0.2
    assert not lint(tmp_path / "data")


def test_linear_probe_on_environmental_sounds(real_data: Path) -> None:
    """Features of an audio encoder that was never trained already beat chance; the protocol runs over all five folds."""
    torch.manual_seed(0)
    config = EncoderConfig("small", "small", 32, 32)
    video, audio = build_encoders(config)
    trained = Trained(video.eval(), audio.eval(), config, ViewConfig(n_mels=48, hop=320, n_fft=512), 0)
    sounds = read_labelled_sounds(real_data / "esc10")
    scores = linear_probe(sound_features(trained, sounds.files, LoaderConfig(batch=40), views=2), sounds.labels, sounds.folds)
    assert len(sounds.files) == 400
    assert scores["chance"] == pytest.approx(0.1)
    assert {f"fold_{i}" for i in range(1, 6)} < set(scores)
    assert scores["accuracy"] > 0.3
