"""The monitor's numbers against loops, and the log they are written to."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from train_data import TINY, unit

from cmacc.train.loader import Batch
from cmacc.train.metrics import MetricsLog
from cmacc.train.model import CrossModal
from cmacc.train.monitor import alignment, dictionary_facts, effective_rank, modality_gap, step_facts, uniformity
from cmacc.train.rings import Entries, Ring


def test_numbers_of_embeddings() -> None:
    x, y = unit(9, 5, seed=1), unit(9, 5, seed=2)
    a, b = x.double().numpy(), y.double().numpy()
    assert alignment(x, y).item() == pytest.approx(np.mean([((p - q) ** 2).sum() for p, q in zip(a, b, strict=True)]), rel=1e-5)
    potentials = [math.exp(-2 * ((a[i] - a[j]) ** 2).sum()) for i in range(9) for j in range(i)]
    assert uniformity(x).item() == pytest.approx(math.log(np.mean(potentials)), rel=1e-5)
    assert modality_gap(x, y).item() == pytest.approx(np.linalg.norm(a.mean(0) - b.mean(0)), rel=1e-5)


def test_effective_rank() -> None:
    line = torch.linspace(-1, 1, 20)[:, None] * unit(1, 6)
    assert effective_rank(line).item() == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.cat([torch.eye(6), -torch.eye(6)])).item() == pytest.approx(6, abs=1e-3)
    assert effective_rank(torch.ones(5, 6)).item() == pytest.approx(1, abs=1e-3)


def test_dictionary_facts() -> None:
    ring, keys = Ring(8, 4), unit(5, 4, seed=3)
    assert dictionary_facts(ring, 9) == {"entries": 0.0}
    ids, labels, born = torch.tensor([4, 2, 4, 7, 9]), torch.tensor([1, 0, 1, -1, 5]), torch.tensor([3, 4, 5, 6, 8])
    ring.enqueue(Entries(keys, ids, ids, labels, born))
    found = dictionary_facts(ring, 9)
    cosines = [float(keys[i].double() @ keys[j].double()) for i in range(5) for j in range(5) if i != j]
    assert found["cosine"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert {name: found[name] for name in ("entries", "classes")} == {"entries": 5, "classes": 3}
    assert found["duplicates"] == pytest.approx(0.2)
    assert found["age"] == pytest.approx(np.mean([6, 5, 4, 3, 1]))


def test_a_steps_facts_are_finite_and_its_own() -> None:
    torch.manual_seed(0)
    model = CrossModal(TINY.encoders, TINY.objective)
    ids = torch.arange(4)
    for step in range(2):
        batch = Batch(unit(4, 3, 4, 24, 24, seed=step), unit(4, 1, 16, 20, seed=step), ids + 4 * step, ids + 4 * step, ids)
        result, q_video, q_audio, k_video, k_audio = model(batch, step, torch.Generator())
        model.after_step(result, k_video, k_audio)
    facts = step_facts(model, result, q_video.detach(), q_audio.detach(), 2)
    assert all(math.isfinite(value) for value in facts.values())
    assert facts["loss/total"] == pytest.approx(facts["loss/video_to_audio"] + facts["loss/audio_to_video"])
    assert facts["chance/video_to_audio"] == pytest.approx(math.log(5))
    assert facts["selection/picked"] == 0
    assert facts["dictionary_audio/entries"] == facts["pool_video/entries"] == 8
    u, q = k_video.keys.double(), q_audio.detach().double()  # the newest half of the pool
    p = torch.softmax(torch.cat([model.memory.pool_video.entries.keys[:4].double(), u]) @ q.T / 0.1, 1)
    norms = (p - torch.nn.functional.one_hot(p.argmax(1), 4)).norm(dim=1)
    assert facts["selection/residual_mean"] == pytest.approx(norms.mean().item(), rel=1e-4)
    assert facts["selection/residual_std"] == pytest.approx(norms.std().item(), rel=1e-3)


def test_the_log_drops_what_comes_after_the_step_it_continues_from(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsLog(path)
    for step in (0, 2, 2, 4, 5):
        first.write(step, {"loss": step / 3})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a kill
    assert [r["step"] for r in MetricsLog.read(path)] == [0, 2, 2, 4, 5]
    second = MetricsLog(path, after=4)
    second.write(6, {"loss": 0.1})
    second.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records == [{"step": s, "loss": s / 3} for s in (0, 2, 2, 4)] + [{"step": 6, "loss": 0.1}]
    MetricsLog(path).close()
    assert path.read_text() == ""
    assert list(MetricsLog.read(tmp_path / "none.jsonl")) == []
