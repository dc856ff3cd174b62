"""The monitor's numbers against loops, and its clock."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from train_data import unit

from cmacc.train.contrast.losses import info_nce
from cmacc.train.contrast.rings import EMPTY, Entries, Ring
from cmacc.train.running import monitor
from cmacc.train.running.clock import Clock, resident_bytes
from cmacc.train.running.monitor import alignment, effective_rank, gradient_facts, modality_gap, step_facts, to_host, uniformity


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
    assert effective_rank(torch.tensor([[1.0, 2], [3, math.nan]])).isnan()


def entries(n: int, *, seed: int, step: int = 0, first: int = 0, labels: list[int] | None = None) -> Entries:
    ids = torch.arange(first, first + n)
    return Entries(unit(n, 6, seed=seed), ids, ids, torch.tensor(labels or [EMPTY] * n), torch.full_like(ids, step))


class Rings(torch.nn.Module):
    """As `objective.Memory`."""

    def __init__(self, **rings: Ring) -> None:
        super().__init__()
        for name, ring in rings.items():
            self.add_module(name, ring)


def told(memory: torch.nn.Module | None, picked: Entries, step: int = 9, **options: object) -> dict[str, float]:
    q_video, q_audio = unit(4, 6, seed=1), unit(4, 6, seed=2)
    nothing, none, all_others = torch.zeros(0, 6), torch.zeros(4, 0, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)
    terms = {
        "video_to_audio": info_nce(q_video, q_audio, nothing, none, 0.2, all_others),
        "audio_to_video": info_nce(q_audio, q_video, nothing, none, 0.2, all_others),
    }
    picks = {"video": picked, "audio": picked._replace(ids=torch.full_like(picked.ids, EMPTY))}
    return to_host(step_facts(terms, q_video, q_audio, memory, picks, step, 0.1, **options))  # type: ignore[arg-type]


def test_a_dictionary() -> None:
    ring, keys = Ring(8, 4), unit(5, 4, seed=3)
    ids, labels, born = torch.tensor([4, 2, 4, 7, 9]), torch.tensor([1, 0, 1, -1, 5]), torch.tensor([3, 4, 5, 6, 8])
    ring.enqueue(Entries(keys, ids, ids, labels, born))
    found = told(Rings(dictionary_audio=ring, dictionary_video=Ring(8, 4)), entries(2, seed=4))
    cosines = [float(keys[i].double() @ keys[j].double()) for i in range(5) for j in range(5) if i != j]
    assert {name: value for name, value in found.items() if name.startswith("dictionary")} == pytest.approx(
        {
            "dictionary_audio/entries": 5,
            "dictionary_audio/cosine": np.mean(cosines),
            "dictionary_audio/duplicates": 0.2,
            "dictionary_audio/age": np.mean([6, 5, 4, 3, 1]),
            "dictionary_audio/age_max": 6,
            "dictionary_audio/classes": 3,
            "dictionary_video/entries": 0,
        },
        abs=1e-6,
    )


def test_a_full_dictionary_without_labels() -> None:
    """Nothing is told of classes; a key that was overwritten does not count."""
    ring = Ring(4, 6)
    ring.enqueue(entries(6, seed=5, step=2))
    ring.enqueue(entries(1, seed=6, step=7, first=5))
    found = told(Rings(dictionary_video=ring), entries(2, seed=4))
    names = {name for name in found if name.startswith("dictionary")}
    assert names == {f"dictionary_video/{fact}" for fact in ("entries", "cosine", "duplicates", "age", "age_max")}
    assert found["dictionary_video/duplicates"] == 0.25
    assert found["dictionary_video/age"] == pytest.approx((3 * 7 + 2) / 4)


def test_picks_and_residuals() -> None:
    """Of both pools, each under the other modality's queries; slots that are empty, and picks that were none, do not count."""
    video, audio = Ring(40, 6, unique=True), Ring(40, 6, unique=True)
    video.enqueue(entries(20, seed=7)), audio.enqueue(entries(30, seed=8))
    picked = entries(3, seed=4, step=5)
    picked = picked._replace(ids=torch.tensor([7, EMPTY, 8]), born=torch.tensor([5, 1, 2]))
    memory = Rings(dictionary_video=Ring(4, 6), pool_video=video, pool_audio=audio)
    found = told(memory, picked)
    assert (found["selection/picked"], found["selection/age"]) == (2, (4 + 7) / 2)
    for name, n, seed, queries in (("video", 20, 7, 2), ("audio", 30, 8, 1)):
        u, q = unit(n, 6, seed=seed).double(), unit(4, 6, seed=queries).double()
        p = torch.softmax(u @ q.T / 0.1, 1)
        norms = (p - torch.nn.functional.one_hot(p.argmax(1), 4)).norm(dim=1)
        assert found[f"selection/residual_mean_{name}"] == pytest.approx(norms.mean().item(), rel=1e-4)
        assert found[f"selection/residual_std_{name}"] == pytest.approx(norms.std().item(), rel=1e-3)
        assert found[f"pool_{name}/entries"] == n
    fresh = entries(10, seed=9)
    found = told(memory, picked, candidates={"video": fresh, "audio": fresh})
    assert found["pool_video/entries"] == found["pool_audio/entries"] == 10
    assert not [name for name in told(Rings(pool_video=Ring(4, 6)), picked) if "residual" in name]


