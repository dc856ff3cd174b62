"""A batch that failed: kept, loaded without running code, and run again to the first number that is not finite."""

from __future__ import annotations

import json
import logging
import math
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from train_data import TINY, unit

from cmacc.train.config import PretrainConfig, change, to_json
from cmacc.train.contrast.rings import Entries
from cmacc.train.loading.reader import Batch
from cmacc.train.model import CrossModal
from cmacc.train.running.checkpoint import CheckpointError
from cmacc.train.running.checkpointer import CheckpointConfig, Checkpointer
from cmacc.train.running.replay import MOST, load_failing, replay, save_failing, save_weights

KEYS = [f"yt_{i}" for i in range(4)]


def batch(seed: int = 0) -> Batch:
    ids = torch.arange(4)
    return Batch(unit(4, 3, 4, 24, 24, seed=seed), unit(4, 1, 16, 20, seed=seed), ids, ids, ids)


def run_with(
    folder: Path, spoil: Callable[[CrossModal], object] = lambda _: None, config: PretrainConfig = TINY, step: int = 9
) -> Path:
    """A run's folder with a checkpoint of `step`, whose model was spoilt."""
    torch.manual_seed(1)
    model = CrossModal(config.encoders, config.objective)
    with torch.no_grad():
        spoil(model)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"data": ["nowhere"], **to_json(config)}))
    saver = Checkpointer(folder / "checkpoints", CheckpointConfig())
    saver.save(step, {f"model.{name}": tensor for name, tensor in model.state_dict().items()}, {"config": to_json(config)})
    saver.close()
    return folder


def kept(run: Path, *batches: Batch) -> Path:
    for rank, each in enumerate(batches):
        folder = save_failing(run, 12, rank, each, KEYS, "the gradient is not finite", "checkpoints/step-00000009.json")
    assert folder == run / "failed" / "step-00000012"
    return folder


def test_a_batch_is_kept_as_it_was(tmp_path: Path) -> None:
    """Whatever its layout in memory; a second view comes along."""
    given = replace(
        batch(), video=batch().video.to(memory_format=torch.channels_last_3d), second_audio=unit(4, 1, 16, 20, seed=5)
    )
    folder = kept(tmp_path, given, batch(1))
    assert sorted(path.name for path in folder.iterdir()) == [
        "rank-0.json", "rank-0.safetensors", "rank-1.json", "rank-1.safetensors",
    ]  # fmt: skip
    first, second = load_failing(folder)
    assert (first.step, first.rank, first.keys, first.why) == (12, 0, KEYS, "the gradient is not finite")
    for name, tensor in vars(given).items():
        assert tensor is vars(first.batch)[name] is None or torch.equal(tensor, vars(first.batch)[name])
    assert second.rank == 1 and torch.equal(second.batch.video, batch(1).video)
    assert json.loads((folder / "rank-1.json").read_text())["checkpoint"] == "checkpoints/step-00000009.json"


def test_a_run_that_fails_on_and_on_keeps_the_first(tmp_path: Path) -> None:
    for step in range(MOST + 3):
        assert bool(save_failing(tmp_path, step, 0, batch(), KEYS, "")) == (step < MOST)
    assert save_failing(tmp_path, 0, 1, batch(), KEYS, "")
    assert len(list((tmp_path / "failed").iterdir())) == MOST


