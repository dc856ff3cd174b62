"""Sounds of any rate: what lies above half of the new rate is gone, what lies below is as it was, at its instant."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
from media import audio_bytes, make_clip, tiny_profile
from numpy.typing import NDArray
from train_data import LOADER, VIEW, with_members, write_dataset

from cmacc.train.loading.loader import evaluation_batches
from cmacc.train.loading.sound import UNREADABLE, Sound, read_sound, resampled, to_wav

RATES = [48_000, 44_100, 22_050, 11_027, 8_000]


def tone(hertz: float, rate: int, seconds: float = 1.0) -> NDArray[np.float32]:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.mark.parametrize("rate", RATES)
def test_what_fits_stays_and_the_rest_goes(rate: int) -> None:
    middle = slice(1_000, -1_000)
    found = resampled(tone(700, rate), rate, 16_000)
    assert np.abs(found - tone(700, 16_000)[: len(found)])[middle].max() < 0.005
    if rate > 32_000:  # 13 kHz would come in at 3
        assert np.abs(resampled(tone(13_000, rate), rate, 16_000)[middle]).max() < 0.005


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("start", [0.0, 0.3, 0.8])
def test_a_part_is_that_of_the_whole(rate: int, start: float) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, 2 * rate).astype(np.float32)
    data, at = Sound(samples, rate).wav(start, 0.5, 16_000)
    whole, part = resampled(samples, rate, 16_000), read_sound(data)
    assert part.rate == 16_000
    first, skip = round(start * 16_000), round((start - at) * 16_000)
    assert abs((start - at) * 16_000 - skip) < 1e-3 or start * 16_000 % 1
    np.testing.assert_allclose(part.samples[skip : skip + 8_000], whole[first : first + 8_000], atol=2e-3)


def opus(samples: NDArray[np.float32]) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="ogg") as file:
        stream = file.add_stream("libopus", rate=48_000, layout="mono", format="flt")
        stream.bit_rate = 128_000
        for at in range(0, len(samples), 960):
            frame = av.AudioFrame.from_ndarray(samples[None, at : at + 960], format="flt", layout="mono")
            frame.sample_rate, frame.pts = 48_000, at
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()


def test_the_loader_hears_no_alias(tmp_path: Path) -> None:
    """A tone far above half of the view's rate in clips of Opus, which are always of 48 kHz: next to silence."""
    profile = tiny_profile(audio_codec="opus", audio_rate=48_000)
    tones = [opus(tone(hertz, 48_000)) for hertz in (1_000, 5_000)]
    clips = [with_members(make_clip(i, audio="opus"), opus=sound) for i, sound in enumerate(tones)]
    dataset = write_dataset(tmp_path / "data", clips, profile)
    (batch,) = evaluation_batches(dataset, VIEW, LOADER, dataset.rows())
    low, high = batch.audio[:, 0].amax(1).mean(1) * VIEW.mel_std_db
    assert low - high > 40, "dB between a tone that fits and one above 4 kHz"


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_the_mean_of_any_number_of_channels(channels: int) -> None:
    """AAC decodes to planes."""
    weights = np.arange(1, channels + 1) / channels
    samples = (weights[:, None] * tone(500, 48_000)).astype(np.float32)
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[channels]
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as file:
        stream = file.add_stream("aac", rate=48_000, layout=layout)
        stream.bit_rate = 128_000 * channels
        for at in range(0, samples.shape[1] - 1024, 1024):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[:, at : at + 1024]), format="fltp", layout=layout)
            frame.sample_rate, frame.pts = 48_000, at
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    found = read_sound(out.getvalue()).samples[8_000:40_000]
    kept = weights.mean() if channels < 6 else weights[np.arange(channels) != 3].sum() / channels  # 3 is for low notes alone
    assert np.sqrt(2 * np.square(found).mean()) == pytest.approx(0.5 * kept, rel=0.06)


@pytest.mark.parametrize("bad", [b"", b"no sound", audio_bytes()[:100], to_wav(np.zeros(0, np.float32), 8_000)])
def test_no_sound_is_an_error_that_its_readers_know(bad: bytes) -> None:
    with pytest.raises(UNREADABLE):
        read_sound(bad)
