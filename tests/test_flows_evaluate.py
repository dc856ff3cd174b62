"""`cmacc evaluate`: what is written, what is said, and over how many files a score is."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from media import audio_bytes, video_bytes
from train_data import LOADER, TRAIN_CLIPS, VIEW, clips, with_members, write_dataset

from cmacc.flows import scoring
from cmacc.flows.cli import main
from cmacc.flows.evaluate import evaluate
from cmacc.shards.dataset import Dataset
from cmacc.shards.errors import DatasetError
from cmacc.train.evaluation import clips as module
from cmacc.train.evaluation.pictures import draw
from cmacc.train.evaluation.results import Result, read_results, summed_up, write
from cmacc.train.evaluation.retrieval import within
from cmacc.train.export.folder import write_export
from cmacc.train.export.trained import Trained, load_trained
from cmacc.train.loading.loader import Batch, LoaderConfig, evaluation_batches
from cmacc.train.loading.views import ViewConfig
from cmacc.train.networks.encoders import EncoderConfig, build_encoders


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = EncoderConfig("small", "small", 8, 8)
    video, audio = (encoder.eval() for encoder in build_encoders(config))
    folder = tmp_path_factory.mktemp("model") / "export"
    write_export(Trained(video, audio, config, VIEW, 7), folder)
    return folder


@pytest.fixture
def esc(tmp_path: Path) -> Path:
    """18 sounds of two classes and three folds, one broken, one of another rate."""
    lines = ["filename,fold,category"]
    for i in range(18):
        path = tmp_path / "ESC-50" / "audio" / f"{i:02}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"broken" if i == 4 else audio_bytes(i % 2 * 12, 0.8, 16_000 if i == 7 else 8000))
        lines.append(f"{path.name},{i // 6 + 1},{('low', 'high')[i % 2]}")
    (tmp_path / "ESC-50" / "meta").mkdir()
    (tmp_path / "ESC-50" / "meta" / "esc50.csv").write_text("\n".join([*lines, "gone.flac,1,low"]) + "\n")
    return tmp_path / "ESC-50"


def here(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["cmacc", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_sounds_in_a_table_as_json_and_as_pictures(
    model: Path, esc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores"
    again = ("evaluate", model, "--on", f"esc50:{esc}", "--out", out, "--views", 2, "--batch", 8)
    assert here(monkeypatch, *again, "--protocol", "svm", "--protocol", "knn") == 0
    said = capsys.readouterr().out
    for word in ("step 7", "esc50, svm", "esc50, knn", "trained", "random", "log-mel statistics", "chance", "over"):
        assert word in said
    assert "esc50: 2 left out: audio/gone.flac (not there), audio/04.flac (" in said
    assert "esc50: 1 of 17 files are not of 8000 samples a second, as most are: audio/07.flac" in said
    found = read_results(out)
    assert [(r.protocol, r.encoder) for r in found] == [
        (protocol, encoder) for protocol in ("svm", "knn") for encoder in ("trained", "random", "log-mel statistics")
    ]
    for result in found:
        assert result.task == "esc50" and result.over == 17 and set(result.left_out) == {"audio/gone.flac", "audio/04.flac"}
        assert result.score == pytest.approx(np.mean(list(result.splits.values()))) and len(result.splits) == 3
        assert result.settings["step"] == 7 and torch.__version__.startswith(result.versions["torch"])
        assert result.settings["views"] == ("whole files" if result.encoder == "log-mel statistics" else 2)
        assert ("C" in result.settings) == (result.protocol == "svm") and ("k" in result.settings) == (result.protocol == "knn")
        assert np.sum(result.confusion) == 17 and result.classes == ["high", "low"]
    assert found[2].score == 1, "two tones are told apart by their spectra"
    for name in ("confusion", "classes"):
        assert (out / f"esc50-{name}.png").read_bytes().startswith(b"\x89PNG")
    assert here(monkeypatch, *again, "--protocol", "logistic") == 0
    assert {r.protocol for r in read_results(out)} == {"svm", "knn", "logistic"}, "what other protocols found stays"
    assert [r.score for r in read_results(out)][:6] == [r.score for r in found]


def test_videos_in_the_layout_of_ucf101(model: Path, tmp_path: Path) -> None:
    """Two classes, of which one moves; one video does not decode."""
    root = tmp_path / "UCF-101"
    entries = []
    for i in range(12):
        name = ("Fast", "Slow")[i % 2]
        entries.append(f"{name}/v_{name}_g{i // 2 + 1:02}_c01.mp4")
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / entries[-1]).write_bytes(video_bytes(i, frames=8) if i % 2 else video_bytes(i, frames=8, width=96))
    (root / entries[2]).write_bytes(b"broken")
    (root / "trainlist01.txt").write_text("\n".join(f"{entry} 1" for entry in entries[:8]) + "\n")
    (root / "testlist01.txt").write_text("\n".join(entries[8:]) + "\n")
    places = {"out": str(tmp_path / "out"), "cache": str(tmp_path / "c")}
    scores = evaluate.fn(str(model), [f"ucf101:{root}"], protocols=["knn"], views=2, crops=3, batch=6, **places)
    found = [Result(**each) for each in scores["results"]]
    assert [r.encoder for r in found] == ["trained", "random", "colour and motion"]
    for result in found:
        assert (
            result.task == "ucf101" and result.over == 4 and result.settings["crops"] == 3 and list(result.splits) == ["split 1"]
        )
        assert set(result.left_out) == {entries[2]} and len(result.notes) == 2
    assert scores["retrieval"] is None and (tmp_path / "c").is_dir()
    assert found[0].settings["weights"] == found[1].settings["weights"]


def test_retrieval_among_clips(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across modalities among the held-out clips, and within each with the training clips as a gallery; one clip is broken."""
    these = [with_members(clip, mp4=b"bad") if i == 17 else clip for i, clip in enumerate(clips())]
    data = write_dataset(tmp_path / "held", these)
    scores = evaluate.fn(str(model), [f"retrieval:{data.url}"], views=2, out=str(tmp_path / "out"), batch=4)
    found = {(r.protocol, r.encoder): r for r in (Result(**each) for each in scores["results"])}
    protocols = ("retrieval", "within video", "within audio")
    assert list(found) == [(protocol, encoder) for encoder in ("trained", "random") for protocol in protocols]
    across, inside = found["retrieval", "trained"], found["within audio", "trained"]
    assert across.task == "retrieval-held" and across.over == 5 == inside.over and across.chance == pytest.approx(1 / 5)
    assert list(across.left_out.values()) == ["does not decode"] and across.left_out == inside.left_out
    assert inside.settings["gallery_clips"] == 16 and inside.settings["views"] == 2 and across.settings["split"] == "eval"
    assert scores["retrieval"]["R@1"] == across.score and scores["retrieval"]["clips"] == 5
    trained, sums = load_trained(model), dict[int, np.ndarray]()
    for place in (0.0, 1.0):
        for batch in evaluation_batches(data, VIEW, LOADER, np.delete(data.rows(), 17), place):
            for row, each in zip(batch.ids.tolist(), trained.audio.features(batch.audio).numpy(), strict=True):
                sums[row] = sums.get(row, 0) + each
    labels = data.first_labels(data.rows())
    near, far = [row for row in sums if row < TRAIN_CLIPS], [row for row in sums if row >= TRAIN_CLIPS]
    expected = within(np.stack([sums[r] for r in near]), labels[near], np.stack([sums[r] for r in far]), labels[far])
    assert inside.facts == pytest.approx(expected)
    looks: list[int] = []

    def counted(dataset: Dataset, view: ViewConfig, loader: LoaderConfig, rows: np.ndarray, place: float) -> Iterator[Batch]:
        looks.extend(rows.tolist())
        return evaluation_batches(dataset, view, loader, rows, place)

    monkeypatch.setattr(module, "evaluation_batches", counted)
    again = evaluate.fn(str(model), [f"retrieval:{data.url}"], views=2, out=str(tmp_path / "out"), batch=4)
    assert again["results"] == scores["results"] and set(looks) == {17}, "kept, but for the clip that did not decode"
    looks.clear()
    alone = evaluate.fn(str(model), [f"retrieval:{data.url}"], gallery="", baselines=False, out=str(tmp_path / "out"))
    assert set(looks) == {17}
    assert [(r["protocol"], r["encoder"]) for r in alone["results"]] == [("retrieval", "trained")]
    assert alone["results"][0]["score"] == across.score
    missing = evaluate.fn(str(model), [f"retrieval:{data.url}"], gallery="tarin", baselines=False, out=str(tmp_path / "out"))
    (only,) = missing["results"]
    assert "none is in split 'tarin'" in only["notes"][0] and only["score"] == across.score
    one = write_dataset(tmp_path / "one", these[-1:])
    with pytest.raises(ValueError, match=r"split 'eval' of .* has 1 clip; retrieval needs 2 or more: give --split"):
        evaluate.fn(str(model), [f"retrieval:{one.url}"], gallery="", out=str(tmp_path / "out"))


