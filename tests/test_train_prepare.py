"""Input of loaded encoders in plain torch and PyAV: equal to the training graph's, from any file, and sensible for odd ones."""

from __future__ import annotations

import io
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from media import audio_bytes, video_bytes
from test_train_graph import wav
from train_data import LOADER, VIEW, clips, damaged, write_dataset

from cmacc.train.export import prepare as module
from cmacc.train.export.prepare import Prepare
from cmacc.train.loading.constants import FLOOR_DB, PICTURE_MEAN, PICTURE_STD
from cmacc.train.loading.graph import Graph
from cmacc.train.loading.loader import evaluation_batches
from cmacc.train.loading.sound import Sound
from cmacc.train.loading.views import ViewConfig

PREPARE = Prepare(VIEW)
RATE = VIEW.audio_rate


def decibels(mel: torch.Tensor, view: ViewConfig = VIEW) -> np.ndarray:
    return mel[:, 0].numpy() * view.mel_std_db + view.mel_mean_db


def levels(pictures: torch.Tensor) -> np.ndarray:
    """0..255, (views, 3, frames, size, size)."""
    return pictures.numpy() * PICTURE_STD + PICTURE_MEAN


@pytest.mark.parametrize("changes", [{}, {"n_fft": 512, "window": 400, "hop": 160, "n_mels": 32}, {"window": 101}], ids=str)
def test_log_mel_is_the_graphs(changes: dict[str, int]) -> None:
    view = replace(VIEW, **changes)
    t = np.arange(2 * RATE) / RATE
    noise = np.random.default_rng(0).normal(0, 0.2, len(t))
    for sound in (noise, np.sin(2000 * t) + 1e-3 * noise, 1e-3 * noise, noise[:1000], np.zeros(len(t))):
        given = sound.astype(np.float32)
        starts = [0.0, 0.25, 1.5, 1.9]
        graph = Graph(view, len(starts), "cpu", 1, pictures=False)
        expected = decibels(graph.sounds([wav(given)] * len(starts), starts), view)
        found = decibels(Prepare(view).audio(given, RATE, at=starts), view)
        above = expected > FLOOR_DB
        assert np.abs(found - expected)[above].max(initial=0) < 0.01
        assert (found[~above] < FLOOR_DB + 0.01).all()


def test_a_clip_of_a_data_set_is_the_loaders(tmp_path: Path) -> None:
    """Pictures and log-mel from the members of a clip: those that the evaluation loader makes of the same row."""
    data = write_dataset(tmp_path, clips()[:6])
    for batch in evaluation_batches(data, VIEW, LOADER, data.rows()):
        for row, video, audio in zip(batch.ids.tolist(), batch.video, batch.audio, strict=True):
            members = data.read(row)
            pictures, mel = PREPARE.video(members["mp4"]), PREPARE.audio(members["flac"])
            assert pictures.shape == (1, *video.shape) and mel.shape == (1, *audio.shape)
            assert pictures.dtype == mel.dtype == torch.float32
            assert np.abs(levels(pictures) - levels(video[None])).mean() < 0.01
            # further below, the graph's own float32 has the last word
            heard = decibels(audio[None]) > decibels(audio[None]).max() - 80
            assert np.abs(decibels(mel) - decibels(audio[None]))[heard].max() < 0.01


def test_what_is_given_may_be_path_bytes_or_arrays(tmp_path: Path) -> None:
    sound, film = audio_bytes(1, 2.0), video_bytes(1, 16)
    (tmp_path / "x.flac").write_bytes(sound)
    (tmp_path / "x.mp4").write_bytes(film)
    mel, pictures = PREPARE.audio(sound), PREPARE.video(film)
    assert torch.equal(mel, PREPARE.audio(tmp_path / "x.flac"))
    assert torch.equal(pictures, PREPARE.video(str(tmp_path / "x.mp4")))
    with av.open(io.BytesIO(sound)) as file:
        samples = np.concatenate([frame.to_ndarray()[0] for frame in file.decode(audio=0)]) / 32768
    assert (mel - PREPARE.audio(samples, RATE)).abs().max() < 1e-3
    stereo = torch.tensor(np.stack([2 * samples, 0 * samples]))
    assert (mel - PREPARE.audio(stereo, RATE)).abs().max() < 1e-3
    with av.open(io.BytesIO(film)) as file:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    for given in (frames, torch.from_numpy(frames)):
        assert np.abs(levels(PREPARE.video(given, 8.0)) - levels(pictures)).mean() < 2


