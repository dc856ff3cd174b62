"""Files of any codec, rate and length as an encoder's input: what the training graph makes of the same sound or picture."""

from __future__ import annotations

import io
import threading
import wave
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from media import audio_bytes, coded_video, video_bytes
from train_data import LOADER, VIEW, damaged

from cmacc.train.evaluation.examples import Examples, ahead
from cmacc.train.evaluation.labelled import read_labelled
from cmacc.train.loading.film import look_at
from cmacc.train.loading.frames import decode_frames
from cmacc.train.loading.graph import PICTURE_MEAN, PICTURE_STD, Graph
from cmacc.train.loading.sound import read_sound, resampled, to_wav
from cmacc.train.loading.views import ClipShape, central_view, training_views


def examples(folder: Path, files: dict[str, bytes], **changes: object) -> Examples:
    """Of a folder of two classes with these files in the first."""
    ending = next(iter(files)).rpartition(".")[2]
    other = next(iter(files.values()))
    for name, data in {**{f"a/{n}": d for n, d in files.items()}, f"b/0.{ending}": other, f"b/1.{ending}": other}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return Examples(read_labelled(f"folder:{folder}"), replace(VIEW, **changes), LOADER)


def wav(samples: np.ndarray, rate: int) -> bytes:
    """16-bit; samples: (n, channels)."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return out.getvalue()


def chirp(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    return np.stack([0.3 * np.sin(2 * np.pi * (300 + 200 * c + 500 * t) * t) for c in range(channels)], axis=1)


def encoded(codec: str, container: str, seconds: float = 1.5, rate: int = 44_100) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(chirp(seconds, rate).T.astype(np.float32), format="flt", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        resampler = av.AudioResampler(format=stream.format, layout="mono", rate=rate, frame_size=stream.frame_size or 1024)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    return out.getvalue()


SOUNDS = {
    "a.wav": wav(chirp(1.5, 8000), 8000), "b.wav": wav(chirp(1.2, 44_100, 2), 44_100), "c.wav": wav(chirp(1.0, 11_111), 11_111),
    "d.flac": audio_bytes(3, 1.4, 22_050), "e.opus": audio_bytes(4, 1.0, codec="opus"), "f.wav": wav(chirp(0.2, 8000), 8000),
}  # fmt: skip


def test_sounds_are_as_the_graph_hears_the_resampled_file(tmp_path: Path) -> None:
    """Of several rates and channels, longer and shorter than a view; the first view, the middle and the last."""
    found = examples(tmp_path, SOUNDS)
    graph = Graph(VIEW, 1, "cpu", 1, pictures=False)
    seen = 0
    for rows, made in found.central(range(len(SOUNDS)), views=3, crops=3):
        assert made.shape == (len(rows), 3, 1, VIEW.n_mels, VIEW.mel_steps) and made.dtype == torch.float32
        for row, views in zip(rows.tolist(), made, strict=True):
            path = found.labelled.files[row]
            seconds, sound = found.facts[row][1], read_sound(path)
            whole = np.frombuffer(to_wav(resampled(sound.samples, sound.rate, VIEW.audio_rate), VIEW.audio_rate), np.uint8)
            last = max(0.0, seconds - VIEW.view_s)
            for place, view in zip((0, 0.5, 1), views, strict=True):
                expected = graph.sounds([whole], [last * place])[0]
                off = (view - expected).abs() * VIEW.mel_std_db
                assert off[expected > expected.max() - 2].max() < 0.3, path.name
            seen += 1
    assert seen == len(SOUNDS) and not found.left_out
    assert [found.facts[row][0] for row in range(5)] == [8000, 44_100, 11_111, 22_050, 48_000]
    assert found.facts[5][1] == pytest.approx(0.2)


@pytest.mark.parametrize(("codec", "container", "name"), [("aac", "mp4", "x.m4a"), ("libmp3lame", "mp3", "x.mp3")])
def test_codecs_that_dali_does_not_know(tmp_path: Path, codec: str, container: str, name: str) -> None:
    found = examples(tmp_path, {name: encoded(codec, container)})
    ((_, made),) = found.central([0], views=1)
    plain = examples(tmp_path / "plain", {"x.wav": wav(chirp(1.5, 44_100), 44_100)})
    ((_, expected),) = plain.central([0], views=1)
    assert ((made - expected).abs() * VIEW.mel_std_db)[expected > expected.max() - 1].mean() < 3


@pytest.mark.parametrize(
    ("name", "data"),
    [("bad.wav", b""), ("bad.wav", b"no sound"), ("bad.wav", bytes(300)), ("bad.flac", damaged(audio_bytes(0, 2.0))),
     ("bad.wav", wav(chirp(1.0, 8000), 8000)[:9000]), ("bad.m4a", video_bytes()),
     ("bad.wav", b"ffconcat version 1.0\nfile /etc/passwd\n"), ("bad.mp3", b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")],
)  # fmt: skip
def test_a_bad_sound_is_named_and_left_out(tmp_path: Path, name: str, data: bytes) -> None:
    good = {f"{i}.wav": SOUNDS["a.wav"] for i in range(4)}
    found = examples(tmp_path, {**good, name: data})
    bad = next(row for row, path in enumerate(found.labelled.files) if path.name == name)
    rows = [row for rows, made in found.central(range(5), views=2) for row in rows.tolist() if len(made)]
    assert rows == [row for row in range(5) if row != bad]
    assert set(found.left_out) == {f"a/{name}"} and found.left_out[f"a/{name}"]
    with pytest.raises(ValueError, match=rf"a/{name} does not decode \(.+\); take it out"):
        found.training(range(5), seed=0, epoch=0)


def test_videos_are_as_the_loader_sees_them(tmp_path: Path) -> None:
    """H.264 with a constant rate: the very pictures of `decode_frames`; crops at both ends and in the middle."""
    data = video_bytes(5, frames=20, fps=8, width=48, height=32)
    found = examples(tmp_path, {"x.mp4": data})
    ((rows, made),) = found.central([0], views=2, crops=3)
    assert rows.tolist() == [0] and made.shape == (1, 6, 3, VIEW.frames, VIEW.size, VIEW.size)
    shape = ClipShape("a/x.mp4", 20, 8.0, 48, 32)
    for i, place in enumerate((0.0, 1.0)):
        view = central_view(VIEW, shape, place)
        numbers = VIEW.frame_numbers(view.start_frame, 8.0)
        for j, left in enumerate((0, view.crop[1], 16)):
            expected = decode_frames(data, numbers, crop=(0, left, 32, 32), size=VIEW.size)
            pictures = made[0, 3 * i + j].permute(1, 2, 3, 0).numpy() * PICTURE_STD + PICTURE_MEAN
            assert np.abs(pictures - expected).max() < 0.01


@pytest.mark.parametrize(("codec", "ending"), [("mpeg4", "avi"), ("mpeg2video", "mpg"), ("mjpeg", "avi"), ("libvpx-vp9", "webm")])
def test_codecs_and_containers(tmp_path: Path, codec: str, ending: str) -> None:
    """Each frame is a grey of its own, so that a wrong one is seen; AVI has no times of display."""
    path = tmp_path / f"x.{ending}"
    if codec == "mpeg2video":
        out = io.BytesIO()
        with av.open(out, "w", format="mpeg") as file:
            stream = file.add_stream(codec, rate=25)
            stream.width = stream.height = 32
            stream.pix_fmt, stream.codec_context.max_b_frames = "yuv420p", 2
            for i in range(12):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * i, np.uint8), format="rgb24")))
            file.mux(stream.encode(None))
        path.write_bytes(out.getvalue())
    else:
        path.write_bytes(coded_video(codec, {"avi": "avi", "webm": "webm"}[ending]))
    film = look_at(path)
    assert abs(film.frames - 12) <= 1 and (film.height, film.width) == (32, 32)
    (made,) = film.pictures([np.array([0, 5, 9, 40])], [(0, 0, 32, 32)], 16)
    greys = made.reshape(4, -1).mean(1)
    assert np.abs(greys - [0, 100, 180, 220]).max() < 12


def test_a_variable_frame_rate_is_seen_by_the_clock(tmp_path: Path) -> None:
    """Frames at 0, 1, 2, 3, 10 and 11 eighths of a second: what stands from 3 to 10 is the fourth."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=8, options={"bf": "0"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for pts in (0, 1, 2, 3, 10, 11):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * pts, np.uint8), format="rgb24")
            frame.pts = pts
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    (tmp_path / "x.mp4").write_bytes(out.getvalue())
    film = look_at(tmp_path / "x.mp4")
    assert film.seconds == pytest.approx(1.5, abs=0.13)
    at = [0.06, 0.3, 0.9, 1.2, 1.3]
    numbers = np.array([int(t * film.fps) for t in at])
    shown = [20 * max(p for p in (0, 1, 2, 3, 10, 11) if p <= (n + 0.25) / film.fps * 8) for n in numbers]
    (made,) = film.pictures([numbers], [(0, 0, 32, 32)], 16)
    assert np.abs(made.reshape(len(at), -1).mean(1) - shown).max() < 12
    assert shown == [0, 40, 60, 60, 200]


