"""Checks of a clip that was cut well: what is measured, what is refused, and what is too large to be tried."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from test_ingest_media import clapper, ffmpeg

from cmacc.ingest import Cause, ClipRequest, IngestFailure, Limits, transcode
from cmacc.ingest import encode as encode_module
from cmacc.ingest.checks import Checks
from cmacc.ingest.encode import VideoWriter
from cmacc.ingest.fingerprint import Near, distance, fingerprint, looks
from cmacc.ingest.offset import av_offset
from cmacc.shards.clip import Clip
from cmacc.shards.profile import profile

SMALL = profile("h264", short_side=64)
CLAPS = (0.52, 1.24, 1.6, 2.48, 3.0, 3.32, 4.2, 4.72, 5.4)
RATE, FPS = 16000, 25


def made(
    path: Path, start_s: float = 0.0, end_s: float | None = None, checks: Checks | None = None, limits: Limits | None = None,
    captions: tuple[tuple[float, float, str], ...] = (),
) -> Clip | IngestFailure:  # fmt: skip
    wanted = ClipRequest(1, "list.csv", "url_0123456789abcdef", "a.mp4", start_s, end_s, captions=captions)
    ((_, outcome),) = transcode(path, [wanted], SMALL, limits, checks=checks)
    return outcome


def clip(path: Path, *span: float, **options: object) -> Clip:
    outcome = made(path, *span, **options)  # type: ignore[arg-type]
    assert isinstance(outcome, Clip), outcome
    return outcome


def cause(path: Path, *span: float, **options: object) -> Cause:
    outcome = made(path, *span, **options)  # type: ignore[arg-type]
    assert isinstance(outcome, IngestFailure), "a clip was made"
    return outcome.cause


def test_a_check_filters_or_tells_or_is_off(tmp_path: Path) -> None:
    silent, still = clapper(tmp_path / "silent.mp4", claps=(), level=0), clapper(tmp_path / "still.mp4", moving=False)
    assert cause(silent) is Cause.SILENT and cause(still) is Cause.STILL
    for use in ("column", "off"):
        assert clip(silent, checks=Checks(silent=use)).facts.loudness_db == -120
        assert clip(still, checks=Checks(still=use)).facts.motion < 0.05
    late = clapper(tmp_path / "late.mkv", seconds=6, claps=CLAPS, sound_delay_s=0.32)
    facts = clip(late, 0.4, 5.8).facts
    assert facts.av_offset_s == pytest.approx(0.32, abs=1 / FPS) and facts.av_trust > 0.5 and len(facts.fingerprint) == 64
    assert cause(late, 0.4, 5.8, checks=Checks(desync="filter")) is Cause.DESYNC
    clip(late, 0.4, 5.8, checks=Checks(desync="filter", desync_s=0.4))
    clip(late, 0.4, 5.8, checks=Checks(desync="filter", desync_trust=1.0))
    off = clip(late, 0.4, 5.8, checks=Checks(desync="off", near_duplicate="off")).facts
    assert (off.av_offset_s, off.av_trust, off.fingerprint) == (0, 0, "")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"silent": "on"}, "silent is 'on'; give filter, column or off"),
        ({"desync_trust": 2}, "desync_trust is 2; give 0 to 1"),
        ({"desync_s": 0.9}, "desync_s is 0.9; give 0 to 0.5"),
        ({"still_motion": -1}, "still_motion is -1; give 0 to 255"),
        ({"near_sound_bits": 65}, "near_sound_bits is 65; give 0 to 64"),
        ({"silence_db": 3}, "silence_db is 3; give a level in dBFS, 0 or less"),
    ],
)
def test_checks_say_what_to_change(wrong: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Checks(**wrong)  # type: ignore[arg-type]


def impacts(late_s: float, seconds: float = 8.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(changes, sound) of things that hit something now and then, over grain and noise; the sound comes so late."""
    rng = np.random.default_rng(seed)
    changes, sound = 0.5 + 0.3 * rng.random(round(seconds * FPS)), 0.02 * rng.standard_normal(round(seconds * RATE))
    for hit in np.cumsum(rng.uniform(0.4, 1.1, 40)):
        frame, sample = round(hit * FPS), round((hit + late_s) * RATE)
        if 0 < frame < len(changes) - 1 and 0 <= sample < len(sound) - 3200:
            changes[frame : frame + 2] += rng.uniform(3, 12)
            sound[sample : sample + 3200] += rng.uniform(0.2, 0.8) * np.exp(-np.arange(3200) / 600) * rng.standard_normal(3200)
    return changes, sound.astype(np.float32)