def test_views_are_spread_evenly() -> None:
    sound, film = wav(np.random.default_rng(0).normal(0, 0.1, 2 * RATE)).tobytes(), video_bytes(2, 16)
    for make, given in ((PREPARE.audio, sound), (PREPARE.video, film)):
        three = make(given, views=3)
        assert torch.equal(three, make(given, at=[0.0, 0.75, 1.5]))
        assert torch.equal(three[1:2], make(given))
        assert not torch.equal(three[0], three[2])


def test_stereo_is_the_mean_of_its_channels() -> None:
    out = io.BytesIO()
    tone = (np.sin(np.arange(RATE) / 4) * 20000).astype(np.int16)
    with av.open(out, "w", format="wav") as file:
        stream = file.add_stream("pcm_s16le", rate=RATE, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.stack([tone, 0 * tone], 1).reshape(1, -1), format="s16", layout="stereo")
        frame.sample_rate = RATE
        file.mux([*stream.encode(frame), *stream.encode(None)])
    expected = PREPARE.audio(tone.astype(np.float32) / 65536, RATE)
    assert np.abs(decibels(PREPARE.audio(out.getvalue())) - decibels(expected)).max() < 0.01


@pytest.mark.parametrize("rate", [48_000, 44_100, 16_000, 4_000, 11_027])
def test_another_rate_is_heard_as_by_the_loader(rate: int) -> None:
    noise = np.random.default_rng(0).normal(0, 0.2, 2 * rate).astype(np.float32)
    starts = [0.0, 0.7, 1.8]
    cut = [Sound(noise, rate).wav(start, VIEW.view_s, VIEW.audio_rate) for start in starts]
    sounds, begins = [np.frombuffer(data, np.uint8) for data, _ in cut], [at for _, at in cut]
    graph = Graph(VIEW, 3, "cpu", 1, pictures=False)
    expected = decibels(graph.sounds(sounds, [start - at for start, at in zip(starts, begins, strict=True)]))
    found = decibels(PREPARE.audio(noise, rate, at=starts))
    heard = expected > expected.max() - 60
    assert heard.mean() > 0.3
    assert np.abs(found - expected)[heard].max() < 0.01


@pytest.mark.parametrize("rate", [44_100, 16_000, 4_000, 11_027])
def test_a_tone_is_as_loud_at_any_rate(rate: int) -> None:
    expected, found = (
        decibels(PREPARE.audio(np.sin(2 * np.pi * 1000 * np.arange(2 * r) / r), r))[0].mean(1) for r in (RATE, rate)
    )
    assert found.argmax() == expected.argmax()
    assert abs(found.max() - expected.max()) < 0.1


