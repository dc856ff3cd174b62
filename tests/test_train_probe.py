"""The linear probe: right on what can be told apart, at chance on noise, and the test fold has no say in C."""

from __future__ import annotations

import wave
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from media import audio_bytes
from train_data import LOADER, VIEW, damaged

from cmacc.train import probe
from cmacc.train.encoders import EncoderConfig, build_encoders
from cmacc.train.probe import COSTS, linear_probe, read_labelled_sounds, sound_features
from cmacc.train.trained import Trained

CLASSES, FOLDS = ("cat", "dog", "rain"), (1, 2, 3, 4)


def labelled(each: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Labels and folds: `each` of every class in every fold."""
    labels = np.array([name for _ in FOLDS for name in CLASSES for _ in range(each)])
    return labels, np.repeat(FOLDS, each * len(CLASSES))


def test_separable_features_are_told_apart() -> None:
    """By a feature a billionth of another's size: they are standardised."""
    labels, folds = labelled()
    features = np.random.default_rng(0).normal(0, 1, (len(labels), 4))
    features[:, 0] = [1e-6 * CLASSES.index(name) for name in labels]
    features[:, 1] = [1e-6 * (CLASSES.index(name) == 1) for name in labels]
    features[:, 2] *= 1e3
    facts = linear_probe(features.astype(np.float32), labels, folds)
    assert facts == {"accuracy": 1.0, "chance": pytest.approx(1 / 3), **{f"fold_{i}": 1.0 for i in FOLDS}}


def test_noise_stays_near_chance() -> None:
    labels, folds = labelled(each=12)
    accuracies = [
        linear_probe(np.random.default_rng(s).normal(size=(len(labels), 6)).astype(np.float32), labels, folds)["accuracy"]
        for s in range(3)
    ]
    assert 0.2 < np.mean(accuracies) < 0.47


def test_the_mean_is_over_folds_of_any_size() -> None:
    """Fold 1 has one sound, of a class told wrongly; the others are told rightly."""
    labels = np.array(["b", *["a", "b"] * 9])
    folds = np.array([1, *np.repeat([2, 3, 4], 6)])
    features = np.array([[0.0], *[[0.0], [1.0]] * 9], np.float32)
    facts = linear_probe(features, labels, folds)
    assert [facts[f"fold_{i}"] for i in FOLDS] == [0, 1, 1, 1]
    assert facts["accuracy"] == 0.75
    assert facts["chance"] == pytest.approx(10 / 19)


def test_nothing_is_fitted_on_the_test_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spies on the scaler and the SVM see, for each outer fold, no row of it: neither in the search for C nor after."""
    labels, folds = labelled(each=2)
    features = np.random.default_rng(0).normal(size=(len(labels), 3)).astype(np.float32)
    features[:, 0] = np.arange(len(labels))  # a row's name
    fits: list[tuple[set[int], int]] = []

    class StandardScaler(probe.StandardScaler):  # type: ignore[misc]
        def fit(self, x: np.ndarray, y: Any = None, sample_weight: Any = None) -> Any:
            fits.append((set(x[:, 0].astype(int).tolist()), 0))
            return super().fit(x, y)

    class LinearSVC(probe.LinearSVC):  # type: ignore[misc]
        def fit(self, x: np.ndarray, y: np.ndarray, sample_weight: Any = None) -> Any:
            fits[-1] = (fits[-1][0], len(x))
            return super().fit(x, y)

    monkeypatch.setattr(probe, "StandardScaler", StandardScaler)
    monkeypatch.setattr(probe, "LinearSVC", LinearSVC)
    linear_probe(features, labels, folds)
    an_outer_fold = len(COSTS) * 3 + 1
    assert len(fits) == len(FOLDS) * an_outer_fold
    for i, fold in enumerate(FOLDS):
        mine = fits[i * an_outer_fold : (i + 1) * an_outer_fold]
        test = set(np.flatnonzero(folds == fold).tolist())
        for rows, count in mine:
            assert not rows & test
            assert len(rows) == count
        assert len(mine[-1][0]) == len(labels) - len(test)
        held = [frozenset(set(range(len(labels))) - test - rows) for rows, _ in mine[:-1]]
        assert {frozenset(np.flatnonzero(folds == f).tolist()) for f in FOLDS if f != fold} == set(held)


@pytest.mark.parametrize("folds", [[1] * 12, [1, 2] * 6])
def test_too_few_folds(folds: list[int]) -> None:
    features = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    with pytest.raises(ValueError, match=r"in [12] folds; a probe needs 3 or more"):
        linear_probe(features, np.array(["a", "b", "c"] * 4), np.array(folds))


def write_wav(path: Path, seconds: float = 1.0, hz: float = 440.0, rate: int = 8000) -> None:
    t = np.arange(round(seconds * rate)) / rate
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((8000 * np.sin(2 * np.pi * hz * t * (1 + t))).astype("<i2").tobytes())


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """Six sounds of two classes in three folds, in ESC-50's layout."""
    (tmp_path / "audio").mkdir()
    (tmp_path / "meta").mkdir()
    lines = ["filename,fold,target,category,esc10"]
    for i in range(6):
        write_wav(tmp_path / "audio" / f"{i}.wav", 0.6 + 0.1 * i, 300 + 200 * (i % 2))
        lines.append(f"{i}.wav,{i // 2 + 1},{i % 2},{('dog', 'rain')[i % 2]},True")
    (tmp_path / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_the_layout_of_esc50(sounds: Path) -> None:
    found = read_labelled_sounds(sounds)
    assert found.files == [sounds / "audio" / f"{i}.wav" for i in range(6)]
    assert found.labels.tolist() == ["dog", "rain"] * 3
    assert found.folds.tolist() == [1, 1, 2, 2, 3, 3]
    table = sounds / "meta" / "esc50.csv"
    table.write_text("filename,fold,target\n3.wav,2,14\n")
    assert read_labelled_sounds(sounds).labels.tolist() == ["14"]


def lines(act: Callable[[list[str]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        table = folder / "meta" / "esc50.csv"
        rows = table.read_text().splitlines()
        act(rows)
        table.write_text("\n".join(rows) + "\n")

    return edit


LAYOUTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no table": (lambda f: (f / "meta" / "esc50.csv").unlink(), "has 0 CSV files in meta/; a folder"),
    "two tables": (lambda f: (f / "meta" / "b.csv").write_text("x"), "has 2 CSV files in meta/; a folder"),
    "empty table": (lines(lambda rows: rows.clear()), "lacks the columns filename, fold and category; take"),
    "no rows": (lines(lambda rows: rows.__delitem__(slice(1, None))), "lacks the columns filename, fold and category; take"),
    "no label": (lines(lambda rows: rows.__setitem__(slice(None), ["filename,fold", "1.wav,2"])), "lacks the columns"),
    "not text": (
        lambda f: (f / "meta" / "esc50.csv").write_bytes(b"filename,fold,category\n\xff\xfe,1,a\n"),
        "is not a CSV file in UTF-8 .*; save it",
    ),
    "a missing file": (lambda f: (f / "audio" / "3.wav").unlink(), "names '3.wav', which is not in .*; copy it there"),
    "a file elsewhere": (lines(lambda rows: rows.append("../meta/esc50.csv,1,0,dog,True")), "names '../meta/esc50.csv', which"),
    "a short row": (lines(lambda rows: rows.append("1.wav")), "in row 7; fill it in"),
    "an empty row": (lines(lambda rows: rows.append(",,,,")), "in row 7; fill it in"),
    "a fold that is no number": (lines(lambda rows: rows.append("1.wav,one,0,dog,True")), "in row 7; fill it in"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_another_layout_is_one_sentence(sounds: Path, case: str) -> None:
    act, sentence = LAYOUTS[case]
    act(sounds)
    with pytest.raises(ValueError, match=sentence) as raised:
        read_labelled_sounds(sounds)
    assert type(raised.value) is ValueError
    assert str(raised.value).startswith(str(sounds))
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def trained() -> Trained:
    torch.manual_seed(0)
    config = EncoderConfig("small", "small", 8, 8)
    video, audio = (encoder.eval().requires_grad_(False) for encoder in build_encoders(config))
    return Trained(video, audio, config, VIEW, 1)


def test_features_are_means_over_views(sounds: Path, trained: Trained) -> None:
    """One view of each place, whatever the batch; the mean of a sound's views, first to last."""
    files = read_labelled_sounds(sounds).files
    both = sound_features(trained, files, LOADER, views=2)
    assert both.shape == (6, trained.audio.feature_width)
    assert both.dtype == np.float32
    assert np.allclose(both, sound_features(trained, files, replace(LOADER, batch=1), views=2), atol=1e-5)
    first = sound_features(trained, files, LOADER, views=1)
    for i, path in enumerate(files):  # the last view of a sound is the first one of the sound cut short
        with wave.open(str(path)) as file:
            data = file.readframes(file.getnframes())
        seconds = len(data) / 2 / 8000
        span = VIEW.span_s(100.0)
        cut = path.with_name(f"cut-{i}.wav")
        with wave.open(str(cut), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(data[2 * round((seconds - span) * 8000) :])
        (last,) = sound_features(trained, [cut], LOADER, views=1)
        assert np.allclose(both[i], (first[i] + last) / 2, atol=1e-4)
        assert np.abs(first[i] - last).max() > 1e-3


def test_probing_a_folder(sounds: Path, trained: Trained) -> None:
    found = read_labelled_sounds(sounds)
    facts = linear_probe(sound_features(trained, found.files, LOADER), found.labels, found.folds)
    assert set(facts) == {"accuracy", "chance", "fold_1", "fold_2", "fold_3"}


@pytest.mark.parametrize("data", [b"", b"no sound", bytes(300)])
def test_a_sound_that_does_not_decode_is_named(sounds: Path, trained: Trained, data: bytes) -> None:
    (sounds / "audio" / "4.wav").write_bytes(data)
    with pytest.raises(ValueError, match=r"4\.wav does not decode \(.+\); take it out"):
        sound_features(trained, read_labelled_sounds(sounds).files, LOADER)


def test_a_sound_that_ffmpeg_forgives_is_named(sounds: Path, trained: Trained) -> None:
    """A FLAC with damage near its end: FFmpeg decodes it, DALI does not."""
    (sounds / "audio" / "4.wav").write_bytes(damaged(audio_bytes(0, 2.0)))
    with pytest.raises(ValueError, match=r"4\.wav does not decode \(.+\); take it out"):
        sound_features(trained, read_labelled_sounds(sounds).files, LOADER)
