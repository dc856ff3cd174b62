"""Real recordings, where the folder that holds them is there: every file ends as a clip or as a row with a named cause."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torchaudio
from PIL import Image

from cmacc.flows.ingest import ingest
from cmacc.ingest import Cause, Ledger
from cmacc.ingest.world import serve
from cmacc.shards.dataset import Dataset
from cmacc.shards.lint import lint
from cmacc.train.evaluation.baselines import whole_sounds
from cmacc.train.evaluation.examples import Examples
from cmacc.train.evaluation.files import EvaluationConfig, evaluate_files, unusual
from cmacc.train.evaluation.labelled import read_labelled
from cmacc.train.evaluation.protocols import probe
from cmacc.train.evaluation.results import Result, summed_up
from cmacc.train.export.trained import Trained
from cmacc.train.loading.graph import FLOOR_DB, PICTURE_MEAN, PICTURE_STD
from cmacc.train.loading.loader import LoaderConfig, evaluation_batches
from cmacc.train.loading.views import ClipShape, ViewConfig, central_view
from cmacc.train.networks.encoders import EncoderConfig, build_encoders

SMALL = {"short_side": 64, "fps": 10, "gop": 10, "workers": 2, "timeout_s": 120.0}
MEDIA_ALONE = ("labels.csv",)


def outcomes(home: Path) -> dict[str, tuple[str, str]]:
    """Name of each source file: (state, cause)."""
    with Ledger(home / "ingest" / "ledger.sqlite") as ledger:
        return {Path(str(row["address"])).name: (str(row["state"]), str(row["cause"])) for row in ledger.rows()}


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file() and path.name not in MEDIA_ALONE}


def batches(home: Path) -> Iterator[torch.Tensor]:
    dataset = Dataset.open(home)
    for batch in evaluation_batches(dataset, ViewConfig(frames=4, view_s=0.4, size=32), LoaderConfig(batch=8), dataset.rows()):
        assert torch.isfinite(batch.video).all()
        assert torch.isfinite(batch.audio).all()
        yield batch.ids


def test_every_good_recording_becomes_a_clip(real_data: Path, tmp_path: Path) -> None:
    counts = ingest.fn([str(real_data / "clips")], str(tmp_path / "data"), **SMALL)
    assert counts["rows"] == counts["done"] == len(files(real_data / "clips")), outcomes(tmp_path / "data")
    assert not lint(tmp_path / "data")
    assert len(torch.cat(list(batches(tmp_path / "data")))) == counts["done"]


def test_every_odd_file_ends_as_a_clip_or_with_a_cause(real_data: Path, tmp_path: Path) -> None:
    counts = ingest.fn([str(real_data / "odd")], str(tmp_path / "data"), **SMALL)
    found = outcomes(tmp_path / "data")
    assert set(found) == files(real_data / "odd")
    assert counts["done"] + counts["failed"] == counts["rows"] == len(found)
    assert {cause for state, cause in found.values() if state == "failed"} <= set(Cause) - {Cause.CRASH, Cause.TIMEOUT}
    assert counts["done"] > 0
    assert not lint(tmp_path / "data")
    assert len(torch.cat(list(batches(tmp_path / "data")))) == counts["done"]


def test_the_same_over_http(real_data: Path, tmp_path: Path) -> None:
    """Through yt-dlp's generic extractor: the files that have the plain endings of the web."""
    names = sorted(name for name in files(real_data / "clips") if name.endswith(".mp4"))[:6]
    names += sorted(name for name in files(real_data / "odd") if name.endswith((".webm", ".mp4")))[:6]
    links = tmp_path / "served"
    links.mkdir()
    for name in names:
        here = next(path for folder in ("clips", "odd") if (path := real_data / folder / name).exists())
        (links / name).write_bytes(here.read_bytes())
    local, remote = tmp_path / "local", tmp_path / "remote"
    with contextlib.suppress(ValueError):
        ingest.fn([str(links)], str(local), **SMALL)
    with serve(links) as url:
        table = tmp_path / "list.csv"
        table.write_text("url\n" + "".join(f"{url}/{name}\n" for name in names))
        ingest.fn([str(table)], str(remote), allow_private=True, **SMALL)
    assert outcomes(remote) == outcomes(local)


def test_talker_with_labels(real_data: Path, tmp_path: Path) -> None:
    ingest.fn([str(real_data / "grid")], str(tmp_path / "data"), label_column="digit", **SMALL)
    dataset = Dataset.open(tmp_path / "data")
    assert len(dataset) == 120
    assert len({labels for labels in dataset.catalog.labels() if labels}) == 10
    assert np.abs(dataset.catalog.column("duration_s") - 3).max() < 0.2
    assert not lint(tmp_path / "data")


