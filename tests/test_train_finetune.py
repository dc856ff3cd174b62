"""Fine-tuning: what can be told apart is learned, the encoder stays as it is while it should, and test files have no say."""

from __future__ import annotations

import shutil
import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from media import coded_video
from train_data import LOADER, VIEW

from cmacc.train.evaluation import finetune as module
from cmacc.train.evaluation.examples import Examples
from cmacc.train.evaluation.finetune import FinetuneConfig, choose_epochs, finetune, set_aside
from cmacc.train.evaluation.labelled import read_labelled
from cmacc.train.evaluation.tuning import Classifier, looking, one_epoch
from cmacc.train.export.trained import Trained
from cmacc.train.networks.encoders import EncoderConfig, build_encoders

QUICK = FinetuneConfig(rate_head=0.05, rate_base=5e-3, head_epochs=1, epochs=4, most_epochs=4, batch=8, views=2, frames=8)


pytestmark = pytest.mark.usefixtures("on_a_cpu")


@pytest.fixture(scope="module")
def trained() -> Trained:
    torch.manual_seed(0)
    config = EncoderConfig("small", "small", 8, 8)
    video, audio = (encoder.eval().requires_grad_(False) for encoder in build_encoders(config))
    return Trained(video, audio, config, VIEW, 1)


