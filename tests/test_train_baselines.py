"""What scores are compared with: untrained encoders that are the same each time, and statistics equal to plain loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from media import audio_bytes
from train_data import LOADER, VIEW

from cmacc.train.evaluation.baselines import BANDS, colour_and_motion, log_mel_statistics, untrained, whole_sounds
from cmacc.train.evaluation.examples import Examples
from cmacc.train.evaluation.features import fingerprint
from cmacc.train.evaluation.labelled import read_labelled
from cmacc.train.loading.sound import Sound, read_sound
from cmacc.train.networks.encoders import EncoderConfig, build_encoders

SMALL = EncoderConfig("small", "small", 8, 8)


def test_an_untrained_encoder_is_the_same_each_time() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, other = untrained(SMALL, "audio", 1), untrained(SMALL, "audio", 1)
    assert torch.equal(torch.rand(3), expected), "the global generator stays as it was"
    assert fingerprint(one) == fingerprint(other) != fingerprint(untrained(SMALL, "audio", 2))
    assert not one.training and not any(p.requires_grad for p in one.parameters())
    assert list(untrained(SMALL, "video").state_dict()) == list(build_encoders(SMALL)[0].state_dict())


def test_log_mel_statistics_by_their_definition() -> None:
    """Of a sound at the very rate, by numpy from torchaudio's spectrogram."""
    rng = np.random.default_rng(0)
    sound = Sound((rng.normal(size=24_000) * np.linspace(0, 0.5, 24_000)).astype(np.float32), 16_000)
    made = log_mel_statistics(sound)
    mel = torchaudio.transforms.MelSpectrogram(16_000, 512, 400, 160, f_min=20.0, f_max=8000.0, n_mels=BANDS)
    db = 10 * np.log10(np.maximum(mel(torch.from_numpy(sound.samples)).numpy(), 1e-10))
    expected = np.concatenate([db.mean(1), db.std(1, ddof=1), db.max(1), np.diff(db, axis=1).std(1, ddof=1)])
    assert made.shape == (4 * BANDS,) and np.allclose(made, expected, atol=1e-3)
    at_other_rate = log_mel_statistics(Sound(np.zeros(3, np.float32), 44_100))
    assert np.isfinite(at_other_rate).all(), "silence and a sound shorter than a window have statistics, too"


def test_whole_sounds_are_kept_and_bad_ones_left_out(tmp_path: Path) -> None:
    for i in range(6):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"bad" if i == 3 else audio_bytes(i, 0.5 + 0.1 * i))
    labelled = read_labelled(f"folder:{tmp_path / 'data'}")
    bad = next(row for row, path in enumerate(labelled.files) if path.name == "3.flac")
    for _ in range(2):
        found, told = Examples(labelled, VIEW, LOADER), list[int]()
        made = whole_sounds(found, tmp_path / "features.zarr", told.append)
        assert np.flatnonzero(np.isnan(made).any(1)).tolist() == [bad] and set(found.left_out) == {"b/3.flac"}
        for row in set(range(6)) - {bad}:
            assert np.allclose(made[row], log_mel_statistics(read_sound(labelled.files[row])), atol=1e-3)
            assert found.facts[row][1] == pytest.approx(0.5 + 0.1 * int(labelled.files[row].stem))
        assert told[-1] == 6


def test_colour_and_motion_by_a_loop() -> None:
    torch.manual_seed(0)
    views = torch.randn(2, 3, 3, 4, 8, 8)
    describer = colour_and_motion()
    made = describer.of(views)
    assert made.shape == (2, describer.width)
    cell = views[1, :, :, :, 2:4, 4:6]  # second row, third column of a 4 x 4 grid over 8 x 8: number 6
    change = views[1].mean(1).diff(dim=1).abs()[:, :, 2:4, 4:6].mean((2, 3))  # (views, frames - 1)
    expected = [*cell.mean((2, 3, 4)).mean(0), *cell.std((2, 3, 4), unbiased=False).mean(0),
                change.mean(1).mean(), change.std(1, unbiased=False).mean(), change.amax(1).mean()]  # fmt: skip
    assert torch.allclose(made[1].view(9, 16)[:, 6], torch.stack(expected), atol=1e-5)
    still = describer.of(views[:, :, :, :1].expand(-1, -1, -1, 4, -1, -1))
    assert torch.all(still.view(2, 9, 16)[:, 6:] == 0), "what stands still has no motion"
