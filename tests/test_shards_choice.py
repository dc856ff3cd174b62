"""Choosing clips: balance, near duplicates and diverse picks against the obvious way of doing the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from media import make_clip, tiny_profile

from cmacc.shards.choice import Choice, make_plan
from cmacc.shards.dataset import Dataset
from cmacc.shards.embeddings import embeddings, first_of_near
from cmacc.shards.errors import DatasetError
from cmacc.shards.writer import DatasetWriter
from cmacc.train.contrast.selection import pick_diverse

NAMES = [("dog",), ("dog", "bark"), ("cat",), (), ("dog",), ("dog",), ("cat", "dog")]


def unit(n: int, d: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[Dataset]:
    path = tmp_path_factory.mktemp("choice")
    for name, numbers in (("a", range(16)), ("b", range(14, 30))):
        with DatasetWriter(path / name, tiny_profile()) as w:
            for i in numbers:
                w.add(make_clip(i, labels=NAMES[i % 7], split="ab"[i % 2]))
        dataset = Dataset.open(path / name)
        for seed, kind in enumerate(("video", "audio")):
            vectors = unit(16, 6, seed)
            vectors[[5, 9]] = vectors[2] + 0.01 * unit(2, 6, 9)
            vectors[11] = np.nan
            dataset.catalog.add_column(f"{kind}-first", vectors.astype(np.float16), {"model": "first"})
    return [Dataset.open(path / "a"), Dataset.open(path / "b")]


def chosen(datasets: list[Dataset], **options: object) -> list[tuple[int, int]]:
    plan = make_plan(datasets, Choice(**options), pick_diverse)
    return list(zip(plan.source.tolist(), plan.row.tolist(), strict=True))


def labels_of(datasets: list[Dataset], places: list[tuple[int, int]]) -> list[tuple[str, ...]]:
    return [datasets[s].catalog.labels(slice(r, r + 1))[0] for s, r in places]


def test_balance_gives_each_label_as_many(datasets: list[Dataset]) -> None:
    places = chosen(datasets, balance="labels", order="shuffle:3")
    everything = labels_of(datasets, chosen(datasets, order="shuffle:3"))
    often = Counter(word for words in everything for word in words)
    rarest = Counter(min(words, key=lambda w: often[w]) for words in labels_of(datasets, places))
    assert set(rarest) == {"dog", "bark", "cat"} and len(set(rarest.values())) == 1
    counted = Counter(min(words, key=lambda w: often[w]) for words in everything if words)
    assert rarest["dog"] == min(counted.values()), "all have what the smallest has"
    order = chosen(datasets, order="shuffle:3")
    assert [order.index(p) for p in places] == sorted(order.index(p) for p in places), "the order stays"
    first = [p for p in order if labels_of(datasets, [p])[0] == ("dog",)][: rarest["dog"]]
    assert [p for p in places if labels_of(datasets, [p])[0] == ("dog",)] == first, "the first ones of each"


def test_balance_shares_a_limit(datasets: list[Dataset]) -> None:
    places = chosen(datasets, balance="labels", limit=20)
    kinds = Counter("bark" if "bark" in w else "cat" if "cat" in w else "dog" for w in labels_of(datasets, places))
    everything = Counter(
        "bark" if "bark" in w else "cat" if "cat" in w else "dog" for w in labels_of(datasets, chosen(datasets)) if w
    )
    assert len(places) == 20 and kinds["bark"] == everything["bark"], "a small one gives all it has"
    assert kinds["dog"] + kinds["cat"] == 20 - everything["bark"] and abs(kinds["dog"] - kinds["cat"]) <= 1
    by_split = Counter(str(datasets[s].catalog.texts("split")[r]) for s, r in chosen(datasets, balance="split"))
    assert by_split["a"] == by_split["b"] == 15
    with pytest.raises(DatasetError, match="no value to balance by"):
        chosen(datasets, balance="labels", where="len(labels) = 0")
    with pytest.raises(DatasetError, match="no column 'colour'"):
        chosen(datasets, balance="colour")


@pytest.mark.parametrize(("n", "cosine"), [(1, 0.9), (700, 0.6), (700, 0.97), (5000, 0.8)])
def test_first_of_near_is_the_greedy_rule(n: int, cosine: float) -> None:
    vectors = unit(n, 4, seed=n)
    if n > 4:
        vectors[3] = np.nan
    kept: list[int] = []
    for i, v in enumerate(vectors):
        if not kept or not (vectors[kept] @ v >= cosine).any():
            kept.append(i)
    found = first_of_near(vectors, cosine).tolist()
    assert found == kept and len(found) < max(n, 2)


def test_dedup_leaves_the_first_in_the_order(datasets: list[Dataset]) -> None:
    plan = make_plan(datasets[:1], Choice(dedup=0.99))
    assert plan.row.tolist() == [r for r in range(16) if r not in (5, 9)] and plan.near == 2
    turned = make_plan(datasets[:1], Choice(dedup=0.99, order="by:start_s", where="start_s > 30"))
    assert 5 in turned.row and 9 not in turned.row
    # the second data set has the first one's vectors, its clips 14 and 15 are there already
    assert make_plan(datasets, Choice(dedup=0.99))[4:] == (2, 2 + 13)


def test_embeddings_are_unit_vectors_of_both_kinds(datasets: list[Dataset]) -> None:
    rows = np.arange(16)
    both = embeddings(datasets[:1], np.zeros(16, np.int32), rows)
    assert both.shape == (16, 12) and np.isnan(both[11]).all()
    parts = [embeddings(datasets[:1], np.zeros(16, np.int32), rows, f"{kind}-first") for kind in ("video", "audio")]
    cosines = (parts[0] @ parts[0].T + parts[1] @ parts[1].T) / 2
    np.testing.assert_allclose(both @ both.T, cosines, atol=1e-6)
    with pytest.raises(DatasetError, match=r"no embeddings 'second'.*there are those of first"):
        embeddings(datasets, np.zeros(1, np.int32), rows[:1], "second")


def test_diverse_covers_more_than_chance(datasets: list[Dataset]) -> None:
    places = chosen(datasets, diverse=6, order="shuffle:1")
    assert len(places) == 6 and places == chosen(datasets, diverse=6, order="shuffle:1")
    assert all(p not in places for p in [(0, 11), (1, 11)]), "a clip without an embedding is no pick"
    assert len(chosen(datasets, diverse=1000)) == 28
    centres = unit(10, 8, seed=5)
    crowd = np.repeat(centres, [91, 1, 1, 1, 1, 1, 1, 1, 1, 1], axis=0) + 0.001 * unit(100, 8, seed=6)
    picks = pick_diverse(crowd.astype(np.float32), 10, seed=0)
    assert len(set(picks.tolist())) == 10
    assert len({int(np.argmax(centres @ crowd[p])) for p in picks}) == 10, "each of ten groups, though one has 91 %"


def test_what_makes_no_sense(datasets: list[Dataset], tmp_path: Path) -> None:
    for sentence, options in {
        "diverse is 0": {"diverse": 0},
        "dedup is 1.5": {"dedup": 1.5},
        "dedup is nan": {"dedup": float("nan")},
        "is not understood": {"split": "a"},
    }.items():
        with pytest.raises(DatasetError, match=sentence):
            Choice(**options)
    with pytest.raises(DatasetError, match="needs a function that picks"):
        make_plan(datasets, Choice(diverse=2))
    with DatasetWriter(tmp_path / "plain", tiny_profile()) as w:
        w.add(replace(make_clip(0)))
    with pytest.raises(DatasetError, match="no embeddings in the catalog; run `cmacc embed"):
        make_plan([Dataset.open(tmp_path / "plain")], Choice(dedup=0.9))


def test_a_split_without_clips_is_told(datasets: list[Dataset], caplog: pytest.LogCaptureFixture) -> None:
    make_plan(datasets, Choice(split="most:0.999999,none:0.000001"))
    assert "no clip is in split none" in caplog.text


def test_chance_has_a_seed(datasets: list[Dataset]) -> None:
    with pytest.raises(DatasetError, match="another question each time; for clips by chance give order shuffle:SEED"):
        make_plan(datasets, Choice("Random() < 0.5"))


def test_labels_may_be_asked_where_no_clip_has_one(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path, tiny_profile()) as w:
        for i in range(3):
            w.add(make_clip(i, labels=()))
    assert len(make_plan([Dataset.open(tmp_path)], Choice("not list_contains(labels, 'dog') and len(labels) = 0")).row) == 3
