"""The DALI graph against PIL and torchaudio, and the sound against the picture in time."""

from __future__ import annotations

import gc
import io
import struct
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
import torchaudio
from media import audio_bytes
from scipy.ndimage import gaussian_filter
from train_data import VIEW, damaged

from cmacc.train.loading.graph import FLOOR_DB, PICTURE_MEAN, PICTURE_STD, Graph
from cmacc.train.loading.views import View, ViewConfig

FPS, RATE = 8.0, VIEW.audio_rate
PLAIN = replace(VIEW, jitter=0.0, grey=0.0, flip=0.0, gain_db=0.0)
SILENCE = np.frombuffer(audio_bytes(), np.uint8)
SAMPLES = round(VIEW.view_s * RATE)


def wav(sound: np.ndarray, rate: int = RATE) -> np.ndarray:
    """A mono float32 WAV, as uint8 (n,)."""
    data = sound.astype("<f4").tobytes()
    head = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(data), b"WAVE", b"fmt ", 16, 3, 1, rate, 4 * rate, 4, 32, b"data", len(data)
    )
    return np.frombuffer(head + data, np.uint8)


def pictures(width: int, height: int, frames: int = VIEW.frames) -> np.ndarray:
    """Noise over ramps that move, uint8 (frames, height, width, 3)."""
    rng = np.random.default_rng([width, height])
    x, y = np.arange(width)[None, :, None], np.arange(height)[:, None, None]
    return np.stack(
        [
            (100 + 80 * np.sin(x / 7 + i + np.arange(3)) + 40 * np.cos(y / 5) + rng.integers(-30, 30, (height, width, 3))).clip(
                0, 255
            )
            for i in range(frames)
        ]
    ).astype(np.uint8)


def seen(video: list[np.ndarray], views: list[View], config: ViewConfig = PLAIN) -> np.ndarray:
    """What the graph makes of finished frames, in 0..255, (B, 3, frames, size, size)."""
    made, _ = Graph(config, len(video), "cpu", 1).run(video, [SILENCE] * len(video), views)
    assert made.dtype == torch.float32
    assert made.shape == (len(video), 3, config.frames, config.size, config.size)
    return made.numpy() * PICTURE_STD + PICTURE_MEAN


@pytest.mark.parametrize("size", [24, 56])
def test_a_plain_view_is_the_frames(size: int) -> None:
    config = replace(PLAIN, size=size)
    video = [pictures(size, size), 255 - pictures(size, size)]
    found = seen(video, [at(), at()], config)
    assert np.abs(found - np.stack(video).transpose(0, 4, 1, 2, 3)).max() < 1e-3