def test_fine_tuning(model: Path, esc: Path, tmp_path: Path) -> None:
    """Beside the probes, over the same files; its options by name."""
    tuned = {"finetune.epochs": "1", "finetune.head_epochs": "0", "finetune.views": "1", "finetune.batch": "8"}
    given = {"protocols": ["knn"], "views": 1, "baselines": False, "out": str(tmp_path / "out")}
    scores = evaluate.fn(str(model), [f"esc50:{esc}"], finetune=True, options=tuned, **given)
    probed, found = (Result(**each) for each in scores["results"])
    assert (found.protocol, found.encoder, found.over) == ("finetune", "trained", 17) and probed.over == 17
    assert set(found.left_out) == {"audio/gone.flac", "audio/04.flac"} and np.sum(found.confusion) == 17
    assert found.settings["epochs"] == 1 and found.settings["rate_base"] == 1e-4 and found.settings["views"] == 1
    with pytest.raises(ValueError, match=r"option 'finetune.epochs' is of fine-tuning; give --finetune, too"):
        evaluate.fn(str(model), [f"esc50:{esc}"], options=tuned, **given)
    with pytest.raises(ValueError, match="epoch"):
        evaluate.fn(str(model), [f"esc50:{esc}"], finetune=True, options={"finetune.epoch": "1"}, **given)


