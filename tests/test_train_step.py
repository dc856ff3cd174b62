"""One training step: what a number that is not finite leaves as it was, bit for bit, and in which ways it may be computed."""

from __future__ import annotations

import copy
import math
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from train_data import TINY, unit

from cmacc.train.config import PretrainConfig, change
from cmacc.train.contrast.rings import Entries
from cmacc.train.loading.loader import Batch
from cmacc.train.model import CrossModal
from cmacc.train.networks.batchnorm import frozen_statistics
from cmacc.train.optimiser import optimiser_tensors
from cmacc.train.running.distributed import World
from cmacc.train.step import TrainingStep

CONFIG = change(TINY, {"optimiser.weight_decay": 0.1, "objective.negatives": "batch+dictionary"})


def batch(seed: int = 0, first: int = 0, size: int = TINY.loader.batch) -> Batch:
    ids = torch.arange(first, first + size)
    return Batch(unit(size, 3, 4, 24, 24, seed=seed), unit(size, 1, 16, 20, seed=seed), ids, ids, ids)


def made(config: PretrainConfig = CONFIG) -> tuple[CrossModal, TrainingStep]:
    torch.manual_seed(0)
    model = CrossModal(config.encoders, config.objective).train()
    return model, TrainingStep(config, model, config.optimiser.build(model.learned().values()), World())


def state(model: CrossModal, step: TrainingStep) -> dict[str, Tensor]:
    """Copies of query encoders, their statistics, and the optimiser's moments and counters."""
    tensors = {name: t for name, t in model.state_dict().items() if name.startswith(("video.", "audio."))}
    return {name: t.clone() for name, t in (tensors | optimiser_tensors(step.optimiser, model.learned().items())).items()}


@pytest.mark.parametrize("where", ["clip", "gradient"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_no_bit(monkeypatch: pytest.MonkeyPatch, where: str, bad: float) -> None:
    """Neither weights, by decay or momentum, nor moments and counters. The step after it is the one that would have been."""
    model, step = made()
    for number in range(2):
        assert step(batch(number, 4 * number), number).ok
    other, unspoilt = copy.deepcopy(model), state(model, step)
    spoilt = batch(9)
    norms = TrainingStep._norms

    def not_finite(self: TrainingStep) -> dict[str, Tensor]:
        next(self.model.audio.parameters()).grad.view(-1)[0] = bad  # type: ignore[union-attr]
        return norms(self)

    if where == "clip":
        spoilt.audio[1, 0, 3, 3] = bad
    with monkeypatch.context() as patch:
        if where == "gradient":
            patch.setattr(TrainingStep, "_norms", not_finite)
        stepped = step(spoilt, 2)
    assert not stepped.ok
    step.take_back(stepped)
    found = state(model, step)
    counters = [name for name in found if name.endswith("num_batches_tracked")]
    assert counters
    assert found.keys() == unspoilt.keys()
    assert [n for n in found if n not in counters and not torch.equal(found[n], unspoilt[n])] == []
    assert all(t.isfinite().all() for t in model.state_dict().values())
    for name, key in (("video", model.key_video), ("audio", model.key_audio)):  # they follow weights that stand still
        for k, before, q in zip(key.parameters(), getattr(other, f"key_{name}").parameters(), getattr(model, name).parameters(),
                                strict=True):  # fmt: skip
            assert ((k - q).abs() <= (before - q).abs() + 1e-7).all()
    assert step(batch(3, 8), 3).ok
    assert [n for n, t in state(model, step).items() if n.endswith("weight") and torch.equal(t, found[n])] == []


def test_steps_that_are_told_late_are_taken_back_all_the_same() -> None:
    """As on a GPU, whose host hears of a step after the next one: two in a row, the second of which began with what the first
    had spoilt."""
    model, step = made()
    assert step(batch(0), 0).ok
    before = [buffer.clone() for buffer in model.statistics()]
    first, second = batch(1), batch(2)
    first.audio[0, 0, 0, 0] = second.audio[2, 0, 0, 0] = math.nan
    bad = [step(first, 1), step(second, 2)]
    assert not all(buffer.isfinite().all() for buffer in model.statistics())
    for stepped in bad:
        step.take_back(stepped)
    assert all(torch.equal(*pair) for pair in zip(before, model.statistics(), strict=True))


def test_candidates_move_no_statistics_however_bad_they_are() -> None:
    model, step = made(change(CONFIG, {"objective.pool": "fresh"}))
    assert step(batch(0), 0, step.encode_candidates(batch(5, 20, 16), 0, 16)).ok
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if name.startswith("key_")}
    bad = batch(6, 40, 16)
    bad.video[3] = math.nan
    video, audio = step.encode_candidates(bad, 1, 16)
    assert not video.keys.isfinite().any()
    assert audio.keys.isfinite().all()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers() if name in before)
    assert step(batch(1), 1, (video, audio)).ok
    assert all(t.isfinite().all() for t in model.state_dict().values())
    with frozen_statistics(model):
        again: tuple[Entries, Entries] = step.encode_keys(batch(7), 2)
        assert torch.equal(step.encode_candidates(batch(7), 2, 4)[0].keys, again[0].keys)


def losses(config: PretrainConfig, steps: int = 4) -> list[float]:
    _, step = made(config)
    found = []
    for number in range(steps):
        stepped = step(batch(number, 4 * number), number)
        assert stepped.ok
        found.append(float(stepped.contrast.loss.detach()))
    return found


@pytest.mark.parametrize("changes", [
    {}, {"compute.micro_batch": 3, "encoders.norm": "group"}, {"compute.checkpointing": True},
    {"objective.form": "last_layer", "optimiser.clip": 0.1},
])  # fmt: skip
def test_in_bfloat16_the_losses_are_nearly_the_same(changes: dict[str, Any]) -> None:
    config = change(CONFIG, changes)
    expected = losses(config)
    found = losses(replace(config, compute=replace(config.compute, precision="bf16")))
    assert found != expected
    assert found == pytest.approx(expected, rel=0.1)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler, which torch.compile needs on a CPU")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_compiled_the_losses_are_nearly_the_same(precision: str) -> None:
    """By torch's own compiler, as on a GPU."""
    torch.compiler.reset()
    changes = {"compute.precision": precision, "compute.compile": "off"}
    expected = losses(change(CONFIG, changes))
    found = losses(change(CONFIG, {**changes, "compute.compile": "on"}))
    assert torch._dynamo.utils.counters["inductor"]
    assert found == pytest.approx(expected, rel=1e-4 if precision == "float32" else 0.1)
