"""The sample world: its files and lists, its determinism, its synchrony, and that no shortcut gives class or pairing away."""

from __future__ import annotations

import csv
import http.client
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cmacc.ingest.world import CLASSES, World, WorldConfig, render_world, serve
from cmacc.ingest.world.render import plan

Array = NDArray[np.float64]
SMALL = WorldConfig(clips=180, eval_clips=15, seed=5)
TINY = WorldConfig(clips=15, eval_clips=15, clip_s=1.0, clips_per_file=4, seed=3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return render_world(tmp_path_factory.mktemp("world"), SMALL, workers=2)


@pytest.fixture(scope="module")
def measured(world: World) -> tuple[list[Take], NDArray[np.str_]]:
    return collect(world, world.train_manifest)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> World:
    return render_world(tmp_path_factory.mktemp("tiny"), TINY, workers=1)


def rows(manifest: Path) -> list[tuple[str, float, float, str]]:
    lines = [line for line in manifest.read_text().splitlines() if not line.startswith("#")]
    parsed = csv.reader(lines, skipinitialspace=True)
    return [(name, float(start), float(end), label) for name, start, end, label in parsed]


# --- measuring ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Take:
    """A clip as a learner could get it. file: id of its source; luma: (T, H, W); colour: mean RGB, (3,); sound: (S,).

    source_video, source_audio, video, audio: encoding traces of the source and of the clip encoded anew.
    """

    file: str
    luma: NDArray[np.uint8]
    colour: Array
    sound: Array
    source_video: Array
    source_audio: Array
    video: Array
    audio: Array


def takes(path: Path, spans: list[tuple[float, float]]) -> list[Take]:
    """Decode the file once, cut it, encode every clip anew (H.264 crf 23, FLAC 16 kHz)."""
    with av.open(str(path)) as file:
        packets = [
            (p.stream.type, float(p.pts * p.time_base), p.size, p.is_keyframe)
            for p in file.demux()
            if p.pts is not None and p.time_base is not None
        ]
        file.seek(0)
        frames = [(float(f.pts * f.time_base), f) for f in file.decode(video=0)]
        file.seek(0)
        sound = np.concatenate([f.to_ndarray()[0] for f in file.decode(audio=0)]).astype(float)
        rate = file.streams.audio[0].rate
    out = []
    for start, end in spans:
        cut = [frame for at, frame in frames if start - 1e-3 <= at < end - 1e-3]
        heard = sound[round(start * rate) : round(end * rate)]
        inside = [p for p in packets if start - 1e-3 <= p[1] < end - 1e-3]
        rgb = np.stack([frame.to_ndarray(format="rgb24") for frame in cut])
        out.append(
            Take(
                path.stem,
                np.stack([frame.to_ndarray(format="gray") for frame in cut]),
                rgb.mean((0, 1, 2)),
                heard,
                traces([(size, key) for kind, _, size, key in inside if kind == "video"]),
                np.log([sum(size for kind, _, size, _ in inside if kind == "audio")]),
                traces(recode_video(cut)),
                np.log([recode_audio(heard, rate)]),
            )
        )
    return out


def traces(packets: list[tuple[int, bool]]) -> Array:
    """Log bytes of: all packets (so the bit rate), keyframes, the first keyframe, other frames, (4,)."""
    keys, rest = [size for size, key in packets if key], [size for size, key in packets if not key]
    return np.log([sum(keys) + sum(rest), sum(keys), keys[0], sum(rest)])


def recode_video(frames: list[av.VideoFrame], preset: str = "veryfast") -> list[tuple[int, bool]]:
    encoder: Any = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
    encoder.time_base, encoder.framerate, encoder.thread_count = Fraction(1, 16), Fraction(16), 1
    encoder.options = {"preset": preset, "crf": "23", "g": "16", "bf": "2", "sc_threshold": "0"}
    out: list[av.Packet] = []
    for number, frame in enumerate(frames):
        copy = av.VideoFrame.from_ndarray(frame.to_ndarray(format="yuv420p"), "yuv420p")
        copy.pts = number
        out += encoder.encode(copy)
    return [(packet.size, packet.is_keyframe) for packet in out + encoder.encode(None)]


def recode_audio(sound: Array, rate: int) -> int:
    data = BytesIO()
    with av.open(data, "w", format="flac") as file:
        stream = file.add_stream("flac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.clip(np.round(sound * 32767), -32768, 32767).astype(np.int16)[None], "s16", "mono")
        frame.sample_rate = rate
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return len(data.getvalue())


def collect(world: World, manifest: Path) -> tuple[list[Take], NDArray[np.str_]]:
    grouped: dict[str, list[tuple[float, float, str]]] = {}
    for name, start, end, label in rows(manifest):
        grouped.setdefault(name, []).append((start, end, label))
    with ThreadPoolExecutor(2) as pool:
        paths = [world.root / "media" / f"{name}.mp4" for name in grouped]
        found = pool.map(takes, paths, [[(start, end) for start, end, _ in clips] for clips in grouped.values()])
        return [take for file in found for take in file], np.array([label for clips in grouped.values() for _, _, label in clips])


def loudness(sound: Array) -> Array:
    """RMS in dB of the clip and of each quarter, (5,)."""
    return np.array([10 * np.log10(np.mean(part**2) + 1e-12) for part in (sound, *np.array_split(sound, 4))])


def log_mel(sound: Array, bands: int = 40) -> Array:
    """Mean and deviation over time of a log band spectrum, (2 × bands,)."""
    pieces = np.lib.stride_tricks.sliding_window_view(sound, 512)[::256] * np.hanning(512)
    power = np.abs(np.fft.rfft(pieces)) ** 2
    edges = np.unique(np.geomspace(2, 256, bands + 1).round().astype(int))
    logs = np.log(np.stack([power[:, a:b].mean(1) for a, b in pairwise(edges)], 1) + 1e-8)
    return np.concatenate([logs.mean(0), logs.std(0)])


def shape_and_motion(luma: NDArray[np.uint8]) -> Array:
    """Log spectrum of the still part and of the changes, pooled to coarse bands: blind to place and to the sign of contrast."""
    small = luma.reshape(len(luma), luma.shape[1] // 4, 4, luma.shape[2] // 4, 4).mean((2, 4))
    still, moving = small.mean(0, keepdims=True), small - small.mean(0)
    out = []
    for images in (still, moving):
        spectrum = (np.abs(np.fft.fft2(images)) ** 2).mean(0)[:16, :20] + 1
        out.append(np.log(spectrum.reshape(8, 2, 10, 2).mean((1, 3))).ravel())
    return np.concatenate(out)


def probe(features: Array, labels: NDArray[np.str_], folds: int = 5) -> float:
    """Cross-validated accuracy of logistic regression on standardised features."""
    right = 0
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=0).split(features, labels):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=300)).fit(features[train], labels[train])
        right += int((model.predict(features[test]) == labels[test]).sum())
    return right / len(labels)


