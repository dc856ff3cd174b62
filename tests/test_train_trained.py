"""Trained encoders: out of a checkpoint, into an export, back, and the embeddings stay the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from train_data import LOADER, TINY, VIEW, clips, unit, with_members, write_dataset

from cmacc.train.config import PretrainConfig, change, to_json
from cmacc.train.export.folder import write_export
from cmacc.train.export.trained import Trained, load_trained
from cmacc.train.model import CrossModal
from cmacc.train.running.checkpoint import CheckpointError
from cmacc.train.running.checkpointer import CheckpointConfig, Checkpointer
from cmacc.train.search.embed import embed_dataset


def export(trained: Trained, folder: Path) -> Path:
    write_export(trained, folder)
    return folder


def save(folder: str | Path, step: int, model: CrossModal, config: PretrainConfig) -> None:
    saver = Checkpointer(folder, CheckpointConfig(asynchronous=False))
    saver.save(step, {f"model.{name}": tensor for name, tensor in model.state_dict().items()}, {"config": to_json(config)})
    assert not saver.failed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with one checkpoint, of encoders whose running statistics have moved."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(3)
    model = CrossModal(TINY.encoders, TINY.objective)
    with torch.no_grad():
        model.video(unit(4, 3, 4, 24, 24))
        model.audio(unit(4, 1, 16, 20))
        for p in model.key_video.parameters():
            p.fill_(9.0)
    save(folder / "checkpoints", 7, model, TINY)
    torch.save([model.video.state_dict(), model.audio.state_dict()], folder / "truth.pt")
    return folder


def outputs(trained: Trained) -> tuple[torch.Tensor, torch.Tensor]:
    return trained.video(unit(3, 3, 4, 24, 24, seed=9)), trained.audio(unit(3, 1, 16, 20, seed=9))


def test_export_and_load_give_identical_embeddings(run: Path, tmp_path: Path) -> None:
    first = load_trained(run)
    again = load_trained(export(first, tmp_path / "export"))
    assert (again.step, again.encoders, again.view) == (7, TINY.encoders, TINY.view)
    for a, b in zip(outputs(first), outputs(again), strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a.norm(dim=1), torch.ones(3))
        assert not a.requires_grad
    for path in (run / "checkpoints", f"{run}/checkpoints/step-00000007.safetensors"):
        assert all(torch.equal(a, b) for a, b in zip(outputs(first), outputs(load_trained(path)), strict=True))


def test_these_are_the_query_encoders_in_evaluation_mode(run: Path) -> None:
    trained = load_trained(run)
    truth = torch.load(run / "truth.pt")
    for encoder, weights in zip((trained.video, trained.audio), truth, strict=True):
        assert not encoder.training
        assert encoder.state_dict().keys() == weights.keys()
        assert all(torch.equal(t, weights[name]) for name, t in encoder.state_dict().items())
    alone, among = (
        trained.video(unit(1, 3, 4, 24, 24)),
        trained.video(torch.cat([unit(1, 3, 4, 24, 24), unit(3, 3, 4, 24, 24, seed=1)])),
    )
    assert torch.allclose(alone[0], among[0], atol=1e-6)


def test_an_export_over_an_export(run: Path, tmp_path: Path) -> None:
    first = load_trained(run)
    export(first, tmp_path)
    with torch.no_grad():
        for p in first.audio.parameters():
            p.add_(1.0)
    export(first, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audio.safetensors", "encoders.json", "video.safetensors"]
    assert all(torch.equal(a, b) for a, b in zip(outputs(first), outputs(load_trained(tmp_path)), strict=True))


def edit_json(act: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "encoders.json"
        data = json.loads(path.read_text())
        path.write_text(json.dumps(act(data) or data))

    return edit


def edit_weights(act: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """As a forger would, who makes the JSON agree."""

    def edit(folder: Path) -> None:
        path = folder / "audio.safetensors"
        weights = load_file(path)
        act(weights)
        save_file(weights, path)
        stated = json.loads((folder / "encoders.json").read_text())
        stated["files"][path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (folder / "encoders.json").write_text(json.dumps(stated))

    return edit


def put(name: str, data: bytes | Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_bytes(data if isinstance(data, bytes) else data(path.read_bytes()))

    return edit


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no weights": lambda f: (f / "video.safetensors").unlink(),
    "weights cut": put("video.safetensors", lambda data: data[:500]),
    "weights empty": put("audio.safetensors", b""),
    "weights of noise": put("audio.safetensors", np.random.default_rng(0).bytes(400)),
    "weights of the other": lambda f: (f / "audio.safetensors").write_bytes((f / "video.safetensors").read_bytes()),
    "a weight missing": edit_weights(lambda w: w.pop("head.0.weight")),
    "a weight too many": edit_weights(lambda w: w.update({"more": torch.zeros(1)})),
    "a weight of another shape": edit_weights(lambda w: w.update({"head.0.weight": torch.zeros(2)})),
    "json cut": put("encoders.json", b"{"),
    "json not text": put("encoders.json", b"\xff\xfe\x00"),
    "json a list": put("encoders.json", b"[1]"),
    "no encoders": edit_json(lambda d: d.pop("encoders") and None),
    "encoders a number": edit_json(lambda d: {**d, "encoders": 5}),
    "unknown backbone": edit_json(lambda d: {**d, "encoders": {**d["encoders"], "video": "x"}}),  # type: ignore[dict-item]
    "unknown option": edit_json(lambda d: {**d, "encoders": {**d["encoders"], "more": 1}}),  # type: ignore[dict-item]
    "impossible view": edit_json(lambda d: {**d, "view": {**d["view"], "size": 0}}),  # type: ignore[dict-item]
    "no step": edit_json(lambda d: {**d, "step": None}),
    "no files": edit_json(lambda d: {**d, "files": {}}),
    "no weights of format 1": edit_json(lambda d: {**d, "format": 1}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_export_is_one_sentence(run: Path, tmp_path: Path, damage: str) -> None:
    folder = export(load_trained(run), tmp_path / "export")
    DAMAGE[damage](folder)
    with pytest.raises(ValueError, match=r"is not an export this version can load \(.+\); run `cmacc export` again") as raised:
        load_trained(folder)
    assert type(raised.value) is ValueError
    assert str(raised.value).startswith(str(folder))
    assert "\n" not in str(raised.value)


def test_an_export_of_the_first_format(run: Path, tmp_path: Path) -> None:
    """It had one file for both, and neither origin nor digests."""
    first = load_trained(run)
    save_file({name: tensor.contiguous() for name, tensor in first.state().items()}, tmp_path / "encoders.safetensors")
    told = {"cmacc": "0.1.0", "step": 7, "encoders": asdict(TINY.encoders), "view": asdict(TINY.view), "input": {}}
    (tmp_path / "encoders.json").write_text(json.dumps(told))
    again = load_trained(tmp_path)
    assert (again.step, again.view, again.hash) == (7, TINY.view, first.hash)
    assert all(torch.equal(a, b) for a, b in zip(outputs(first), outputs(again), strict=True))
    export(again, tmp_path)
    assert not (tmp_path / "encoders.safetensors").exists()
    assert load_trained(tmp_path).hash == first.hash


def test_an_export_of_a_later_format(run: Path, tmp_path: Path) -> None:
    folder = export(load_trained(run), tmp_path / "export")
    edit_json(lambda d: {**d, "format": 3, "versions": {"cmacc": "9.1"}, "encoders": "of another shape"})(folder)
    with pytest.raises(ValueError, match=r"export is an export of format 3, made by cmacc 9.1; this version reads 2 and before"):
        load_trained(folder)


def test_the_hash_is_of_weights_and_settings(run: Path, tmp_path: Path) -> None:
    first = load_trained(run)
    assert load_trained(export(first, tmp_path)).hash == first.hash == load_trained(run / "checkpoints").hash
    assert replace(first, view=replace(first.view, mel_mean_db=-31.0)).hash != first.hash
    with torch.no_grad():
        before = first.hash
        first.audio.head[2].bias[0] += 1e-6
    assert first.hash != before


def test_where_it_came_from(run: Path, tmp_path: Path) -> None:
    again = load_trained(export(load_trained(run), tmp_path))
    assert again.origin["checkpoint"] == f"{run}/checkpoints/step-00000007.safetensors"
    assert again.origin["config"] == json.loads(json.dumps(to_json(TINY)))
    assert again.origin["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_an_export_at_a_url(run: Path) -> None:
    write_export(load_trained(run), "memory://exports/one")
    assert load_trained("memory://exports/one").hash == load_trained(run).hash


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_trained(tmp_path)


def test_from_a_url(tmp_path: Path) -> None:
    """Given itself, and where the run's own configuration says so."""
    model = CrossModal(TINY.encoders, TINY.objective)
    url = "memory://trained/checkpoints"
    save(url, 3, model, TINY)
    (tmp_path / "config.json").write_text(json.dumps({"checkpoint": {"at": url}}))
    for path in (url, "memory://trained", tmp_path):
        trained = load_trained(path)
        assert trained.step == 3
        assert torch.equal(trained.video.head[0].weight, model.video.head[0].weight)


