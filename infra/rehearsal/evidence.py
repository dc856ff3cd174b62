"""What a run has left behind, read without the product's own readers, and in what two runs differ."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

_OF_THE_CLOCK = ("speed/", "memory/", "selection/seconds", "selection/share")
_UNFINISHED = ["SCHEDULED", "PENDING", "RUNNING", "CANCELLING"]


@dataclass(frozen=True)
class Evidence:
    """clips: sha256 of each member of each ingested clip, by its name; shards: sha256 of each re-sharded tar; curve: the numbers
    of each step; weights: sha256 of the last checkpoint's tensors, optimiser and dictionaries among them."""

    clips: dict[str, str] = field(default_factory=dict)
    shards: dict[str, str] = field(default_factory=dict)
    curve: dict[str, dict[str, Any]] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)


def clips_of(tars: Iterable[bytes]) -> dict[str, str]:
    """sha256 of each member, by `KEY.extension`. Raises ValueError for a clip that is there twice."""
    found: dict[str, str] = {}
    for data in tars:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                if member.name in found:
                    raise ValueError(f"{member.name} is in two shards")
                file = tar.extractfile(member)
                assert file
                found[member.name] = hashlib.sha256(file.read()).hexdigest()
    return found


def curve_of(metrics: Path) -> dict[str, dict[str, Any]]:
    """The numbers of each record of a `metrics.jsonl`, but for those that tell of the clock or of the machine."""
    found = {}
    for line in metrics.read_text().splitlines():
        record = json.loads(line)
        kind = "held-out clips" if any(name.startswith("held_out/") for name in record) else "loss"
        numbers = {name: value for name, value in record.items() if not name.startswith(_OF_THE_CLOCK)}
        found[f"{kind} at step {record['step']}"] = numbers
    return found


def batches_of(checkpoints: Mapping[int, bytes]) -> dict[str, list[int]]:
    """Clips of each global batch in their order, by step, as the candidate pools in checkpoints hold them.

    checkpoints: safetensors, by step. A pool keeps a clip's last key alone: of one that came back before the next checkpoint
    it tells the later step.
    """
    found: dict[str, list[int]] = {}
    before = 0
    for step, data in sorted(checkpoints.items()):
        tensors = safetensors.numpy.load(data)
        ids, born = (tensors[f"model.memory.pool_video.{name}"] for name in ("ids", "born"))
        for each in range(before, step):
            found[f"batch of step {each + 1}"] = ids[(born == each) & (ids >= 0)].astype(np.int64).tolist()
        before = step
    return found


def unfinished(prefect_url: str) -> list[str]:
    """Flow runs that are not in a final state, `name (state)` each."""
    question = {"flow_runs": {"state": {"type": {"any_": _UNFINISHED}}}, "limit": 200}
    request = urllib.request.Request(
        f"{prefect_url}/flow_runs/filter", json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return [f"{run['name']} ({run['state_name']})" for run in json.load(answer)]


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any], what: str) -> list[str]:
    """A sentence for each thing of a kind that is missing, too much or another."""
    sentences = [f"{what}: {name} is missing" for name in wanted if name not in found]
    sentences += [f"{what}: {name} is there, and should not be" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        if wanted[name] != found[name]:
            sentences.append(f"{what}: {name} {_how(wanted[name], found[name])}")
    return sorted(sentences)


def _how(wanted: Any, found: Any) -> str:
    if isinstance(wanted, dict):
        names = [n for n in sorted(wanted.keys() | found.keys()) if wanted.get(n) != found.get(n)]
        return f"has {names[0]} {found.get(names[0])}, not {wanted.get(names[0])}"
    return f"is {_short(found)}, not {_short(wanted)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
