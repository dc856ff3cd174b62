"""A run's encoders elsewhere: load_encoder without DALI, the card's own lines, programs and ONNX models, the card."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train_trained import save
from train_data import LOADER, TINY, VIEW, clips, unit, write_dataset

from cmacc.train import load_encoder
from cmacc.train.config import change
from cmacc.train.export import programs
from cmacc.train.export.export import export
from cmacc.train.export.trained import Trained, load_trained
from cmacc.train.loading.loader import evaluation_batches
from cmacc.train.model import CrossModal
from cmacc.train.networks.backbones import AUDIO_BACKBONES, VIDEO_BACKBONES
from cmacc.train.networks.encoders import EncoderConfig, build_encoders

HOSTILE = "a|b <script>alert(1)</script>\n# c"
WITHOUT_DALI = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "nvidia":
            raise ImportError(f"{name} is not on this machine")

sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder as pretraining leaves it: one checkpoint, its configuration, numbers, a result of `cmacc evaluate`."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(3)
    config = change(TINY, {"steps": 7, "objective.tau": 0.3})
    model = CrossModal(config.encoders, config.objective)
    model.video(unit(4, 3, 4, 24, 24)), model.audio(unit(4, 1, 16, 20))
    save(folder / "checkpoints", 7, model, config)
    (folder / "config.json").write_text(json.dumps({"data": [f"s3://user:secret@bucket/{HOSTILE}"]}))
    lines = [{"step": 6, "held_out/R@1": 0.25, "held_out/chance_R@1": 0.125}, {"step": 7, "loss/total": 1.0}]
    lines.append({"step": 9, "held_out/R@1": 0.75, "held_out/chance_R@1": 0.125})  # after the checkpoint
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 10, "held_')
    (folder / "evaluation").mkdir()
    result = {"task": HOSTILE, "protocol": "svm", "encoder": "trained", "score": 0.8125, "chance": 0.1, "over": 400}
    (folder / "evaluation" / "esc50.json").write_text(json.dumps([result]))
    (folder / "evaluation" / "broken.json").write_text("{")
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "one"
    made = export(run, folder, onnx=True)
    assert made.notes == []
    assert sorted(made.files) == sorted(path.name for path in folder.iterdir())
    return folder


def test_the_encoders_are_the_runs(run: Path, exported: Path) -> None:
    """Bit by bit on equal input, of both and of either."""
    truth = load_trained(run)
    encoders, _ = load_encoder(exported)
    video, audio = unit(3, 3, 4, 24, 24, seed=9), unit(3, 1, 16, 20, seed=9)
    alone = [load_encoder(exported, "video")[0](video), load_encoder(str(exported), "audio")[0](audio)]
    for found in (encoders(video, audio), alone, (encoders.video(video), encoders.audio(audio))):
        assert torch.equal(found[0], truth.video(video)) and torch.equal(found[1], truth.audio(audio))
    assert not encoders.training and not any(p.requires_grad for p in encoders.parameters())
    assert torch.equal(encoders.audio.features(audio), truth.audio.features(audio))
    with pytest.raises(ValueError, match="modality is 'sound'; give 'video' or 'audio', or leave it away for both"):
        load_encoder(exported, "sound")  # type: ignore[call-overload]


def test_end_to_end_as_the_trainer_sees_it(run: Path, exported: Path, tmp_path: Path) -> None:
    """From the bytes of a clip: the embedding that the trainer's model makes of the evaluation loader's batch."""
    truth, (encoders, prepare) = load_trained(run), load_encoder(exported)
    data = write_dataset(tmp_path, clips()[:6])
    for batch in evaluation_batches(data, VIEW, LOADER, data.rows()):
        for row, video, audio in zip(batch.ids.tolist(), truth.video(batch.video), truth.audio(batch.audio), strict=True):
            members = data.read(row)
            assert float(encoders.video(prepare.video(members["mp4"])) @ video) > 0.999
            assert float(encoders.audio(prepare.audio(members["flac"])) @ audio) > 0.999


def test_the_cards_lines_elsewhere_and_without_dali(exported: Path, tmp_path: Path) -> None:
    """Copied, and on a machine that has no DALI, in a process of its own; importing cmacc.train alone brings no torch."""
    shutil.copytree(exported, tmp_path / "copied")
    lines = re.search(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    assert lines
    checks = "import cmacc.train\nassert 'torch' not in sys.modules\n"
    ends = "assert not any(name.partition('.')[0] == 'nvidia' for name in sys.modules)\n"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DALI + checks + lines[1] + ends], cwd=tmp_path / "copied", capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert -1 <= float(re.search(r"\[\[(\S+)\]\]", done.stdout)[1]) <= 1  # type: ignore[index]


@pytest.mark.parametrize("name", ["video", "audio"])
def test_programs_are_the_encoders(run: Path, exported: Path, name: str) -> None:
    """The .pt2 as saved, and to rounding the encoder itself, for other batch sizes than it was made with."""
    encoder, shape = getattr(load_trained(run), name), programs.example(name, VIEW).shape[1:]
    made = programs.program(encoder, name, VIEW).module()
    again = programs.load_program(exported / f"{name}.pt2")
    for batch in (1, 3):
        x = unit(batch, *shape, seed=batch)
        embedding, features = again(x)
        assert all(torch.equal(a, b) for a, b in zip(made(x), (embedding, features), strict=True))
        assert torch.allclose(embedding, encoder(x), atol=1e-5)
        assert torch.allclose(features, encoder.features(x), atol=1e-4)
        plain = torch.export.load(str(exported / f"{name}.pt2")).module()(x)
        assert torch.equal(plain[0], embedding)


@pytest.mark.parametrize("name", ["video", "audio"])
def test_onnx_models_are_the_encoders(run: Path, exported: Path, name: str) -> None:
    import onnxruntime

    encoder, shape = getattr(load_trained(run), name), programs.example(name, VIEW).shape[1:]
    session = onnxruntime.InferenceSession(exported / f"{name}.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = unit(batch, *shape, seed=batch)
        embedding, features = session.run(list(programs.OUTPUTS), {"input": x.numpy()})
        assert np.abs(embedding - encoder(x).numpy()).max() < 1e-5
        assert np.abs(features - encoder.features(x).numpy()).max() < 1e-4


@pytest.mark.long
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(("kind", "name"), [*(("audio", n) for n in AUDIO_BACKBONES), *(("video", n) for n in VIDEO_BACKBONES)])
def test_every_backbone_converts(kind: str, name: str, norm: str) -> None:
    import onnxruntime

    view = replace(VIEW, frames=8, size=32)
    config = EncoderConfig(**{"video": "small", "audio": "small", kind: name}, width=16, hidden=16, bands=16, norm=norm)  # type: ignore[arg-type]
    video, audio = build_encoders(config)
    encoder = (video if kind == "video" else audio).eval().requires_grad_(False)
    made = programs.program(encoder, kind, view)
    x = torch.randn(3, *programs.example(kind, view).shape[1:])
    assert torch.allclose(made.module()(x)[0], encoder(x), atol=1e-5)
    session = onnxruntime.InferenceSession(programs.onnx_model(made), providers=["CPUExecutionProvider"])
    assert np.abs(session.run(["embedding"], {"input": x.numpy()})[0] - encoder(x).numpy()).max() < 1e-5


def test_no_file_holds_a_pickle(exported: Path, tmp_path: Path) -> None:
    """Nor is one that does opened as a program."""
    for path in exported.glob("*.pt2"):
        with zipfile.ZipFile(path) as archive:
            for part in archive.namelist():
                data = archive.read(part)
                assert b"PROTO" not in data[:8] and not data.startswith((b"\x80\x02", b"\x80\x04", b"PK")), part
    encoder = torch.nn.Linear(2, 2)
    torch.export.save(torch.export.export(encoder, (torch.zeros(1, 2),)), tmp_path / "foreign.pt2")
    with pytest.raises(
        ValueError, match=r"foreign.pt2 holds a pickle \(.*sample_inputs/model.pt\), which could run any code; take"
    ):
        programs.load_program(tmp_path / "foreign.pt2")
    (tmp_path / "cut.pt2").write_bytes((exported / "audio.pt2").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cut.pt2 is not a program this version can load \(.+\); export it again"):
        programs.load_program(tmp_path / "cut.pt2")


def test_the_card_says_what_was_trained(run: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "# Encoders of picture and sound, step 7" in card
    assert "| R@1 | 0.250 | 0.125 |" in card and "at step 6 (" in card  # not those of after the checkpoint
    assert "secret" not in card and "<script>" not in card and "\n# c" not in card
    row = next(line for line in card.splitlines() if "| svm |" in line)
    assert row == "| a\\|b &lt;script>alert(1)&lt;/script> # c | svm | trained | 0.812 | 0.100 | 400 |"
    assert f"`{load_trained(run).hash[:16]}`" in card
    recipe = next(line for line in card.splitlines() if line.startswith("| recipe |"))
    assert "`objective.tau=0.3`" in recipe and "`steps=7`" in recipe and "checkpoint." not in recipe


def test_a_card_without_a_run(exported: Path, tmp_path: Path) -> None:
    """Of an export, of which no numbers are known; and of a checkpoint, whose run lies above it."""
    export(exported, tmp_path / "again", programs=False)
    card = (tmp_path / "again" / "README.md").read_text()
    assert "no held-out numbers" in card and "no run's `config.json` was there" in card and ".pt2" not in card
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == [
        "README.md", "audio.safetensors", "encoders.json", "video.safetensors",
    ]  # fmt: skip


def test_of_one_checkpoint(run: Path, tmp_path: Path) -> None:
    export(f"{run}/checkpoints/step-00000007.safetensors", tmp_path / "one", programs=False)
    assert "| R@1 | 0.250 | 0.125 |" in (tmp_path / "one" / "README.md").read_text()


def test_over_an_export_nothing_of_it_stays(run: Path, exported: Path, tmp_path: Path) -> None:
    """Programs would be of other weights."""
    shutil.copytree(exported, tmp_path / "one")
    export(run, tmp_path / "one", programs=False)
    assert not [*(tmp_path / "one").glob("*.pt2"), *(tmp_path / "one").glob("*.onnx")]


def test_a_readme_of_somebody_else_is_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"has a README.md that is of no export; give a folder of its own"):
        export(run, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"


def test_what_does_not_convert_is_said(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no such operator\nand much more")

    monkeypatch.setattr(torch.onnx, "export", fails)
    made = export(run, tmp_path / "one", programs=False, onnx=True)
    said = "audio.onnx was not written: the network does not convert (no such operator); use its .pt2 program"
    assert made.notes[1] == said and "audio.onnx" not in made.files
    assert said in (tmp_path / "one" / "README.md").read_text()


def test_without_onnx_one_sentence_says_what_to_install(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed; run: pip install 'cmacc\[onnx\]'"):
        export(run, tmp_path / "one", onnx=True)
    assert not (tmp_path / "one").exists()


def test_an_export_killed_between_its_files_is_refused(run: Path, exported: Path, tmp_path: Path) -> None:
    """Weights of the new one beside the description of the old one."""
    shutil.copytree(exported, tmp_path / "one")
    trained = load_trained(run)
    with torch.no_grad():
        trained.video.head[2].bias += 1
    other = tmp_path / "other"
    from cmacc.train.export.folder import write_export

    write_export(Trained(trained.video, trained.audio, trained.encoders, trained.view, 8), other)
    shutil.copy(other / "video.safetensors", tmp_path / "one")
    with pytest.raises(ValueError, match=r"video.safetensors is not the one that encoders.json is of"):
        load_encoder(tmp_path / "one")