@pytest.mark.parametrize("kind", ["no configuration", "another configuration", "other encoders"])
def test_a_checkpoint_of_something_else(tmp_path: Path, kind: str) -> None:
    config = to_json(change(TINY, {"encoders.hidden": 99}) if kind == "other encoders" else TINY)
    if kind == "another configuration":
        config["more"] = 1
    model = CrossModal(TINY.encoders, TINY.objective)
    saver = Checkpointer(tmp_path / "checkpoints", CheckpointConfig())
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    saver.save(1, tensors, {} if kind == "no configuration" else {"config": config})
    saver.close()
    with pytest.raises(CheckpointError, match=r"safetensors has no encoders that this version builds \(.+\); use the vers"):
        load_trained(tmp_path)


def test_embed_dataset(run: Path, tmp_path: Path) -> None:
    """Columns of unit vectors, row by row those of the encoders; a bad clip gets NaN; a second time replaces them."""
    some = [with_members(clip, flac=b"bad") if i == 2 else clip for i, clip in enumerate(clips()[:6])]
    data = write_dataset(tmp_path / "data", some)
    trained, progress = load_trained(run), []
    with torch.no_grad():
        trained.video.head[2].bias.add_(torch.randn(16, generator=torch.Generator().manual_seed(0)))
    names = embed_dataset(load_trained(run), data, "try", LOADER, progress.append, scratch=tmp_path)
    assert names == ("video-try", "audio-try")
    assert progress[0] == 0 and progress[-1] == 6
    before = data.catalog.column("video-try")
    embed_dataset(trained, data, "try", replace(LOADER, batch=3), scratch=tmp_path)
    video, audio = (type(data).open(data.url).catalog.column(name) for name in names)
    assert video.dtype == np.float16
    assert video.shape == audio.shape == (6, 16)
    assert np.isnan(video).all(1).tolist() == np.isnan(audio).all(1).tolist() == [False, False, True, False, False, False]
    good = [0, 1, 3, 4, 5]
    assert np.abs(video[good] - before[good]).max() > 0.01
    from cmacc.train.loading.loader import evaluation_batches

    for batch in evaluation_batches(data, VIEW, LOADER, np.array(good)):
        rows = batch.ids.numpy()
        assert np.allclose(video[rows], trained.video(batch.video).detach().numpy(), atol=1e-3)
        assert np.allclose(audio[rows], trained.audio(batch.audio).detach().numpy(), atol=1e-3)


def test_the_view_of_an_export_is_the_runs(tmp_path: Path) -> None:
    config = change(TINY, {"view.n_mels": 20, "encoders.width": 5})
    torch.manual_seed(0)
    model = CrossModal(config.encoders, config.objective)
    save(tmp_path / "checkpoints", 1, model, config)
    again = load_trained(export(load_trained(tmp_path), tmp_path / "export"))
    assert again.view == config.view
    assert again.encoders.width == 5
