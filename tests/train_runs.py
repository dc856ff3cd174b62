"""What a run leaves, and whether two left the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cmacc.train.running.checkpoint import Checkpoint, checkpoint_folder, latest, load


def records(run: Path) -> list[dict[str, Any]]:
    """Its metrics without the clock's."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    clock = ("speed/", "memory/", "selection/seconds", "selection/share")
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(clock)} for line in lines]


def assert_same(run: Path, whole: Path) -> None:
    """The same numbers in the log, and the same bits in the last checkpoint."""
    assert records(run) == records(whole)
    a, b = (last_of(r) for r in (run, whole))
    assert (a.step, a.facts) == (b.step, b.facts)
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        shown = slice(None, -1) if name.endswith(".keys") else ...  # what lies in the slot for dropped entries means nothing
        assert torch.equal(tensor[shown], b.tensors[name][shown]), name
    assert {name.split(".")[1] for name in a.tensors if name.startswith("optimiser.")} == {"exp_avg", "exp_avg_sq", "step"}


def last_of(run: Path) -> Checkpoint:
    address = latest(checkpoint_folder(run))
    assert address
    return load(address)


def assert_tensorboard(run: Path) -> None:
    """Each number of the log once, at its step."""
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("loss/total", "held_out/R@1", "queries/modality_gap"):
        shown = [(event.step, event.value) for event in board.Scalars(name)]
        logged = [(record["step"], float(np.float32(record[name]))) for record in records(run) if name in record]
        assert shown == logged, name