@pytest.mark.parametrize("late_s", [-0.48, -0.3, -0.12, -0.04, 0.0, 0.07, 0.2, 0.33, 0.46])
def test_the_offset_of_impacts_is_found_to_a_frame(late_s: float) -> None:
    for seed in range(5):
        found_s, trust = av_offset(*impacts(late_s, seed=seed), RATE, FPS)
        assert found_s == pytest.approx(late_s, abs=1.01 / FPS)
        assert trust > (Checks().desync_trust if abs(late_s) < 0.4 else 0.25)  # near the last lags less is seen beyond the best


def test_what_has_nothing_to_do_with_the_picture_is_not_trusted() -> None:
    rng, seconds = np.random.default_rng(1), np.arange(8 * RATE) / RATE
    beat = np.exp(-(seconds % 0.25) / 0.03) * np.sin(2 * np.pi * 220 * seconds)
    sounds = {
        "noise": rng.standard_normal(len(seconds)),
        "a chord": sum(np.sin(2 * np.pi * f * seconds) for f in (220, 277, 330)),
        "talk": rng.standard_normal(len(seconds)) * np.clip(np.sin(2 * np.pi * 4 * seconds + 3 * np.sin(seconds)), 0, 1),
        "a steady beat": beat,
        "silence": 0 * seconds,
        "one knock": np.where(np.abs(seconds - 3) < 0.01, 1.0, 0.001 * rng.standard_normal(len(seconds))),
    }
    pictures = {"impacts": impacts(0)[0], "noise": rng.random(200), "one cut": np.eye(1, 200, 80)[0] * 90, "none": np.zeros(200)}
    for heard, sound in sounds.items():
        for seen, changes in pictures.items():
            assert av_offset(changes, (0.1 * sound).astype(np.float32), RATE, FPS)[1] < 0.25, (heard, seen)
    # the beat with a picture that beats along fits every 0.25 s
    changes = 0.2 + 9.0 * (np.arange(200) / FPS % 0.25 < 1 / FPS)
    assert av_offset(changes, beat.astype(np.float32), RATE, FPS)[1] < 0.25
    assert av_offset(np.ones(5), np.ones(3200, np.float32), RATE, FPS) == (0, 0)


def test_real_clips_are_hardly_ever_called_out_of_sync(real_data: Path) -> None:
    strict = Checks(desync="filter")
    names = ("1.mp4", "dog_barking.mp4", "testvid_1022ms.mp4", "video_02480.mp4", "video_02677.mp4")
    for path in [real_data / "clips" / name for name in names] + sorted((real_data / "grid").glob("*.mpg"))[:8]:
        clip(path, checks=strict)


