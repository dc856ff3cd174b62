"""Frozen features: means over views, kept on a disk by all that they depend on, and never half taken for whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from media import audio_bytes
from train_data import LOADER, VIEW

from cmacc.train.evaluation import kept as module
from cmacc.train.evaluation.examples import Examples
from cmacc.train.evaluation.features import Describer, extract, fingerprint, of_encoder
from cmacc.train.evaluation.labelled import read_labelled
from cmacc.train.networks.encoders import Encoder, EncoderConfig, build_encoders

FILES = 12
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(FILES):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i:02}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(audio_bytes(i, 0.6 + 0.1 * (i % 3)))
    return tmp_path / "data"


@pytest.fixture(scope="module")
def audio() -> Encoder:
    torch.manual_seed(0)
    return build_encoders(EncoderConfig("small", "small", 8, 8))[1].eval()


class Counting:
    """A describer that counts what it is asked."""

    def __init__(self, audio: Encoder, key: str = "") -> None:
        own = of_encoder("trained", audio, 4, CPU)
        self.files = 0

        def of(views: torch.Tensor) -> torch.Tensor:
            self.files += len(views)
            return own.of(views)

        self.describer = Describer("trained", key or own.key, own.width, of)


def examples(folder: Path, view=VIEW) -> Examples:  # type: ignore[no-untyped-def]
    return Examples(read_labelled(f"folder:{folder}"), view, LOADER)


def test_features_are_means_over_views(folder: Path, audio: Encoder) -> None:
    found = extract(examples(folder), [of_encoder("trained", audio, 3, CPU)], views=2, crops=1)["trained"]
    assert found.shape == (FILES, audio.feature_width) and found.dtype == np.float32
    with torch.no_grad():
        for rows, made in examples(folder).central(range(FILES), views=2):
            for row, views in zip(rows.tolist(), made, strict=True):
                assert np.allclose(found[row], audio.features(views).mean(0), atol=1e-5)


def test_what_is_kept_is_not_computed_again(folder: Path, audio: Encoder, tmp_path: Path) -> None:
    """And what depends on anything else is."""
    cache = tmp_path / "features.zarr"

    def computed(view=VIEW, views: int = 2, key: str = "") -> int:  # type: ignore[no-untyped-def]
        counting = Counting(audio, key)
        found = examples(folder, view)
        extract(found, [counting.describer], views, 1, cache)
        assert set(found.facts) == set(range(FILES)), "rates and lengths are kept, too"
        return counting.files

    assert [computed(), computed(), computed()] == [FILES, 0, 0]
    assert [computed(views=1), computed(view=replace(VIEW, n_mels=12)), computed(key="other weights")] == [FILES] * 3
    os.utime(folder / "a" / "00.flac", ns=(1, 1))
    assert [computed(), computed()] == [FILES, 0]


def test_weights_tell_encoders_apart(audio: Encoder) -> None:
    before = fingerprint(audio)
    other = build_encoders(EncoderConfig("small", "small", 8, 8))[1]
    other.load_state_dict(audio.state_dict())
    assert fingerprint(other) == before
    with torch.no_grad():
        next(other.buffers()).add_(1e-3)
    assert fingerprint(other) != before


def test_a_kill_costs_what_came_after_the_last_whole_chunk(
    folder: Path, audio: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the third batch of four files, with chunks of three: the first two chunks are there."""
    monkeypatch.setattr(module, "_ROWS", 3)
    cache, whole = tmp_path / "features.zarr", extract(examples(folder), [Counting(audio).describer], 1, 1)["trained"]

    class Killed(BaseException):
        pass

    counting = Counting(audio)

    def of(views: torch.Tensor) -> torch.Tensor:
        if counting.files >= 8:
            raise Killed
        return counting.describer.of(views)

    with pytest.raises(Killed):
        extract(examples(folder), [replace(counting.describer, of=of)], 1, 1, cache)
    again = Counting(audio)
    assert np.array_equal(extract(examples(folder), [again.describer], 1, 1, cache)["trained"], whole)
    assert again.files == FILES - 6


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda f: f.write_bytes(f.read_bytes()[:-9] + bytes([f.read_bytes()[-9] ^ 1]) + f.read_bytes()[-8:]),
    "cut short": lambda f: f.write_bytes(f.read_bytes()[:-20]),
    "empty": lambda f: f.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_computed_again(
    folder: Path, audio: Encoder, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "features.zarr"
    whole = extract(examples(folder), [Counting(audio).describer], 1, 1, cache)["trained"]
    (chunk,) = (path for path in cache.glob("*/c/**/*") if path.is_file())
    DAMAGE[damage](chunk)
    again = Counting(audio)
    assert np.array_equal(extract(examples(folder), [again.describer], 1, 1, cache)["trained"], whole)
    assert again.files == FILES and "is damaged" in caplog.text
    (array,) = zarr.open_group(cache, mode="r").array_values()
    assert array.attrs["task"] == "folder-data" and array.attrs["views"] == 1


def test_bad_files_are_left_out_and_tried_again(folder: Path, audio: Encoder, tmp_path: Path) -> None:
    cache = tmp_path / "features.zarr"
    (folder / "a" / "02.flac").write_bytes(b"broken")
    for expected in (FILES - 1, 0):
        counting, found = Counting(audio), examples(folder)
        made = extract(found, [counting.describer], 1, 1, cache)["trained"]
        assert counting.files == expected
        assert np.flatnonzero(np.isnan(made).any(1)).tolist() == [found.labelled.files.index(folder / "a" / "02.flac")]
        assert set(found.left_out) == {"a/02.flac"}


def test_features_that_are_no_numbers_are_refused(folder: Path) -> None:
    broken = Describer("trained", "k", 2, lambda views: torch.full((len(views), 2), torch.nan))
    with pytest.raises(ValueError, match="by the trained encoder are no finite numbers; evaluate an earlier checkpoint"):
        extract(examples(folder), [broken], 1, 1)


def test_progress_counts_files(folder: Path, audio: Encoder, tmp_path: Path) -> None:
    told: list[int] = []
    extract(examples(folder), [Counting(audio).describer], 1, 1, None, told.append)
    assert told == [4, 8, 12]
