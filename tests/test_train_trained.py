"""Trained encoders: out of a checkpoint, into an export, back, and the embeddings stay the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from train_data import LOADER, TINY, VIEW, clips, unit, with_members, write_dataset

from cmacc.train.checkpoint import CheckpointError, save_checkpoint
from cmacc.train.config import change, to_json
from cmacc.train.embed import embed_dataset
from cmacc.train.model import CrossModal
from cmacc.train.trained import Trained, export, load_trained


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
    save_checkpoint(folder / "checkpoints", 7, {"config": json.dumps(to_json(TINY)), "model": model.state_dict()})
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
    by_file = load_trained(run / "checkpoints" / "step-00000007.pt")
    assert all(torch.equal(a, b) for a, b in zip(outputs(first), outputs(by_file), strict=True))


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoders.json", "encoders.safetensors"]
    assert all(torch.equal(a, b) for a, b in zip(outputs(first), outputs(load_trained(tmp_path)), strict=True))


def edit_json(act: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "encoders.json"
        data = json.loads(path.read_text())
        path.write_text(json.dumps(act(data) or data))

    return edit


def edit_weights(act: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "encoders.safetensors")
        act(weights)
        save_file(weights, folder / "encoders.safetensors")

    return edit


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no weights": lambda f: (f / "encoders.safetensors").unlink(),
    "weights cut": lambda f: (f / "encoders.safetensors").write_bytes((f / "encoders.safetensors").read_bytes()[:500]),
    "weights empty": lambda f: (f / "encoders.safetensors").write_bytes(b""),
    "weights of noise": lambda f: (f / "encoders.safetensors").write_bytes(np.random.default_rng(0).bytes(400)),
    "a weight missing": edit_weights(lambda w: w.pop("audio.head.0.weight")),
    "a weight too many": edit_weights(lambda w: w.update({"video.more": torch.zeros(1)})),
    "a weight of another shape": edit_weights(lambda w: w.update({"audio.head.0.weight": torch.zeros(2)})),
    "json cut": lambda f: (f / "encoders.json").write_text("{"),
    "json not text": lambda f: (f / "encoders.json").write_bytes(b"\xff\xfe\x00"),
    "json a list": lambda f: (f / "encoders.json").write_text("[1]"),
    "no encoders": edit_json(lambda d: d.pop("encoders") and None),
    "encoders a number": edit_json(lambda d: {**d, "encoders": 5}),
    "unknown backbone": edit_json(lambda d: {**d, "encoders": {**d["encoders"], "video": "x"}}),  # type: ignore[dict-item]
    "impossible view": edit_json(lambda d: {**d, "view": {**d["view"], "size": 0}}),  # type: ignore[dict-item]
    "no step": edit_json(lambda d: {**d, "step": None}),
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


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_trained(tmp_path)


def test_embed_dataset(run: Path, tmp_path: Path) -> None:
    """Columns of unit vectors, row by row those of the encoders; a bad clip gets NaN; a second time replaces them."""
    some = [with_members(clip, flac=b"bad") if i == 2 else clip for i, clip in enumerate(clips()[:6])]
    data = write_dataset(tmp_path / "data", some)
    trained, progress = load_trained(run), []
    with torch.no_grad():
        trained.video.head[2].bias.add_(torch.randn(16, generator=torch.Generator().manual_seed(0)))
    names = embed_dataset(load_trained(run), data, "try", LOADER, progress.append)
    assert names == ("video-try", "audio-try")
    assert progress[-1] == 5
    before = data.catalog.column("video-try")
    embed_dataset(trained, data, "try", replace(LOADER, batch=3))
    video, audio = (type(data).open(data.url).catalog.column(name) for name in names)
    assert video.dtype == np.float16
    assert video.shape == audio.shape == (6, 16)
    assert np.isnan(video).all(1).tolist() == np.isnan(audio).all(1).tolist() == [False, False, True, False, False, False]
    good = [0, 1, 3, 4, 5]
    assert np.abs(video[good] - before[good]).max() > 0.01
    from cmacc.train.loader import evaluation_batches

    for batch in evaluation_batches(data, VIEW, LOADER, np.array(good)):
        rows = batch.ids.numpy()
        assert np.allclose(video[rows], trained.video(batch.video).detach().numpy(), atol=1e-3)
        assert np.allclose(audio[rows], trained.audio(batch.audio).detach().numpy(), atol=1e-3)


def test_the_view_of_an_export_is_the_runs(tmp_path: Path) -> None:
    config = change(TINY, {"view.n_mels": 20, "encoders.width": 5})
    torch.manual_seed(0)
    model = CrossModal(config.encoders, config.objective)
    save_checkpoint(tmp_path / "checkpoints", 1, {"config": json.dumps(to_json(config)), "model": model.state_dict()})
    again = load_trained(export(load_trained(tmp_path), tmp_path / "export"))
    assert again.view == config.view
    assert again.encoders.width == 5