def pairing_probe(seen: Array, heard: Array, files: list[str], folds: int = 5) -> float:
    """Cross-validated accuracy of telling a clip's own sound from another's, from both streams' features and their products.

    Files are dealt to folds first and strangers are taken inside a fold, so that neither a clip nor the quality of a file
    (one for all its clips) is on both sides. The two pairs of a clip are not independent: its deviation under shuffling is
    that of one trial a clip.
    """
    rng = np.random.default_rng(0)
    x, y = StandardScaler().fit_transform(seen), StandardScaler().fit_transform(heard)
    names, number_of = np.unique(files, return_inverse=True)
    fold = (rng.permutation(len(names)) % folds)[number_of]
    pairs, matched, side = [], [], []
    for number in range(folds):
        own = rng.permutation(np.flatnonzero(fold == number))
        for other, match in ((own, 1), (np.roll(own, 1), 0)):
            products = (x[own][:, :, None] * y[other][:, None, :]).reshape(len(own), -1)
            pairs.append(np.concatenate([x[own], y[other], products], 1))
            matched += [match] * len(own)
            side += [number] * len(own)
    features, target, part = np.concatenate(pairs), np.array(matched), np.array(side)
    right = 0
    for number in range(folds):
        train, test = part != number, part == number
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300)).fit(features[train], target[train])
        right += int((model.predict(features[test]) == target[test]).sum())
    return right / len(target)


def bound(chance: float, trials: int, sigmas: float = 3.0) -> float:
    """What a guesser exceeds with probability about 1 in 700 (3 sigmas of the binomial)."""
    return chance + sigmas * float(np.sqrt(chance * (1 - chance) / trials))