def test_a_large_pool_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, seen = Ring(10_000, 6, unique=True), []
    pool.enqueue(entries(10_000, seed=7))
    real = monitor.residuals
    monkeypatch.setattr(monitor, "residuals", lambda keys, *rest: (seen.append(len(keys)), real(keys, *rest))[1])
    found = told(Rings(pool_video=pool), entries(2, seed=4))
    assert monitor.SAMPLED <= seen[0] < 1.2 * monitor.SAMPLED
    whole = real(pool.entries.keys, unit(4, 6, seed=2), 0.1).norm(dim=1)
    assert found["selection/residual_mean_video"] == pytest.approx(whole.mean().item(), abs=0.03)
    assert found["pool_video/entries"] == 10_000


def test_the_loss_beside_chance() -> None:
    found = told(None, entries(2, seed=4))
    assert found["loss/total"] == pytest.approx(found["loss/video_to_audio"] + found["loss/audio_to_video"])
    assert found["chance/video_to_audio"] == found["chance/audio_to_video"] == pytest.approx(math.log(4))
    scores = unit(4, 6, seed=1) @ unit(4, 6, seed=2).T
    assert found["accuracy/video_to_audio"] == (scores.argmax(1) == torch.arange(4)).float().mean().item()
    assert all(math.isfinite(value) for value in found.values())
    assert not [name for name in found if name.startswith(("dictionary", "pool"))]


def test_a_batch_of_one_and_a_clip_that_is_not_finite() -> None:
    one, nan = unit(1, 6), torch.full((3, 6), math.nan)
    assert set(to_host(monitor.query_facts(one, one))) == {"queries/alignment", "queries/modality_gap"}
    found = to_host(monitor.query_facts(nan, unit(3, 6)))
    assert math.isnan(found["queries/effective_rank_video"]) and math.isfinite(found["queries/effective_rank_audio"])


def test_gradients_of_each_encoder() -> None:
    video, audio = torch.nn.Linear(3, 2), torch.nn.Linear(2, 2, bias=False)
    (video(torch.ones(1, 3)).sum() + 2 * audio(torch.ones(1, 2)).sum()).backward()
    found = to_host(gradient_facts({"video": video, "audio": audio}))
    assert found["optimiser/gradient_norm_video"] == pytest.approx(math.sqrt(6 + 2))
    assert found["optimiser/gradient_norm_audio"] == pytest.approx(math.sqrt(4 * 4))
    assert found["optimiser/gradient_norm"] == pytest.approx(math.sqrt(8 + 16))
    assert video.weight.grad is not None
    video.weight.grad[0, 0] = math.inf
    assert not math.isfinite(to_host(gradient_facts({"video": video, "audio": audio}))["optimiser/gradient_norm"])


def test_one_transfer_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """No number is fetched by itself, nothing has a shape that depends on the data: each would wait for the device."""
    ring = Ring(8, 6)
    ring.enqueue(entries(5, seed=1, labels=[0, 1, 2, 0, 1]))
    for name in ("item", "__float__", "__bool__", "__int__", "nonzero", "unique", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("it waits for the device"))
    assert told(Rings(dictionary_video=ring, pool_video=ring), entries(2, seed=4))["dictionary_video/classes"] == 3


def test_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    loader, now = SimpleNamespace(waited_s=1.0), [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock(loader, torch.device("cpu"), flops=2e9, peak=1e12, world=2)
    now[0], loader.waited_s = 103.0, 2.0
    clock.restart()
    for _ in range(4):
        clock.tick(50)
    now[0], loader.waited_s = 113.0, 4.5
    found = clock.facts({"selection": 0.5})
    assert found.pop("memory/resident_gb") > 0
    assert found == pytest.approx(
        {
            "speed/clips_per_s": 20,
            "speed/step_s": 2.5,
            "speed/waiting": 0.25,
            "selection/seconds": 0.5,
            "selection/share": 0.2,
            "speed/mfu": 20 * 2e9 / 2e12,
        }
    )
    now[0] = 114.0
    assert clock.facts()["speed/clips_per_s"] == 0
    assert "speed/mfu" not in Clock(loader, torch.device("cpu"), flops=2e9).facts()


def test_resident_memory_grows_with_what_is_held() -> None:
    before = resident_bytes()
    held = torch.ones(50_000_000)
    assert 150e6 < resident_bytes() - before < 400e6
    del held