def write_wav(path: Path, hz: float, seed: int) -> None:
    t = np.arange(6400) / 8000
    sound = np.sin(2 * np.pi * hz * t) + 0.3 * np.random.default_rng(seed).normal(size=len(t))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes((6000 * sound).astype("<i2").tobytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 sounds of two classes: low and high."""
    folder = tmp_path_factory.mktemp("sounds")
    for name, hz in (("low", 300.0), ("high", 2000.0)):
        (folder / name).mkdir()
        for i in range(10):
            write_wav(folder / name / f"{i}.wav", hz * (1 + i / 20), i)
    return folder


@pytest.fixture
def sounds(folder: Path) -> Examples:
    return Examples(read_labelled(f"folder:{folder}"), VIEW, LOADER)


def ask(trained: Trained, sounds: Examples, config: FinetuneConfig = QUICK, **changes: Any) -> np.ndarray:
    labelled = sounds.labelled
    _, train, test = labelled.splits[0]
    given: dict[str, Any] = {"train_rows": train, "test_rows": test, "labels": labelled.labels, **changes}
    return finetune(trained, sounds, **given, config=config)


def test_what_can_be_told_apart_is_learned(trained: Trained, sounds: Examples) -> None:
    """Classes in sorted order; the encoder that was given is as before; a pure function of its arguments."""
    before = {name: t.clone() for name, t in trained.audio.state_dict().items()}
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    told: list[tuple[int, str]] = []
    labelled = sounds.labelled
    _, train, test = labelled.splits[0]
    config = replace(QUICK, epochs=8)
    found = finetune(trained, sounds, train, test, labelled.labels, config, lambda *at: told.append(at))
    assert torch.equal(torch.rand(1), drawn)
    assert found.shape == (len(test), 2) and found.dtype == np.float32
    assert np.allclose(found.sum(1), 1, atol=1e-5)
    assert (np.array(["high", "low"])[found.argmax(1)] == labelled.labels[test]).all()
    assert all(torch.equal(t, before[name]) for name, t in trained.audio.state_dict().items())
    assert [done for done, _ in told] == [*np.repeat(np.arange(8), 2), 8] and config.total == 8
    assert np.array_equal(found, ask(trained, sounds, config))
    assert not np.array_equal(found, ask(trained, sounds, replace(config, seed=1)))
    sgd = FinetuneConfig.sgd(epochs=4, batch=8, views=1)
    assert (sgd.optimiser, sgd.rate_head, sgd.rate_base, sgd.head_epochs) == ("sgd", 0.0025, 0.00025, 0)
    assert np.isfinite(ask(trained, sounds, sgd)).all()


def test_the_encoder_stays_as_it_is_in_the_first_epochs(trained: Trained, sounds: Examples) -> None:
    """Its running statistics too; then all of its backbone learns."""
    labelled, codes = sounds.labelled, sounds.labelled.codes()
    network = Classifier(trained, sounds, 2, QUICK)
    before = {name: t.clone() for name, t in network.state_dict().items()}
    for epoch in range(2):
        one_epoch(network, sounds, labelled.splits[0].train, codes, epoch, QUICK, lambda _: None)
        now = network.state_dict()
        moved = {name for name, t in now.items() if not torch.equal(t, before[name])}
        assert {name for name in moved if name.startswith("classifier.")}
        backbone = {name for name in now if name.startswith("encoder.backbone.")}
        assert moved & {name for name in now if name.startswith("encoder.")} == (backbone if epoch else set())


def test_what_is_tested_has_no_say(trained: Trained, sounds: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the epochs, nor in anything: other test labels and other test rows leave what is told of a file as it was."""
    labelled, asked = sounds.labelled, []
    test = labelled.splits[0].test
    choosing = replace(QUICK, epochs=0, most_epochs=3)

    class Spied(Examples):
        def central(self, rows: Any, *more: Any) -> Any:
            asked.append(("central", {*rows}))
            return super().central(rows, *more)

        def training(self, rows: Any, *more: Any) -> Any:
            asked.append(("training", {*rows}))
            return super().training(rows, *more)

    monkeypatch.setattr("cmacc.train.evaluation.tuning.Examples", Spied)
    found = ask(trained, sounds, choosing)
    assert not set().union(*(rows for _, rows in asked[:-1])) & {*test.tolist()}
    assert asked[-1] == ("central", {*test.tolist()})
    spoilt = labelled.labels.copy()
    spoilt[test] = spoilt[test][::-1]
    assert (spoilt != labelled.labels).any()
    assert np.array_equal(ask(trained, sounds, choosing, labels=spoilt), found)
    assert np.array_equal(ask(trained, sounds, choosing, test_rows=test[:1])[0], found[0])


def test_epochs_are_those_with_most_told_rightly(trained: Trained, sounds: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equals the least, and never so few that the encoder has learned nothing."""
    labelled = sounds.labelled
    train, codes = labelled.splits[0].train, labelled.codes()
    aside = set_aside(train, codes, labelled.folds, QUICK.seed)[1]
    right = iter([1.0, 0.5, 0.75, 0.75])

    def told(*_: Any) -> np.ndarray:
        share = next(right)
        likely = np.eye(2, dtype=np.float32)[codes[aside]]
        wrong = round(len(aside) * (1 - share))
        likely[:wrong] = 1 - likely[:wrong]
        return likely

    monkeypatch.setattr(module, "told", told)
    monkeypatch.setattr(module, "one_epoch", lambda *_: None)
    assert choose_epochs(trained, sounds, train, labelled.labels, QUICK) == 3


def test_what_is_set_aside() -> None:
    """A whole fold of the training rows; without folds, a fifth of each class."""
    rows, codes = np.arange(40), np.arange(50) % 3
    folds = np.arange(50) % 4
    learning, aside = set_aside(rows, codes, folds, 0)
    assert len(set(folds[aside])) == 1 and set(folds[aside]).isdisjoint(folds[learning])
    assert sorted([*learning, *aside]) == rows.tolist()
    learning, aside = set_aside(rows, codes, np.zeros(50, int), 0)
    assert np.bincount(codes[aside]).tolist() == [2, 2, 2]
    assert sorted([*learning, *aside]) == rows.tolist()
    assert not np.array_equal(set_aside(rows, codes, np.zeros(50, int), 1)[1], aside)
    with pytest.raises(ValueError, match=r"4 training files are too few to choose the epochs by; give the number"):
        set_aside(np.arange(4), codes, np.zeros(50, int), 0)


def test_files_that_do_not_decode_are_left_out(trained: Trained, folder: Path, tmp_path: Path) -> None:
    """Of those tested, and of those learned from: named, and the rest goes on."""

    shutil.copytree(folder, tmp_path / "some")
    labelled = read_labelled(f"folder:{tmp_path / 'some'}")
    _, train, test = labelled.splits[0]
    bad = [labelled.file_name(int(rows[0])) for rows in (train, test)]
    for name in bad:
        (tmp_path / "some" / name).write_bytes(b"RIFF, but no more")
    examples = Examples(labelled, VIEW, LOADER)
    found = finetune(trained, examples, train, test, labelled.labels, replace(QUICK, epochs=1))
    assert np.isnan(found[0]).all() and np.isfinite(found[1:]).all()
    assert sorted(examples.left_out) == sorted(bad)
    alike = [row for row in train.tolist() if labelled.labels[row] == "low"]
    with pytest.raises(ValueError, match=r"\d training files decode, and are not of two classes; fine-tuning needs"):
        finetune(trained, examples, alike, test, labelled.labels, QUICK)


def test_videos_are_seen_longer(trained: Trained, tmp_path: Path) -> None:
    """32 frames where 16 were, as dense in time; each view cut three times at test."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for i in range(5):
            (tmp_path / name / f"{i}.mp4").write_bytes(coded_video("libx264", n=12))
    examples = Examples(read_labelled(f"folder:{tmp_path}"), VIEW, LOADER)
    seen = looking(examples, VIEW, QUICK)
    assert (seen.view.frames, seen.view.view_s) == (8, 1.0)
    _, inputs = next(seen.central([0], QUICK.views, QUICK.crops))
    assert inputs.shape == (1, 2 * 3, 3, 8, 24, 24)
    _, train, test = examples.labelled.splits[0]
    found = finetune(trained, examples, train, test, examples.labelled.labels, replace(QUICK, epochs=1, views=1))
    assert found.shape == (len(test), 2) and np.isfinite(found).all()


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("optimiser", "lamb", "finetune.optimiser is 'lamb'; use adam or sgd"),
        ("rate_head", 0.0, "finetune.rate_head is 0.0; give a learning rate above 0"),
        ("rate_base", float("nan"), "finetune.rate_base is nan; give a learning rate above 0"),
        ("weight_decay", -1.0, "finetune.weight_decay is -1.0; give 0 or more"),
        ("epochs", -1, "finetune.epochs is -1; give 0 or more"),
        ("frames", 0, "finetune.frames is 0; give 1 or more"),
        ("batch", 1, "finetune.batch is 1; give 2 or more, for"),
        ("crops", 2, "finetune.crops is 2; give 1, the middle, or 3"),
        ("most_epochs", 5, "finetune.most_epochs is 5, and finetune.head_epochs 5; give more"),
        ("seed", -1, "finetune.seed is -1; give 0 or more"),
    ],
)
def test_bad_values(name: str, value: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(FinetuneConfig(), **{name: value})


def test_the_protocol_of_the_papers() -> None:
    """METHOD.md."""
    default = FinetuneConfig()
    assert (default.optimiser, default.rate_head, default.rate_base, default.head_epochs) == ("adam", 1e-4, 1e-4, 5)
    assert (default.frames, default.views, default.crops) == (32, 10, 3)