def jittered(picture: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """The three, one after the other, in float64; (F, H, W, 3)."""
    x = brightness * picture.astype(np.float64)
    x = 128 + contrast * (x - 128)
    grey = x @ [0.299, 0.587, 0.114]
    return grey[..., None] + saturation * (x - grey[..., None])


@pytest.mark.parametrize("brightness", [1.0, 0.7, 1.3])
@pytest.mark.parametrize("contrast", [1.0, 0.6, 1.4])
@pytest.mark.parametrize("saturation", [1.0, 0.0, 0.7, 1.3])
def test_colours_by_their_formulas(brightness: float, contrast: float, saturation: float) -> None:
    """Within one step of the byte that grey is rounded to."""
    video = pictures(24, 24)
    view = replace(at(), brightness=brightness, contrast=contrast, saturation=saturation)
    found = seen([video], [view])[0]
    assert np.abs(found - jittered(video, brightness, contrast, saturation).transpose(3, 0, 1, 2)).max() < 1
    if not saturation:
        assert np.abs(found[0] - found[2]).max() < 1e-3


def test_each_clip_by_itself() -> None:
    """Mirrored, blurred, coloured: what is done to one leaves its neighbours in the batch as they were."""
    config, video = replace(PLAIN, blur=0.5, blur_sigma=2.0), pictures(24, 24)
    views = [at(), replace(at(), mirror=True), replace(at(), blur_sigma=1.5), replace(at(), brightness=0.5), at()]
    same, mirrored, blurred, dark, again = seen([video] * 5, views, config)
    assert np.array_equal(same, again)
    assert np.array_equal(mirrored, same[..., ::-1])
    assert np.abs(mirrored - same).mean() > 10
    assert np.abs(dark - same / 2).max() < 1e-3
    for frame, expected in zip(blurred.transpose(1, 2, 3, 0), video, strict=True):
        smooth = np.stack([gaussian_filter(expected[..., c].astype(float), 1.5, mode="mirror", truncate=4) for c in range(3)], -1)
        assert np.abs(frame - smooth).mean() < 1


def test_the_same_for_all_frames() -> None:
    """A still clip stays still, whatever is done to it: augmentation does not change from frame to frame."""
    config = replace(PLAIN, blur=1.0)
    still = np.repeat(pictures(24, 24, 1), VIEW.frames, 0)
    view = replace(at(), mirror=True, brightness=1.2, contrast=0.7, saturation=0.4, blur_sigma=1.0)
    (found,) = seen([still], [view], config)
    assert np.ptp(found, axis=1).max() == 0
    assert found.std() > 10


def heard(sounds: list[np.ndarray], views: list[View], config: ViewConfig = PLAIN) -> np.ndarray:
    """Log-mel in dB, (B, bands, steps)."""
    _, made = Graph(config, len(sounds), "cpu", 1).run([pictures(24, 24)] * len(sounds), sounds, views)
    assert made.dtype == torch.float32
    assert made.shape == (len(sounds), 1, config.n_mels, config.mel_steps)
    return made[:, 0].numpy() * config.mel_std_db + config.mel_mean_db


def torchaudio_db(sound: np.ndarray, config: ViewConfig = PLAIN) -> np.ndarray:
    mel = torchaudio.transforms.MelSpectrogram(
        config.audio_rate, config.n_fft, config.window, config.hop, config.mel_low_hz, config.mel_high_hz, n_mels=config.n_mels,
        power=2, norm=None, mel_scale="htk",
    )  # fmt: skip
    power = mel.double()(torch.from_numpy(np.asarray(sound, np.float64)))
    return 10 * np.log10(power.numpy().clip(10 ** (FLOOR_DB / 10)))


def at(start_frame: int = 0, gain: float = 1.0) -> View:
    return View(start_frame, (0, 0, 2, 2), start_frame / FPS, gain=gain)


@pytest.mark.parametrize(
    "n_fft, window, hop, n_mels",
    [(256, 256, 128, 16), (400, 400, 160, 40), (512, 400, 160, 32), (512, 401, 100, 32), (512, 512, 100, 32)],
)
def test_log_mel_is_torchaudios(n_fft: int, window: int, hop: int, n_mels: int) -> None:
    """Noise, a tone, a chord, a quiet sound: within a hundredth of a decibel wherever there is anything to hear."""
    config = replace(PLAIN, n_fft=n_fft, window=window, hop=hop, n_mels=n_mels)
    t = np.arange(SAMPLES) / RATE
    noise = np.random.default_rng(0).normal(0, 0.2, SAMPLES)
    tone = 0.5 * np.sin(2 * np.pi * 440 * t)
    chord = tone + 0.3 * np.sin(2 * np.pi * 1234.5 * t) + 0.01 * noise
    sounds = [s.astype(np.float32) for s in (noise, tone + 1e-3 * noise, chord, 1e-3 * chord)]
    for found, sound in zip(heard([wav(s) for s in sounds], [at()] * 4, config), sounds, strict=True):
        expected = torchaudio_db(sound, config)
        assert (expected > FLOOR_DB).mean() > 0.9
        assert np.abs(found - expected).max() < 0.01


def test_silence_is_the_floor_and_gain_is_decibels() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, SAMPLES).astype(np.float32)
    quiet, plain, loud = heard([wav(0 * noise), wav(noise), wav(noise)], [at(), at(), at(gain=10 ** (6 / 20))])
    assert np.allclose(quiet, FLOOR_DB, atol=1e-4)
    assert np.allclose(loud - plain, 6, atol=1e-3)