def test_pixels_that_are_not_square_are_seen_as_they_are_shown(tmp_path: Path) -> None:
    """Stored 32 wide, shown 64: a square in the middle of 32 lines is 16 stored pixels wide. Sought or from the beginning."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=8, options={"bf": "0", "g": "4", "crf": "5"})
        stream.width = stream.height = 32
        stream.pix_fmt, stream.codec_context.sample_aspect_ratio = "yuv420p", Fraction(2)
        for n in range(64):
            picture = np.full((32, 32, 3), 3 * n, np.uint8)
            picture[:, :8] = picture[:, 24:] = 255
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode(None))
    film = look_at(out.getvalue())
    assert (film.width, film.height, film.aspect, film.frames) == (64, 32, 2.0, 64)
    crop = central_view(VIEW, ClipShape("", film.frames, film.fps, film.width, film.height)).crop
    assert crop == (0, 16, 32, 32)
    early, late = film.pictures([np.array([0, 5]), np.array([50, 63])], [crop, crop], 16)
    (sought,) = film.pictures([np.array([50, 63])], [crop], 16)
    assert np.abs(early.mean((1, 2, 3)) - [0, 15]).max() < 8 and np.abs(late.mean((1, 2, 3)) - [150, 189]).max() < 8
    assert np.array_equal(sought, late)


def test_a_bad_video_is_named_and_left_out(tmp_path: Path) -> None:
    good = video_bytes(1)
    bad = {"cut.mp4": good[: len(good) // 2], "not.mp4": b"x", "sound.mp4": encoded("aac", "mp4")}
    found = examples(tmp_path, {"0.mp4": good, **bad})
    rows = [row for rows, _ in found.central(range(4), views=1) for row in rows.tolist()]
    assert rows == [0] and set(found.left_out) == {"a/cut.mp4", "a/not.mp4", "a/sound.mp4"}


def test_training_views_are_those_of_the_loader(tmp_path: Path) -> None:
    """Drawn from seed, epoch and file: the same again, others for another epoch, whatever else is in the batch."""
    found = examples(tmp_path, {f"{i}.mp4": video_bytes(i, frames=20) for i in range(3)}, blur=1.0)
    first = found.training([0, 1, 2], seed=3, epoch=1)
    assert first.shape == (3, 3, VIEW.frames, VIEW.size, VIEW.size)
    assert torch.equal(found.training([2], seed=3, epoch=1)[0], first[2])
    assert not torch.equal(found.training([0], seed=3, epoch=2)[0], first[0])
    (view,) = training_views(found.view, 3, 1, ClipShape("a/0.mp4", 20, 8.0, 48, 32))
    numbers = found.view.frame_numbers(view.start_frame, 8.0)
    frames = decode_frames(video_bytes(0, frames=20), numbers, crop=view.crop, size=VIEW.size)
    silence = np.frombuffer(audio_bytes(), np.uint8)
    expected, _ = Graph(found.view, 1, "cpu", 1).run([frames], [silence], [view])
    assert torch.allclose(first[0], expected[0], atol=1e-4)
    heard = examples(tmp_path / "sounds", {"0.wav": SOUNDS["a.wav"]}, gain_db=12.0)
    sounds = [heard.training([0], seed=0, epoch=e)[0] for e in (0, 1)]
    assert sounds[0].shape == (1, VIEW.n_mels, VIEW.mel_steps) and not torch.equal(*sounds)


def test_more_views_than_a_batch(tmp_path: Path) -> None:
    found = examples(tmp_path, {"0.wav": SOUNDS["a.wav"]})
    (each, *_) = [made for _, made in found.central([0], views=LOADER.batch + 3)]
    assert each.shape[:2] == (1, LOADER.batch + 3)
    with pytest.raises(ValueError, match="2 crops; give 1 view or more, and 1 crop or 3"):
        found.central([0], crops=2)


def test_sounds_of_videos_and_short_sounds(tmp_path: Path) -> None:
    """A file of three samples is a view of silence but for them; a cut begins with a whole sample of both rates."""
    (tmp_path / "x.wav").write_bytes(wav(chirp(3, 44_100), 44_100))
    sound = read_sound(tmp_path / "x.wav")
    data, begins = sound.wav(1.2345, 0.5, 16_000)
    assert begins * 16_000 == pytest.approx(round(begins * 16_000)) and 1.1 < begins <= 1.2345 - 0.05
    assert begins + len(data[44:]) / 4 / 16_000 >= 1.2345 + 0.5 + 0.05
    found = examples(tmp_path / "short", {"0.wav": wav(chirp(3 / 8000, 8000), 8000)})
    ((_, made),) = found.central([0], views=2)
    assert made.isfinite().all() and torch.equal(made[0, 0], made[0, 1])


def test_reading_ahead() -> None:
    """In order, errors where they arise, and no thread is left when the reader leaves off."""
    assert list(ahead(iter(range(50)), 3)) == list(range(50))

    def failing() -> object:
        yield 1
        raise KeyError("two")

    made = ahead(failing())  # type: ignore[arg-type]
    assert next(made) == 1
    with pytest.raises(KeyError, match="two"):
        next(made)
    taken = []
    endless = ahead((taken.append(i) for i in iter(int, 1)), 2)
    next(endless)
    endless.close()
    assert 1 <= len(taken) <= 5
    assert not [thread for thread in threading.enumerate() if thread.name == "ahead"]
