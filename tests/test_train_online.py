"""Looking at held-out clips while a run trains: when, what is found, and that nothing is learned from it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_data import EVAL_CLIPS, TINY, TRAIN_CLIPS, clips, unit, write_dataset

from cmacc.shards.dataset import Dataset
from cmacc.train.config import change
from cmacc.train.evaluation.neighbours import leave_one_out
from cmacc.train.evaluation.online import Online, nearest
from cmacc.train.evaluation.retrieval import Embedded, embed, embed_part
from cmacc.train.export.trained import load_trained
from cmacc.train.pretrain import pretrain
from cmacc.train.running.checkpoint import find_checkpoint, load, under

KNN = [f"held_out/knn_{kind}{name}" for kind in ("", "features_") for name in ("video", "audio", "both")]
SHORT = change(TINY, {"steps": 7, "eval_every": 3, "checkpoint.steps": 7})


pytestmark = pytest.mark.usefixtures("on_a_cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("online") / "data", clips())


@pytest.fixture(scope="module")
def run(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("online") / "run"
    pretrain(data.url, run, SHORT)
    return run


def looks(run: Path) -> dict[int, dict[str, Any]]:
    """What the log has of the held-out clips, by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "held_out/R@1" in line}


def test_every_look_has_every_number(run: Path) -> None:
    found = looks(run)
    assert list(found) == [0, 3, 6, 7]
    assert all(0 <= line[name] <= 1 for line in found.values() for name in (*KNN, "held_out/R@50", "held_out/chance_knn"))


def test_the_numbers_are_those_of_the_saved_encoders(data: Dataset, run: Path) -> None:
    trained, rows = load_trained(run), np.arange(TRAIN_CLIPS, TRAIN_CLIPS + EVAL_CLIPS)
    found = embed_part(data, rows, SHORT.view, SHORT.loader, trained.video, trained.audio, features=True)
    assert found is not None and found.features_audio is not None and found.sources is not None
    assert found.features_audio.shape == (EVAL_CLIPS, trained.audio.feature_width)
    labels = found.labels.numpy()
    assert looks(run)[7]["held_out/knn_video"] == np.mean(leave_one_out(found.video, labels, found.sources) == labels)
    right = leave_one_out(found.features_audio, labels, found.sources) == labels
    assert looks(run)[7]["held_out/knn_features_audio"] == np.mean(right)
    plain = embed(data, rows, SHORT.view, SHORT.loader, trained.video, trained.audio)
    assert torch.equal(plain.video, found.video) and plain.features_video is None


def test_neither_looking_nor_labels_change_what_is_learned(run: Path, tmp_path: Path) -> None:
    """After each step, by the clock, at the same clips without labels: the same weights, dictionaries and pools bit for bit."""
    unlabelled = [dataclasses.replace(c, facts=dataclasses.replace(c.facts, labels=())) for c in clips()]
    config = change(SHORT, {"eval_every": 0, "eval_minutes": 1e-9})
    pretrain(write_dataset(tmp_path / "data", unlabelled).url, tmp_path / "run", config)
    found = looks(tmp_path / "run")
    assert list(found) == list(range(8))
    assert not [name for line in found.values() for name in line if "knn" in name or "class" in name]
    ours, theirs = (under("model", load(find_checkpoint(folder)).tensors) for folder in (tmp_path / "run", run))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        shown = slice(None, -1) if name.endswith(".keys") else ...  # the slot for dropped entries
        assert name.endswith(".labels") or torch.equal(tensor[shown], theirs[name][shown]), name


def test_when_it_looks(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("cmacc.train.evaluation.online.time.monotonic", lambda: now)
    both = Online(data, change(TINY, {"eval_every": 5, "eval_minutes": 2}))
    assert [step for step in range(13) if both.by_step(step)] == [0, 5, 10, 12]
    assert [both.by_clock(100 + s) for s in (0, 119, 120, 500)] == [False, False, True, True]
    now = 500.0
    both.looked()
    assert not both.by_clock(619) and both.by_clock(620)
    never = Online(data, change(TINY, {"eval_every": 0}))
    assert [step for step in range(13) if never.by_step(step)] == [0, 12]
    assert not never.by_clock(1e9)
    alone = Online(data, change(TINY, {"eval_clips": 1, "eval_minutes": 1}))
    assert not alone.possible and not alone.by_clock(1e9)


def test_what_cannot_be_told(data: Dataset) -> None:
    """One class, one video, no label: no number. Clips without a label are left out, those of the same video do not vote."""

    def of(labels: list[int], sources: list[int] | None = None) -> dict[str, float]:
        x, ids = unit(6, 8), torch.arange(6)
        return nearest(Embedded(x, x, ids, torch.tensor(labels), None if sources is None else torch.tensor(sources)))

    assert of([-1] * 6) == of([3] * 6) == of([0, 1, 0, 1, 0, 1], [9] * 6) == {}
    assert of([0, 0, 0, 1, -1, -1])["chance_knn"] == 0.75
    x = torch.eye(8)[[0, 0, 1, 1, 0, 1]]
    twins = Embedded(x, x, torch.arange(6), torch.tensor([0, 0, 1, 1, 1, 0]), torch.tensor([0, 0, 1, 1, 2, 2]))
    assert nearest(twins)["knn_video"] == 0


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("eval_every", -1, "eval_every is -1; give a number of steps, or 0"),
        ("eval_minutes", -0.5, "eval_minutes is -0.5; give minutes above 0, or 0"),
        ("eval_minutes", "inf", "eval_minutes is inf; give minutes above 0, or 0"),
    ],
)
def test_a_wrong_option_is_named(name: str, value: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        change(TINY, {name: value})