def test_a_full_disk_does_not_matter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The kernel's own limit, which safetensors tells by an error of its own kind; nothing half written takes up room."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with caplog.at_level(logging.WARNING):
            assert save_failing(tmp_path, 3, 0, batch(), KEYS, "") is None
            assert save_weights(tmp_path, 3, {"large": torch.zeros(1000)}) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the batch of step 3 cannot be kept in" in caplog.text
    assert "the weights of step 3 cannot be kept in" in caplog.text
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_all_is_well(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    found = replay(kept(run, batch()))
    assert found.first is None and (found.step, found.at) == (12, 9)
    assert "is finite throughout" in found.sentence()
    names = [look.where for look in found.looks]
    assert names.index("rank 0: input audio") < names.index("rank 0: video.head.0 (Linear)") < names.index("loss video_to_audio")
    learned = [name for name, _ in CrossModal(TINY.encoders, TINY.objective).named_parameters() if not name.startswith("key_")]
    assert {name for name in names if name.startswith("gradient of ")} == {f"gradient of {name}" for name in learned}
    assert all(look.largest > 0 for look in found.looks if "Linear" in look.where)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_first_input_and_its_clip(tmp_path: Path, ranks: int) -> None:
    spoilt = batch()
    spoilt.audio[2, 0, 5, 5] = math.nan
    found = replay(kept(run_with(tmp_path), *[batch(1)] * (ranks - 1), spoilt))
    assert found.first and found.first.where == f"rank {ranks - 1}: input audio"
    assert found.first.clips == ("yt_2",)
    assert found.sentence().endswith(f"is first not finite at rank {ranks - 1}: input audio (clips yt_2)")


def test_the_first_layer(tmp_path: Path) -> None:
    """Weights that are finite, but of which a layer makes more than a float holds."""

    def spoil(model: CrossModal) -> None:
        model.video.head[0].weight.mul_(1e30)
        model.video.head[-1].weight.fill_(1e30)

    found = replay(kept(run_with(tmp_path, spoil), batch()))
    last = len(CrossModal(TINY.encoders, TINY.objective).video.head) - 1
    assert found.first and found.first.where == f"rank 0: video.head.{last} (Linear)"


def test_a_weight(tmp_path: Path) -> None:
    run = run_with(tmp_path, lambda model: model.key_audio.head[0].bias.fill_(math.inf))
    found = replay(kept(run, batch()))
    assert found.first and found.first.where == "weight key_audio.head.0.bias"


def test_a_key_of_the_dictionary(tmp_path: Path) -> None:
    def spoil(model: CrossModal) -> None:
        keys = unit(4, TINY.encoders.width)
        keys[1, 1] = math.nan
        ids = torch.arange(10, 14)
        model.memory.dictionary_video.enqueue(Entries(keys, ids, ids, ids, ids))

    found = replay(kept(run_with(tmp_path, spoil), batch()))
    assert found.first and found.first.where == "keys of dictionary_video"
    assert not next(look for look in found.looks if look.where == "loss audio_to_video").finite
    assert next(look for look in found.looks if look.where == "loss video_to_audio").finite


def test_without_keys(tmp_path: Path) -> None:
    config = change(TINY, {"objective.negatives": "batch"})
    found = replay(kept(run_with(tmp_path, config=config), batch()))
    assert found.first is None and not [look for look in found.looks if "key" in look.where]


def test_before_the_first_checkpoint(tmp_path: Path) -> None:
    """The weights it began with, which its seed gives."""
    (tmp_path / "config.json").write_text(json.dumps({"data": ["nowhere"], **to_json(TINY)}))
    found = replay(kept(tmp_path, batch()))
    assert (found.first, found.at) == (None, 0)
    torch.manual_seed(TINY.seed)
    model = CrossModal(TINY.encoders, TINY.objective).train()
    with torch.no_grad():
        expected = model.audio.head(model.audio.features(batch().audio)).abs().max().item()
    last = [look for look in found.looks if look.where.startswith("rank 0: audio.head.") and "Linear" in look.where][-1]
    assert last.largest == pytest.approx(expected, rel=1e-5)
    with pytest.raises(CheckpointError):
        replay(tmp_path / "failed" / "step-00000012", str(tmp_path / "checkpoints" / "step-00000003.json"))


def test_a_checkpoint_of_another_version(tmp_path: Path) -> None:
    """It is not taken for a run that has none, nor does another network's end in a traceback."""
    folder = kept(run_with(tmp_path / "other", config=change(TINY, {"encoders.width": 8})), batch())
    (tmp_path / "other" / "config.json").write_text(json.dumps({"data": [], **to_json(TINY)}))
    with pytest.raises(CheckpointError, match=r"holds what this version of cmacc does not take \(.*size mismatch .*cmacc 0"):
        replay(folder)
    (tmp_path / "other" / "checkpoints" / "latest").write_text("step-00000009.pt")
    with pytest.raises(CheckpointError, match="format 1"):
        replay(folder)
    (tmp_path / "other" / "config.json").write_text(json.dumps({"data": [], **to_json(TINY), "checkpoint_every": 4}))
    with pytest.raises(ValueError, match=r"config.json is not what this version writes \(there is no option checkpoint_every"):
        replay(folder)


def test_a_checkpoint_by_name(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    run_with(tmp_path, step=15)
    assert replay(kept(run, batch())).at == 15
    assert replay(kept(run, batch()), str(run / "checkpoints" / "step-00000009.json")).at == 9


def test_the_weights_of_the_step_itself(tmp_path: Path) -> None:
    """Kept of the first step that failed, they go before the checkpoint's; by name that can still be had."""
    run = run_with(tmp_path)
    folder = kept(run, batch())
    torch.manual_seed(1)
    model = CrossModal(TINY.encoders, TINY.objective)
    with torch.no_grad():
        model.video.head[0].bias[0] = math.nan
    assert save_weights(run, 12, model.state_dict()) == folder / "weights.safetensors"
    assert save_weights(run, 13, model.state_dict()) is None
    found = replay(folder)
    assert (found.at, found.step) == (12, 12) and found.first and found.first.where == "weight video.head.0.bias"
    assert replay(folder, str(run / "checkpoints" / "step-00000009.json")).first is None
    (folder / "weights.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="give --checkpoint"):
        replay(folder)


@pytest.mark.parametrize("damage", ["no folder", "empty", "no tensors", "cut", "not json", "a field", "no config"])
def test_what_is_no_such_folder_is_one_sentence(tmp_path: Path, damage: str) -> None:
    run = run_with(tmp_path)
    folder = kept(run, batch())
    tensors = folder / "rank-0.safetensors"
    if damage == "no folder":
        folder = run / "failed" / "step-1"
    elif damage == "empty":
        (folder / "rank-0.json").unlink()
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage == "not json":
        (folder / "rank-0.json").write_bytes(b"\x80\x04cos\nsystem\n")
    elif damage == "a field":
        save_file({**load_file(tensors), "more": torch.ones(1)}, tensors)
    else:
        (run / "config.json").unlink()
    with pytest.raises(ValueError, match=r"; give RUN/failed/step-…") as raised:
        replay(folder)
    assert "\n" not in str(raised.value)
