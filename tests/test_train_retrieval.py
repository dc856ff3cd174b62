"""Retrieval against a loop, chance against simulation, and what a collapsed encoder scores."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from train_data import EVAL_CLIPS, LOADER, TRAIN_CLIPS, VIEW, clips, unit, with_members, write_dataset

from cmacc.train.evaluation import neighbours
from cmacc.train.evaluation.retrieval import RANKS, Embedded, embed, held_out_rows, retrieval, within
from cmacc.train.loading.loader import evaluation_batches
from cmacc.train.networks.encoders import EncoderConfig, build_encoders

TIED = torch.nn.functional.one_hot(torch.arange(12) % 4, 4).float()
"""Twelve unit vectors of which many are alike, with exact dot products."""


def embedded(video: torch.Tensor, audio: torch.Tensor, labels: list[int]) -> Embedded:
    return Embedded(video, audio, torch.arange(len(video)), torch.tensor(labels))


def plain(queries: torch.Tensor, gallery: torch.Tensor, labels: list[int]) -> dict[str, float]:
    """Every number of one direction, query by query; whatever scores as high as the right answer stands before it."""
    q, g, n = queries.double().tolist(), gallery.double().tolist(), len(labels)
    hits: dict[str, list[bool]] = {}
    for i in range(n):
        scores = [sum(a * b for a, b in zip(q[i], g[j], strict=True)) for j in range(n)]
        before = [j for j in range(n) if j != i and scores[j] >= scores[i]]
        same = [j for j in range(n) if labels[j] == labels[i]]
        for k in RANKS:
            hits.setdefault(f"R@{k}", []).append(len(before) < k)
            if min(labels) >= 0 and len(same) > 1:
                hits.setdefault(f"same_class_R@{k}", []).append(len(set(before) & set(same)) < k)
        if min(labels) >= 0:
            best = max((scores[j] for j in same), default=-math.inf)
            hits.setdefault("class@1", []).append(all(best > scores[j] for j in range(n) if labels[j] != labels[i]))
    return {name: float(np.mean(each)) for name, each in hits.items()}


@pytest.mark.parametrize("labels", ["several", "one alone", "none", "some missing"])
@pytest.mark.parametrize("ties", [False, True])
def test_against_a_loop(labels: str, ties: bool) -> None:
    names = {"several": [i % 3 for i in range(12)], "one alone": [7, *[i % 2 for i in range(11)]], "none": [-1] * 12,
             "some missing": [-1, *[1] * 11]}[labels]  # fmt: skip
    video, audio = unit(12, 4, seed=1), torch.nn.functional.normalize(unit(12, 4, seed=1) + 2 * unit(12, 4, seed=2), dim=1)
    if ties:
        video, audio = TIED, TIED[[0, 1, 2, 3, 5, 4, 7, 6, 8, 9, 10, 11]]
    found = retrieval(embedded(video, audio, names))
    there, back = plain(video, audio, names), plain(audio, video, names)
    assert set(there) == set(found) & set(there)
    for name in there:
        assert found[f"video_to_audio/{name}"] == pytest.approx(there[name])
        assert found[f"audio_to_video/{name}"] == pytest.approx(back[name])
        assert found[name] == pytest.approx((there[name] + back[name]) / 2)
    assert ("class@1" in found) == (min(names) >= 0)
    if not ties:
        assert 0 < found["R@1"] < found["R@5"] < 1


def test_perfect_and_collapsed_encoders() -> None:
    """A collapse, where all is alike or not a number, finds nothing: no number of it may look like learning."""
    labels = [0, 0, 1, 1, 0, 0]
    perfect = retrieval(embedded(torch.eye(6), torch.eye(6), labels))
    assert all(value == 1 for name, value in perfect.items() if "chance" not in name)
    for collapse in (torch.eye(6)[:1].expand(6, 6), torch.full((6, 6), math.nan)):
        found = retrieval(embedded(collapse, collapse, labels))
        assert [found[name] for name in ("R@1", "R@5", "class@1", "same_class_R@1")] == [0, 0, 0, 0]


def test_chance_is_what_random_embeddings_score() -> None:
    """Unequal classes, one of a single clip."""
    labels = [0] * 10 + [1] * 5 + [2] * 2 + [3]
    trials = [retrieval(embedded(unit(18, 16, seed=2 * s), unit(18, 16, seed=2 * s + 1), labels)) for s in range(400)]
    names = [name for name in trials[0] if name.startswith("chance_")]
    assert len(names) == 2 * len(RANKS) + 1
    for name in names:
        scored = np.array([trial[name.removeprefix("chance_")] for trial in trials])
        error = scored.std() / len(scored) ** 0.5
        assert abs(scored.mean() - trials[0][name]) <= 4 * error + 1e-9, name
    assert trials[0]["chance_R@1"] == pytest.approx(1 / 18)
    assert retrieval(embedded(unit(4, 8), unit(4, 8), [-1] * 4))["chance_R@5"] == 1


def test_held_out_rows(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", clips())
    eval_rows = list(range(TRAIN_CLIPS, TRAIN_CLIPS + EVAL_CLIPS))
    assert held_out_rows(data, "eval", EVAL_CLIPS).tolist() == eval_rows
    some = held_out_rows(data, "train", 5)
    assert len(set(some.tolist())) == 5
    assert some.tolist() == sorted(some.tolist())
    assert max(some) < TRAIN_CLIPS
    assert held_out_rows(data, "train", 5).tolist() == some.tolist()
    assert held_out_rows(data, "train", 5, seed=1).tolist() != some.tolist()


def test_embed_is_the_encoders_in_evaluation_mode(tmp_path: Path) -> None:
    """Rows in order, bad ones left out; encoders and their statistics stay as they were, in training mode."""
    data = write_dataset(tmp_path / "data", [with_members(c, mp4=b"bad") if i == 3 else c for i, c in enumerate(clips()[:6])])
    torch.manual_seed(0)
    video, audio = build_encoders(EncoderConfig("small", "small", 8, 8))
    audio.eval()
    before = {name: t.clone() for name, t in video.state_dict().items()}
    found = embed(data, np.arange(6), VIEW, LOADER, video, audio)
    assert (video.training, audio.training) == (True, False)
    assert all(torch.equal(t, before[name]) for name, t in video.state_dict().items())
    assert found.ids.tolist() == [0, 1, 2, 4, 5]
    video.eval()
    with torch.no_grad():
        batches = [b for row in found.ids.tolist() for b in evaluation_batches(data, VIEW, LOADER, np.array([row]))]
        assert torch.allclose(found.video, torch.cat([video(b.video) for b in batches]), atol=1e-6)
        assert torch.allclose(found.audio, torch.cat([audio(b.audio) for b in batches]), atol=1e-6)
    assert torch.allclose(found.video.norm(dim=1), torch.ones(5))
    assert torch.equal(found.labels, torch.cat([b.labels for b in batches]))
    with pytest.raises(ValueError, match="no clip to embed"):
        embed(data, np.array([3]), VIEW, LOADER, video, audio)


@pytest.mark.parametrize("at_once", [1, 30])
def test_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """One row at a time, and blocks of which the last is smaller: the same numbers."""
    one = embedded(unit(7, 4, seed=1), unit(7, 4, seed=2), [0, 0, 1, 1, 1, 2, 2])
    whole = retrieval(one), within(one.video, one.labels, one.audio[:5], one.labels[:5])
    monkeypatch.setattr(neighbours, "_AT_ONCE", at_once)
    assert (retrieval(one), within(one.video, one.labels, one.audio[:5], one.labels[:5])) == whole


def test_within_against_a_loop() -> None:
    """By class, centred per set; one class of the queries is not in the gallery. Names and numbers are labels alike."""
    gallery, queries = unit(60, 5, seed=3) + 2, 3 * unit(25, 5, seed=4) - 1
    of_gallery, of_queries = [f"class {i % 7}" for i in range(60)], [f"class {i % 8}" for i in range(25)]
    found = within(gallery, of_gallery, queries.numpy(), of_queries)
    g, q = (torch.nn.functional.normalize(x - x.mean(0), dim=1).double() for x in (gallery, queries))
    for k in RANKS:
        hits = [of_queries[i] in {of_gallery[j] for j in (g @ q[i]).argsort(descending=True)[:k].tolist()} for i in range(25)]
        assert found[f"R@{k}"] == pytest.approx(np.mean(hits))
    assert found["R@50"] == pytest.approx(22 / 25) == found["chance_R@50"]
    numbers = within(gallery, [int(name[6:]) for name in of_gallery], queries, torch.arange(25) % 8)
    assert numbers == found


def test_the_chance_of_within_is_what_random_features_score() -> None:
    """Unequal classes: of 20, one has 12 and one but a single row."""
    labels = np.array([0] * 12 + [1] * 7 + [2])
    trials = [within(unit(20, 8, seed=2 * s), labels, unit(9, 8, seed=2 * s + 1), labels[3:12]) for s in range(200)]
    for k in RANKS:
        scored = np.array([trial[f"R@{k}"] for trial in trials])
        assert abs(scored.mean() - trials[0][f"chance_R@{k}"]) <= 4 * scored.std() / len(scored) ** 0.5 + 1e-9


def test_within_counts_ties_and_nan_against_the_query() -> None:
    gallery, labels = torch.eye(4)[[0, 0, 1, 1]], [0, 1, 0, 1]
    assert within(gallery, labels, torch.eye(4)[:2], [0, 1])["R@1"] == 0
    assert within(torch.full((4, 3), math.nan), labels, torch.eye(3)[:2], [0, 1])["R@1"] == 0
    with pytest.raises(ValueError, match="needs a gallery and queries, and there are 4 and 0; give both"):
        within(gallery, labels, gallery[:0], [])