def test_what_cannot_be_written_is_told_before_the_work(
    model: Path, esc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results that are none of ours, two data sets of one name, a data set that is not there: nothing was computed yet."""
    monkeypatch.setattr(scoring, "evaluate_files", lambda *_, **__: pytest.fail("it was begun"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "esc50.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"esc50.json does not hold results"):
        evaluate.fn(str(model), [f"esc50:{esc}"], out=str(tmp_path / "out"))
    shutil.copytree(esc, tmp_path / "other" / "ESC-50")
    with pytest.raises(ValueError, match=r"would both be called 'esc50'; evaluate on one at a time"):
        evaluate.fn(str(model), [f"esc50:{esc}", f"esc50:{tmp_path}/other/ESC-50"], out=str(tmp_path / "new"))
    with pytest.raises(DatasetError, match="nowhere"):
        evaluate.fn(str(model), [f"esc50:{esc}", f"retrieval:{tmp_path}/nowhere"], out=str(tmp_path / "new"))


def test_results_need_a_place(model: Path, esc: Path) -> None:
    with pytest.raises(ValueError, match="is not a run's folder on this machine; give --out, a folder for the results"):
        evaluate.fn(str(model), [f"esc50:{esc}"])


def test_results_of_other_weights_do_not_mix(tmp_path: Path) -> None:
    """In a run's folder they go into evaluation/; a file that is none of ours is refused by name."""
    (tmp_path / "config.json").write_text("{}")
    of = {w: [Result("t", p, "trained", 0.5, 0.1, 9, settings={"weights": w}) for p in ("svm", "knn")] for w in "ab"}
    write(tmp_path, of["a"][:1])
    write(tmp_path, of["a"][1:])
    assert read_results(tmp_path) == of["a"] == read_results(tmp_path / "evaluation")
    write(tmp_path, of["b"][:1])
    assert read_results(tmp_path) == of["b"][:1]
    elsewhere = replace(of["b"][1], settings={"weights": "b", "data": "/another/of/that/name"})
    write(tmp_path, [elsewhere])
    assert read_results(tmp_path) == [elsewhere], "nor do those of other data"
    (tmp_path / "evaluation" / "x.json").write_text(json.dumps([{"task": 1}]))
    with pytest.raises(ValueError, match=r"x.json does not hold results \(.+\); move it away"):
        read_results(tmp_path)


@pytest.mark.parametrize("classes", [2, 101])
def test_pictures_of_any_number_of_classes(tmp_path: Path, classes: int) -> None:
    labels = np.array([f"class {i:03}" for i in range(classes)]).repeat(3)
    results = [
        summed_up(Result("t", "svm", encoder, 0, 0, 0), labels, [("split 1", np.arange(len(labels)), np.roll(labels, shift))])
        for encoder, shift in (("random", 2), ("trained", 1))
    ]
    assert results[1].score == pytest.approx(2 / 3)
    assert [path.name for path in draw(tmp_path, results)] == ["t-confusion.png", "t-classes.png"]