def melody(path: Path, seed: int, seconds: float = 4.0) -> Path:
    """A zoom into the Mandelbrot set with a melody, both unlike those of another seed."""
    rng = np.random.default_rng(seed)
    tones = np.repeat(rng.uniform(200, 3000, (3, round(seconds * 4))), RATE // 4, axis=1)
    loud = np.repeat(rng.uniform(0.02, 0.2, tones.shape[1] // (RATE // 4)), RATE // 4)
    sound = (loud * np.sin(2 * np.pi * np.cumsum(tones, axis=1) / RATE)).sum(axis=0)
    raw = path.with_suffix(".raw")
    raw.write_bytes((sound * 32000).astype("<i2").tobytes())
    x, y = rng.uniform(-1.2, 0.2), rng.uniform(-0.6, 0.6)
    picture = ("-f", "lavfi", "-i", f"mandelbrot=size=320x240:rate=25:start_x={x}:start_y={y}:start_scale=1.2:end_scale=0.1")
    ffmpeg(*picture, "-f", "s16le", "-ar", RATE, "-ac", 1, "-i", raw, "-t", seconds, "-preset", "ultrafast", path)
    return path


def test_a_clip_that_was_encoded_again_is_found(tmp_path: Path) -> None:
    known, near = {}, Near()
    for seed in range(4):
        known[seed] = clip(melody(tmp_path / f"{seed}.mp4", seed), 0.0, 3.9).facts.fingerprint
        assert near.nearest(known[seed]) is None
        near.add(str(seed), known[seed])
    assert all(distance(a, b)[0] > 40 and distance(a, b)[1] > 14 for a, b in combinations(known.values(), 2))
    again = {
        "smaller": ("-vf", "scale=160:-2,fps=15", "-crf", 36, "-af", "volume=-9dB", "-c:a", "aac", "-b:a", "48k"),
        "larger": ("-vf", "scale=480:-2,fps=30", "-crf", 30, "-af", "volume=4dB", "-c:a", "libmp3lame", "-ar", 22050),
    }
    for seed in range(2):
        for name, coding in again.items():
            ffmpeg("-i", tmp_path / f"{seed}.mp4", *coding, "-preset", "veryfast", tmp_path / f"{name}.mkv")
            found = near.nearest(clip(tmp_path / f"{name}.mkv", 0.0, 3.9).facts.fingerprint)
            assert found is not None and found[0] == str(seed), (name, found)


def test_clips_of_one_talker_are_no_duplicates(real_data: Path) -> None:
    near = Near()
    for path in sorted((real_data / "grid").glob("*.mpg"))[:30]:
        code = clip(path).facts.fingerprint
        assert near.nearest(code) is None
        near.add(path.name, code)
    assert near.nearest(code) == (path.name, 0, 0)


def test_the_nearest_of_many() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(0, 1 << 63, (5000, 4), dtype=np.uint64)
    words[7] = 0
    near = Near(picture_bits=8, sound_bits=3)
    near.extend([f"k{i}" for i in range(3000)], words[:3000])
    near.extend([f"k{i}" for i in range(3000, 5000)], words[3000:])
    assert len(near) == 4999, "a clip with no fingerprint is like no other"

    def code(row: np.ndarray) -> str:
        return row.astype(">u8").tobytes().hex()

    wanted = words[4321].copy()
    assert near.nearest(code(wanted)) == ("k4321", 0, 0)
    wanted[0] ^= np.uint64(0b1011)
    wanted[3] ^= np.uint64(0b111)
    assert near.nearest(code(wanted)) == ("k4321", 3, 3) and distance(code(wanted), code(words[4321])) == (3, 3)
    near.add("closer", code(wanted))
    assert near.nearest(code(wanted)) == ("closer", 0, 0)
    near.add("later", code(wanted))
    assert near.nearest(code(wanted)) == ("closer", 0, 0), "the earliest of several"
    wanted[3] ^= np.uint64(0b1111000)
    assert near.nearest(code(wanted)) is None
    assert near.nearest("") is None


def test_nothing_to_see_and_to_hear_is_no_fingerprint() -> None:
    flat, silence = [np.full((48, 64), 16, np.uint8)] * 3, np.zeros(RATE, np.float32)
    assert fingerprint(flat, silence, RATE) == ""
    noise = np.random.default_rng(0).standard_normal(RATE // 3).astype(np.float32)
    assert fingerprint(flat, noise, RATE).startswith("0" * 48) and fingerprint(flat, noise, RATE) == fingerprint(
        flat, noise / 8, RATE
    )
    assert [looks(n) for n in (1, 2, 8, 250)] == [(0, 0, 0), (0, 1, 1), (1, 4, 6), (41, 125, 208)]


def test_captions_go_with_their_clip(tmp_path: Path) -> None:
    said = ((0.0, 0.9, "before"), (0.5, 1.5, "into it"), (1.6, 2.0, "within"), (2.9, 9.0, "out of it"), (3.0, 4.0, "after"))
    facts = clip(clapper(tmp_path / "a.mp4"), 1.0, 3.0, captions=said).facts
    assert facts.captions == ((0.0, 0.5, "into it"), (0.6, 1.0, "within"), (1.9, 2.0, "out of it"))


def test_too_large_is_refused(tmp_path: Path) -> None:
    path = clapper(tmp_path / "a.mp4")
    for limits in (Limits(max_video_s=3.0), Limits(max_frames=60), Limits(max_pixels=96 * 64 - 1)):
        assert cause(path, 0.5, 3.5, limits=limits) is Cause.TOO_LARGE
    clip(path, 0.5, 3.5, limits=Limits(max_video_s=4.1, max_frames=100, max_pixels=96 * 64, max_streams=2))
    many = tmp_path / "many.mkv"
    ffmpeg("-i", path, *("-map", "0:v", *("-map", "0:a") * 4), "-c", "copy", many)
    assert cause(many, limits=Limits(max_streams=4)) is Cause.TOO_LARGE
    clip(many, limits=Limits(max_streams=5))
    for wrong in ("max_video_s", "max_frames", "max_pixels"):
        with pytest.raises(ValueError, match=f"{wrong} is 0; give more than 0"):
            Limits(**{wrong: 0})
    with pytest.raises(ValueError, match="max_streams is 1; a clip needs two"):
        Limits(max_streams=1)


def test_a_stream_that_lies_about_its_size_and_length_is_refused(tmp_path: Path) -> None:
    small, large = (clapper(tmp_path / f"{w}.ts", size=(w, 64), seconds=2, claps=(1.0,)) for w in (96, 192))
    both = tmp_path / "both.ts"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    shifted = tmp_path / "shifted.ts"
    ffmpeg("-i", large, "-c", "copy", "-output_ts_offset", 2, shifted)
    both.write_bytes(small.read_bytes() + shifted.read_bytes())
    assert cause(both, 0.2, 3.8, limits=Limits(max_pixels=96 * 64)) is Cause.TOO_LARGE


def test_sound_that_goes_on_without_a_picture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture, sound = clapper(tmp_path / "a.mkv", seconds=2, claps=(1.0,)), clapper(tmp_path / "b.mkv", seconds=9, picture=False)
    both = tmp_path / "both.ts"
    ffmpeg("-i", picture, "-i", sound, "-map", "0:v", "-map", "1:a", "-c", "copy", both)
    monkeypatch.setattr(Limits, "admit", lambda limits, source: None)
    assert cause(both, 0.0, 4.0, limits=Limits(max_video_s=5.0)) is Cause.TOO_LARGE


def test_the_same_bytes_on_every_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = melody(tmp_path / "a.mp4", 0)
    here = clip(path, 0.0, 2.0)
    codec, options = encode_module._video_codec(SMALL)
    slow = {**options, "x264-params": options["x264-params"] + ":asm=0"}
    monkeypatch.setattr(encode_module, "_video_codec", lambda profile: (codec, slow))
    assert clip(path, 0.0, 2.0).members["mp4"] == here.members["mp4"]


def test_what_the_writer_keeps_of_its_frames(tmp_path: Path) -> None:
    clips = [clip(clapper(tmp_path / f"{fps}.mp4", fps=fps), 0.0, 3.0) for fps in (10, 25)]
    assert all(c.facts.n_frames == 75 and len(c.facts.fingerprint) == 64 for c in clips)
    empty = VideoWriter(tmp_path / "none.mp4", 1, SMALL)  # type: ignore[arg-type]
    assert (empty.n_frames, empty.size, empty.lumas) == (0, (0, 0), [])
    assert replace(Checks(), desync="off").desync == "off"