def shortcuts(found: list[Take]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Features that must tell nothing, of the picture stream and of the sound stream."""
    seen = {
        "mean colour": np.stack([take.colour for take in found]),
        "source video bytes": np.stack([take.source_video for take in found]),
        "clip video bytes": np.stack([take.video for take in found]),
    }
    heard = {
        "loudness": np.stack([loudness(take.sound) for take in found]),
        "source audio bytes": np.stack([take.source_audio for take in found]),
        "clip audio bytes": np.stack([take.audio for take in found]),
    }
    return seen, heard


def onsets(sound: Array) -> Array:
    """Instants at which the sound begins anew, seconds: peaks of the rise of its amplitude spectrum over 20 ms."""
    pieces = np.lib.stride_tricks.sliding_window_view(sound, 512)[::80] * np.hanning(512)
    root = np.sqrt(np.abs(np.fft.rfft(pieces)))
    rise = np.maximum(root[4:] - root[:-4], 0).sum(1)
    return peaks((np.arange(len(rise)) + 2) * 80 / 16_000 + 256 / 16_000, rise - np.median(rise))


def peaks(at: Array, strength: Array) -> Array:
    found: list[float] = []
    for i in np.argsort(-strength):
        if strength[i] < 0.5 * strength.max():
            break
        if all(abs(at[i] - other) > 0.15 for other in found):
            found.append(float(at[i]))
    return np.sort(found)


def flashes(luma: NDArray[np.uint8]) -> Array:
    """Instants at which much of the picture changes at once."""
    small = luma.reshape(len(luma), 30, 4, 40, 4).mean((2, 4))
    change = np.sort(np.abs(np.diff(small, axis=0)).reshape(len(luma) - 1, -1), 1)[:, -24:].mean(1)
    return peaks((np.arange(len(change)) + 1) / 16, change - np.median(change))


def bounces(luma: NDArray[np.uint8]) -> Array:
    """Instants at which the moving thing is lowest: where the lines of its fall and of its rise meet."""
    small = luma.reshape(len(luma), 60, 2, 80, 2).mean((2, 4))
    away = np.abs(small - np.median(small, 0))
    away = np.where(away > 0.5 * away.max((1, 2), keepdims=True), away, 0)
    low = (away * np.arange(60)[None, :, None]).sum((1, 2)) / away.sum((1, 2))
    found = []
    for i in range(2, len(low) - 2):
        if low[i] == low[i - 2 : i + 3].max():
            fall, rise = low[i - 1] - low[i - 2], low[i + 2] - low[i + 1]
            met = (low[i + 1] - low[i - 1] + fall * (i - 1) - rise * (i + 1)) / (fall - rise) if fall > rise else i
            found.append((np.clip(met, i - 1, i + 1) + 0.5) / 16)
    return np.array(found)


# --- files and lists ------------------------------------------------------------------------------------------------------


def test_manifests_name_what_the_files_hold(world: World) -> None:
    facts = json.loads((world.root / "world.json").read_text())
    listed = rows(world.train_manifest) + rows(world.eval_manifest)
    told = [(f["id"], c["start"], c["end"], c["label"]) for f in facts["files"] for c in f["clips"]]
    assert listed == told
    assert len(listed) == world.clips == SMALL.clips + SMALL.eval_clips
    media = {path.stem: path for path in (world.root / "media").iterdir()}
    assert set(media) == {row[0] for row in listed} and len(media) == world.files
    assert not (world.root / ".render").exists()
    for name, path in list(media.items())[:3]:
        with av.open(str(path)) as file:
            video, audio = file.streams.video[0], file.streams.audio[0]
            assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
            assert (video.width, video.height, video.average_rate) == (SMALL.width, SMALL.height, SMALL.fps)
            assert file.duration is not None
            seconds = file.duration / 1e6
        ends = [row[2] for row in listed if row[0] == name]
        assert max(ends) <= seconds + 0.1 and 2 <= seconds <= 60


def test_rows_are_written_as_audioset_writes_them(world: World) -> None:
    lines = world.train_manifest.read_text().splitlines()
    assert lines[2] == "# YTID, start_seconds, end_seconds, positive_labels"
    name, start, end, label = lines[3].split(", ")
    assert len(name) == 11 and start == f"{float(start):.3f}" and end == f"{float(end):.3f}"
    assert label[0] == label[-1] == '"' and label[1:-1] in CLASSES


def test_held_out_clips_share_no_file_with_training(world: World) -> None:
    train, held = rows(world.train_manifest), rows(world.eval_manifest)
    assert not {row[0] for row in train} & {row[0] for row in held}
    assert Counter(row[3] for row in train) == dict.fromkeys(CLASSES, SMALL.clips // len(CLASSES))
    assert Counter(row[3] for row in held) == dict.fromkeys(CLASSES, 1)


def test_unequal_classes_are_all_there() -> None:
    files = plan(WorldConfig(clips=500, eval_clips=30, imbalance=1.5))
    train = Counter(label for file in files if file.split == "train" for _, label, _ in file.clips)
    held = Counter(label for file in files if file.split == "eval" for _, label, _ in file.clips)
    assert set(train) == set(CLASSES) and train.total() == 500
    assert held == dict.fromkeys(CLASSES, 2)
    ranked = sorted(train.values(), reverse=True)
    assert ranked[0] > 5 * ranked[5] > 5 * ranked[14]


def test_same_settings_same_bytes_whatever_the_workers(tiny: World, tmp_path: Path) -> None:
    again = render_world(tmp_path, TINY, workers=2)
    names = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(tiny.root) for path in tiny.root.rglob("*") if path.is_file())
    assert all((tmp_path / name).read_bytes() == (tiny.root / name).read_bytes() for name in names)
    other = plan(WorldConfig(clips=15, eval_clips=15, clip_s=1.0, clips_per_file=4, seed=4))
    assert {file.id for file in other}.isdisjoint(row[0] for row in rows(again.train_manifest))


def test_a_whole_world_is_left_alone_and_a_damaged_one_completed(tiny: World) -> None:
    media = sorted((tiny.root / "media").iterdir())
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in media}
    steps: list[tuple[int, int]] = []
    assert render_world(tiny.root, TINY, workers=1, on_progress=lambda *step: steps.append(step)) == tiny
    assert not steps and all(path.stat().st_mtime_ns == before[path][1] for path in media)
    media[0].unlink()
    media[1].write_bytes(before[media[1]][0][:-1])
    assert render_world(tiny.root, TINY, workers=1, on_progress=lambda *step: steps.append(step)) == tiny
    assert steps[-1] == (tiny.files, tiny.files)
    assert {path: path.read_bytes() for path in media} == {path: data for path, (data, _) in before.items()}


def test_an_interrupted_rendering_goes_on(tmp_path: Path, tiny: World) -> None:
    class Stop(Exception):
        pass

    def stop_at_three(done: int, _: int) -> None:
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        render_world(tmp_path, TINY, workers=1, on_progress=stop_at_three)
    assert not (tmp_path / "world.json").exists()
    media = sorted((tmp_path / "media").iterdir())
    kept, spoilt = media[0], media[1]
    stamp = kept.stat().st_mtime_ns
    spoilt.write_bytes(b"half a file")
    render_world(tmp_path, TINY, workers=1)
    assert kept.stat().st_mtime_ns == stamp
    assert spoilt.read_bytes() == (tiny.root / "media" / spoilt.name).read_bytes()


def test_another_world_is_not_overwritten(tiny: World) -> None:
    with pytest.raises(ValueError, match="empty folder"):
        render_world(tiny.root, SMALL)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"clips": 3}, "one for each class"),
        ({"clip_s": 0.5}, "1 to 10 seconds"),
        ({"clip_s": 2.01}, "whole number of frames"),
        ({"clips_per_file": 0}, "1 to 60"),
        ({"imbalance": -1.0}, "Zipf"),
        ({"seed": -1}, "0 or more"),
        ({"width": 161}, "even sides"),
        ({"fps": 4}, "8 to 60"),
    ],
)
def test_settings_that_cannot_be_say_what_to_give(changes: dict[str, Any], hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        WorldConfig(**changes)


# --- synchrony ------------------------------------------------------------------------------------------------------------


def test_sound_falls_on_the_visible_event(measured: tuple[list[Take], NDArray[np.str_]]) -> None:
    """Measured on decoded files at 16 frames a second, so that a sharp event is seen to ±31 ms at best."""
    late: dict[str, list[float]] = {"siren": [], "ball": []}
    for take, label in zip(*measured, strict=True):
        if label in late:
            seen = flashes(take.luma) if label == "siren" else bounces(take.luma)
            heard = [at for at in onsets(take.sound) if 0.2 < at < 1.8]
            late[label] += [float(seen[np.abs(seen - at).argmin()] - at) for at in heard if len(seen)]
    siren, ball = (np.array(late[label]) for label in ("siren", "ball"))
    assert len(siren) >= 20 and np.mean(np.abs(siren) < 0.04) > 0.95
    assert len(ball) >= 20 and np.median(np.abs(ball)) < 0.04 and abs(np.median(ball)) < 0.02


# --- no shortcut ----------------------------------------------------------------------------------------------------------


def test_no_shortcut_tells_the_class(measured: tuple[list[Take], NDArray[np.str_]]) -> None:
    found, labels = measured
    limit = bound(1 / len(CLASSES), len(labels))
    seen, heard = shortcuts(found)
    scores = {name: probe(features, labels) for name, features in (seen | heard).items()}
    assert all(score < limit for score in scores.values()), (limit, scores)


def test_no_shortcut_tells_the_pairing(measured: tuple[list[Take], NDArray[np.str_]]) -> None:
    seen, heard = shortcuts(measured[0])
    files = [take.file for take in measured[0]]
    scores = {(a, b): pairing_probe(x, y, files) for a, x in seen.items() for b, y in heard.items()}
    scores["all", "all"] = pairing_probe(np.concatenate([*seen.values()], 1), np.concatenate([*heard.values()], 1), files)
    limit = bound(0.5, len(files))
    assert all(score < limit for score in scores.values()), (limit, scores)


def test_who_watches_or_listens_can_tell_the_class(measured: tuple[list[Take], NDArray[np.str_]]) -> None:
    """The probes would find a class if there were one to find."""
    found, labels = measured
    assert probe(np.stack([log_mel(take.sound) for take in found]), labels) > 0.5
    assert probe(np.stack([shape_and_motion(take.luma) for take in found]), labels) > 0.5


# --- over HTTP ------------------------------------------------------------------------------------------------------------


def test_serve_answers_ranges_and_keeps_to_its_folder(tiny: World, tmp_path: Path) -> None:
    name = rows(tiny.train_manifest)[0][0]
    data = (tiny.root / "media" / f"{name}.mp4").read_bytes()
    outside = tmp_path / "secret.txt"
    outside.write_text("secret")
    link = tiny.root / "link.txt"
    link.symlink_to(outside)
    with serve(tiny.root) as base:
        address = urlsplit(base)
        assert address.hostname == "127.0.0.1" and address.port is not None

        def ask(path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
            link = http.client.HTTPConnection("127.0.0.1", address.port, timeout=10)
            link.putrequest(method, path)
            for key, value in headers.items():
                link.putheader(key, value)
            link.endheaders()
            answer = link.getresponse()
            body = answer.read()
            link.close()
            return answer.status, dict(answer.headers), body

        url = f"/media/{name}.mp4"
        status, headers, body = ask(url)
        assert (status, headers["Content-Type"], headers["Accept-Ranges"], body) == (200, "video/mp4", "bytes", data)
        status, headers, body = ask(url, "HEAD")
        assert (status, headers["Content-Length"], body) == (200, str(len(data)), b"")
        for asked, start, stop in (("0-99", 0, 100), ("500-", 500, len(data)), ("-7", len(data) - 7, len(data)), ("9-9", 9, 10)):
            status, headers, body = ask(url, Range=f"bytes={asked}")
            assert (status, body) == (206, data[start:stop])
            assert headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(data)}"
        assert ask(url, Range=f"bytes={len(data)}-")[0] == 416
        assert ask(url, Range="bytes=-0")[0] == 416
        assert ask(url, Range="bytes=0-1,5-6")[::2] == (200, data)
        for path in (
            "/../secret.txt",
            f"/..%2f{tmp_path.name}/secret.txt",
            f"/{outside}",
            "//etc/passwd",
            "/link.txt",
            "/media",
            "/%00",
        ):
            assert ask(path)[0] == 404, path
        with av.open(base + url) as file:
            assert file.streams.video[0].frames > 0
    with pytest.raises(OSError):
        ask(url)
    link.unlink()


@pytest.mark.long
def test_no_shortcut_at_full_size(tmp_path: Path) -> None:
    world = render_world(tmp_path, WorldConfig())
    found, labels = collect(world, world.train_manifest)
    seen, heard = shortcuts(found)
    scores = {name: probe(features, labels) for name, features in (seen | heard).items()}
    assert max(scores.values()) < bound(1 / len(CLASSES), len(labels)), scores
    files = [take.file for take in found]
    pairs = {(a, b): pairing_probe(x, y, files) for a, x in seen.items() for b, y in heard.items()}
    assert max(pairs.values()) < bound(0.5, len(labels)), pairs