def test_svm_on_environmental_sounds(real_data: Path) -> None:
    """Statistics of an 80-band log-mel land where a plain SVM on them does: about 82 % over the five folds."""
    sounds = read_labelled(f"esc50:{real_data / 'esc10'}")
    found = Examples(sounds, ViewConfig(), LoaderConfig(device="cpu"))
    told = probe("svm", whole_sounds(found), sounds.labels, sounds.splits, sounds.folds)
    result = summed_up(Result("esc10", "svm", "", 0, 0, 0), sounds.labels, [(one.split, one.rows, one.names) for one in told])
    assert result.over == 400 and not found.left_out and list(result.splits) == [f"fold {i}" for i in range(1, 6)]
    assert result.chance == pytest.approx(0.1) and result.score == pytest.approx(0.82, abs=0.015)
    assert "6 of 400 files are not 5 s long, as most are: audio/1-172649-F.ogg" in unusual(found)[0]


def test_an_encoder_on_environmental_sounds(real_data: Path) -> None:
    """Features of one that was never trained already beat chance."""
    torch.manual_seed(0)
    config = EncoderConfig("small", "small", 32, 32)
    video, audio = (encoder.eval() for encoder in build_encoders(config))
    trained = Trained(video, audio, config, ViewConfig(n_mels=48, hop=320, n_fft=512), 0)
    sounds, asked = read_labelled(f"esc50:{real_data / 'esc10'}"), EvaluationConfig(("knn",), views=1, baselines=False)
    (result,) = evaluate_files(trained, sounds, LoaderConfig(batch=40, device="cpu"), asked)
    assert result.over == 400 and result.score > 0.3


def test_views_of_real_recordings_are_as_others_make_them(real_data: Path, tmp_path: Path) -> None:
    """By the whole loader without augmentation, the default profile: pictures within 2/255 of PyAV's own at the same instants,
    scaled by PIL; log-mel within 0.01 dB of torchaudio's in float64 down to 90 dB below the loudest band of the instant."""
    links = tmp_path / "some"
    links.mkdir()
    for path in sorted((real_data / "clips").iterdir())[::3]:
        (links / path.name).symlink_to(path)
    ingest.fn([str(links)], str(tmp_path / "data"), workers=2, timeout_s=120.0)
    dataset, view = Dataset.open(tmp_path / "data"), ViewConfig()
    mel = torchaudio.transforms.MelSpectrogram(
        view.audio_rate, view.n_fft, view.window, view.hop, view.mel_low_hz, view.mel_high_hz, n_mels=view.n_mels, norm=None
    ).double()
    names = ("n_frames", "width", "height")
    assert len(dataset) > 8
    for batch in evaluation_batches(dataset, view, LoaderConfig(batch=8, device="cpu"), dataset.rows()):
        for row, video, audio in zip(batch.ids.tolist(), batch.video.numpy(), batch.audio.numpy(), strict=True):
            n_frames, width, height = (int(dataset.numbers(name, [row])[0]) for name in names)
            seen = central_view(view, ClipShape("", n_frames, float(dataset.profile.fps), width, height))
            members = dataset.read(row)
            with av.open(io.BytesIO(members["mp4"])) as container:
                frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert len(frames) == n_frames
            top, left, tall, wide = seen.crop
            box = left, top, left + wide, top + tall
            for number, picture in zip(
                view.frame_numbers(seen.start_frame, dataset.profile.fps), video.swapaxes(0, 1), strict=True
            ):
                frame = frames[min(number, n_frames - 1)]
                expected = np.asarray(Image.fromarray(frame).resize((view.size, view.size), Image.Resampling.BILINEAR, box))
                found = picture.transpose(1, 2, 0) * PICTURE_STD + PICTURE_MEAN
                assert np.abs(found - expected).mean() < 2
            with av.open(io.BytesIO(members["flac"])) as container:
                sound = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)]) / 32768
            first, count = round(seen.sound_s * view.audio_rate), round(view.view_s * view.audio_rate)
            sound = np.pad(sound, (0, max(0, first + count - len(sound))))[first : first + count]
            expected_db = 10 * np.log10(mel(torch.from_numpy(sound)).numpy().clip(10 ** (FLOOR_DB / 10)))
            found_db = audio[0] * view.mel_std_db + view.mel_mean_db
            off = np.abs(found_db - expected_db)
            # further down than that beside a louder band, float32 has no more digits: torchaudio's own is as far from float64
            assert off[expected_db > np.maximum(FLOOR_DB, expected_db.max(0) - 90)].max(initial=0) < 0.01
            assert off[expected_db > FLOOR_DB].max(initial=0) < 0.1