@pytest.mark.parametrize("rate", [8_000, 16_000, 48_000])
@pytest.mark.parametrize("start_frame", [0, 1, 5])
def test_the_sound_begins_with_the_first_frame(start_frame: int, rate: int) -> None:
    """A click at 0.8 s, whatever the file's rate: in the column of that instant, counted from the first frame's."""
    sound = np.zeros(2 * rate)
    click = round(0.8 * rate)
    sound[click : click + rate // 2000] = 0.9
    found = heard([wav(sound, rate)], [at(start_frame)])[0].max(0)
    column = (0.8 - start_frame / FPS) * RATE / PLAIN.hop
    inside = 0 <= column < PLAIN.mel_steps
    assert inside == (start_frame == 5)
    if inside:
        assert abs(int(found.argmax()) - column) <= 1
    else:
        assert found.max() < -60


def test_a_shifted_view_is_the_shifted_sound() -> None:
    noise = np.random.default_rng(1).normal(0, 0.1, 2 * RATE).astype(np.float32)
    found = heard([wav(noise)] * 2, [at(3), at(4)])
    for start, one in zip((3, 4), found, strict=True):
        first = round(start / FPS * RATE)
        assert np.abs(one - torchaudio_db(noise[first : first + SAMPLES])).max() < 0.01


def test_past_its_end_a_sound_is_silent() -> None:
    sound = np.random.default_rng(2).normal(0, 0.1, SAMPLES // 2).astype(np.float32)
    (found,) = heard([wav(sound)], [at()])
    assert np.abs(found - torchaudio_db(np.concatenate([sound, np.zeros(SAMPLES - len(sound))]))).max() < 0.01
    assert np.allclose(found[:, -4:], FLOOR_DB, atol=1e-4)


@pytest.mark.parametrize("codec", ["flac", "opus"])
def test_both_sound_codecs(codec: str) -> None:
    """A tone of 220 Hz: the loudest band is the one that holds it."""
    (found,) = heard([np.frombuffer(audio_bytes(0, codec=codec), np.uint8)], [at()])
    t = np.arange(SAMPLES) / RATE
    assert found.mean(1).argmax() == torchaudio_db(0.25 * np.sin(2 * np.pi * 220 * t)).mean(1).argmax()


def test_masks_hide_their_bands_and_steps() -> None:
    config = replace(PLAIN, masks=1, mask_bands=4, mask_steps=6)
    noise = np.random.default_rng(0).normal(0, 0.1, SAMPLES).astype(np.float32)
    masked = replace(at(), masks=((3, 0, 4, PLAIN.mel_steps), (0, 10, PLAIN.n_mels, 6)))
    none = replace(at(), masks=((0, 0, 0, 0), (0, 0, 0, 0)))
    hidden, whole = heard([wav(noise)] * 2, [masked, none], config)
    assert np.array_equal(whole, heard([wav(noise)], [at()])[0])
    there = np.ones(whole.shape, bool)
    there[3:7], there[:, 10:16] = False, False
    assert np.array_equal(hidden[there], whole[there])
    assert np.allclose(hidden[~there], PLAIN.mel_mean_db)


def test_a_cut_sound_is_heard_at_its_instant() -> None:
    """Bytes that begin later in the clip: the same log-mel as of the whole."""
    noise = np.random.default_rng(4).normal(0, 0.1, 2 * RATE).astype(np.float32)
    whole = heard([wav(noise)], [at(6)])
    graph = Graph(PLAIN, 1, "cpu", 1)
    _, cut = graph.run([pictures(24, 24)], [wav(noise[4000:])], [at(6)], cut=[4000 / RATE])
    assert np.array_equal(cut[:, 0].numpy() * PLAIN.mel_std_db + PLAIN.mel_mean_db, whole)


def test_sounds_alone() -> None:
    """A graph without pictures makes the same log-mel, from any second on; a batch may be smaller than it was built for."""
    noise = np.random.default_rng(3).normal(0, 0.1, 2 * RATE).astype(np.float32)
    alone = Graph(PLAIN, 3, "cpu", 1, pictures=False)
    both = heard([wav(noise)] * 2, [at(2), at(6)])
    for _ in range(2):
        found = alone.sounds([wav(noise)] * 2, [2 / FPS, 6 / FPS])[:, 0].numpy() * PLAIN.mel_std_db + PLAIN.mel_mean_db
        assert np.array_equal(found, both)


def test_a_batch_stays_as_it_was_when_the_next_is_made() -> None:
    """Memory is used again, but none that somebody holds, be it a part of a batch."""
    graph = Graph(PLAIN, 1, "cpu", 1)
    first = graph.run([pictures(24, 24)], [SILENCE], [at()])
    copies = [t.clone() for t in first]
    part, copy = first[0][0, 1], first[0][0, 1].clone()
    other = [255 - pictures(24, 24)], [wav(np.zeros(SAMPLES))], [at()]
    seen = {graph.run(*other)[0].data_ptr() for _ in range(5)}
    assert len(seen) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))
    del first
    gc.collect()
    held = [graph.run(*other)[0] for _ in range(5)]
    assert len({t.data_ptr() for t in held}) == 5
    assert torch.equal(part, copy)
    del graph
    gc.collect()
    assert torch.equal(part, copy)


@pytest.mark.parametrize("bad", [b"no sound at all", audio_bytes()[:100], bytes(1000)])
def test_what_does_not_decode_is_a_runtime_error(bad: bytes) -> None:
    graph = Graph(PLAIN, 2, "cpu", 1)
    with pytest.raises(RuntimeError):
        graph.run([pictures(24, 24)] * 2, [SILENCE, np.frombuffer(bad, np.uint8)], [at()] * 2)


def test_the_culprit_is_named() -> None:
    """Also where FFmpeg decodes without a word; None where each clip does well by itself."""
    bad = damaged(audio_bytes(0))
    with av.open(io.BytesIO(bad)) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) > 0
    sounds = [SILENCE, np.frombuffer(bad, np.uint8), np.frombuffer(b"no sound", np.uint8)]
    graph = Graph(PLAIN, 3, "cpu", 1)
    with pytest.raises(RuntimeError):
        graph.run([pictures(24, 24)] * 3, sounds, [at()] * 3)
    place, reason = graph.culprit([pictures(24, 24)] * 3, sounds, [at()] * 3) or (-1, "")
    assert place == 1
    assert "Error decoding" in reason
    assert "\n" not in reason
    alone = Graph(PLAIN, 3, "cpu", 1, pictures=False)
    assert (alone.culprit([], sounds[::-1], [at()] * 3) or (-1, ""))[0] == 0
    assert alone.culprit([], [SILENCE] * 3, [at()] * 3) is None