def film(stamps: list[int], *, greys: list[int] | None = None, marked: bool = False) -> bytes:
    """A film whose frame i begins at stamps[i] / 100 s and is of one grey; marked: its upper left quarter is white."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=100, options={"crf": "5", "bf": "0", "g": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 100)
        for i, stamp in enumerate(stamps):
            picture = np.full((48, 64, 3), (greys or range(20, 255, 10))[i % 20], np.uint8)
            if marked:
                picture[:24, :32] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 100)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()


def test_a_variable_frame_rate_by_the_clock() -> None:
    """Four instants, an eighth of a second apart: the frame on screen at each."""
    stamps = [0, 3, 6, 9, 30, 33, 60, 63]
    found = levels(PREPARE.video(film(stamps), at=[0.0]))[0, 0].mean((1, 2))
    on_screen = [max(i for i, s in enumerate(stamps) if s <= 100 * k * 0.125) for k in range(4)]
    assert np.abs(found - [20 + 10 * i for i in on_screen]).max() < 4


def test_from_the_middle_of_a_long_film() -> None:
    """Sought, not decoded from its beginning: still the right frames."""
    greys = [20 + 10 * ((i * 7) % 20) for i in range(20)]
    stamps = [25 * i for i in range(80)]  # 20 s, four frames a second
    found = levels(PREPARE.video(film(stamps, greys=greys), at=[15.0, 18.5]))[:, 0].mean((2, 3))
    for second, seen in zip((15.0, 18.5), found, strict=True):
        numbers = [int(second * 4 + k * 0.5) for k in range(4)]
        assert np.abs(seen - [greys[n % 20] for n in numbers]).max() < 4


def test_a_film_that_is_to_be_turned() -> None:
    """By a quarter, clockwise: what is upper left in the file is upper right on the screen."""
    numbers = np.array([[1, 0, 0, 0, 1], [0, 1, 0, -1, 0]]) << 16
    plain, turned = (matrix.astype(">i4").tobytes() for matrix in numbers)
    data = film([12 * i for i in range(8)], greys=[20] * 20, marked=True)
    before, _, behind = data.rpartition(plain)  # of the track; the film has one, too
    upright, after = levels(PREPARE.video(data)), levels(PREPARE.video(before + turned + behind))
    assert upright[0, 0, 0, 4, 4] > 230 and upright[0, 0, 0, 4, -4] < 40
    assert after[0, 0, 0, 4, -4] > 230 and after[0, 0, 0, 4, 4] < 40


def test_shorter_than_a_view() -> None:
    pictures = levels(PREPARE.video(film([0, 5, 25])))[0, 0].mean((1, 2))
    assert np.abs(pictures - [20, 30, 40, 40]).max() < 4
    mel = decibels(PREPARE.audio(np.ones(100, np.float32) * 0.5, RATE))
    assert (mel[..., -5:] == FLOOR_DB).all() and mel.max() > 0


HURDLES = {
    "video": {b"": "no picture", b"no media at all" * 99: "no picture", audio_bytes(): "it holds no picture"},
    "audio": {b"": "no sound", b"no media at all" * 99: "no sound", video_bytes(): "it holds no sound"},
}


@pytest.mark.parametrize("modality", HURDLES)
def test_a_file_without_it_is_one_sentence(modality: str, tmp_path: Path) -> None:
    for number, (data, sentence) in enumerate(HURDLES[modality].items()):
        path = tmp_path / f"file {number}"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=sentence) as raised:
            getattr(PREPARE, modality)(path)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)
        assert "; give a" in str(raised.value)
    with pytest.raises(FileNotFoundError):
        getattr(PREPARE, modality)(tmp_path / "nothing")


def test_a_damaged_file_is_refused_as_in_an_evaluation(tmp_path: Path) -> None:
    """Never taken in part: what `cmacc evaluate` leaves out, an exported encoder does not look at either."""
    good = video_bytes(1)
    (tmp_path / "cut.mp4").write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match=r"cut.mp4 has no picture that decodes \(.+\); give another film"):
        PREPARE.video(tmp_path / "cut.mp4")
    (tmp_path / "bad.flac").write_bytes(damaged(audio_bytes(0, 2.0)))
    with pytest.raises(ValueError, match=r"bad.flac has no sound that decodes \(.+\); give a file with sound"):
        PREPARE.audio(tmp_path / "bad.flac")


def test_of_a_long_sound_the_first_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_S", 1.0)
    sound = audio_bytes(1, 3.0)
    assert torch.equal(PREPARE.audio(sound), PREPARE.audio(sound, at=[0.25])), "the middle of what is heard of it"


def test_a_playlist_is_no_film(tmp_path: Path) -> None:
    """It could name files and addresses of its own."""
    (tmp_path / "x.mp4").write_bytes(video_bytes())
    (tmp_path / "list.txt").write_text(f"ffconcat version 1.0\nfile '{tmp_path}/x.mp4'\n")
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/x.mp4\n#EXT-X-ENDLIST\n")
    for name in ("list.txt", "list.m3u8"):
        with pytest.raises(ValueError, match="no picture"):
            PREPARE.video(tmp_path / name)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: PREPARE.audio(np.zeros(99)), "rate is None; give the waveform's samples a second"),
        (lambda: PREPARE.audio(np.zeros(99, np.int16), 8000), r"waveform is of torch.int16; give floats of -1 to 1"),
        (lambda: PREPARE.audio(np.zeros((2, 3, 4)), 8000), r"shape \(2, 3, 4\) does not fit; give \(n,\) or \(channels, n\)"),
        (lambda: PREPARE.audio(np.zeros(0), 8000), r"shape \(0,\) does not fit"),
        (lambda: PREPARE.audio(np.zeros(99), 8000, views=0), "views is 0; give 1 or more"),
        (lambda: PREPARE.video(np.zeros((4, 9, 9, 3), np.uint8)), "fps is None; give how many frames there are a second"),
        (
            lambda: PREPARE.video(np.zeros((4, 9, 9, 3)), 8.0),
            r"frames of float64 and shape \(4, 9, 9, 3\) do not fit",
        ),
        (lambda: PREPARE.video(np.zeros((4, 3, 9, 9), np.uint8), 8.0), "do not fit; give RGB as uint8"),
    ],
)
def test_arrays_that_do_not_fit(call, sentence: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=sentence):
        call()
