"""Columns of a few rows: what the whole columns say, from the chunks that hold the rows and no others."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from media import make_clip, tiny_profile

from cmacc.shards.catalog import Catalog
from cmacc.shards.dataset import Dataset
from cmacc.shards.errors import DatasetError
from cmacc.shards.writer import DatasetWriter

N = 12
LABELS: list[tuple[str, ...]] = [("dog", "bark"), (), ("café ☕",), ("bark",)]
ASKED = [[0], [11, 0, 5, 5], [], list(range(N)), [3, 2, 1], [7, 7, 7]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "set"
    with DatasetWriter(path, tiny_profile(), shard_bytes=100_000) as w:
        for i in range(N):
            source = f"url_{'café' * (i % 3)}{i}"  # of different lengths, in bytes and in letters
            w.add(
                make_clip(
                    i, labels=LABELS[i % 4], split=("train", "", "val")[i % 3], source=None if i % 2 else source[:4] + str(i)
                )
            )
    return path


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "set"))


@pytest.mark.parametrize("chunk", [1, 3, 5, 1 << 20])
@pytest.mark.parametrize("at_once", [1, 99])
def test_what_the_columns_say(whole: Path, chunk: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows a chunk has, and so in how many chunks one key lies."""
    monkeypatch.setattr(Catalog, "chunk_rows", lambda *_: chunk)
    monkeypatch.setattr("cmacc.shards.rows._AT_ONCE", at_once)
    dataset, catalog = Dataset.open(whole), Dataset.open(whole).catalog
    first = [catalog.vocabulary("labels").index(found[0]) if found else -1 for found in catalog.labels()]
    for asked in ASKED:
        rows = np.array(asked, dtype=np.int64)
        for name in ("n_frames", "motion", "offset", "fingerprint"):
            found, column = dataset.numbers(name, rows), catalog.column(name)
            assert np.array_equal(found, column[rows]) and found.dtype == column.dtype and found.shape == column[rows].shape
        for name in ("key", "source", "split", "duplicate_of"):
            assert dataset.texts(name, rows) == catalog.texts(name)[rows].tolist()
        labels = dataset.first_labels(rows)
        assert labels.tolist() == [first[row] for row in asked] and labels.dtype == np.int64


@pytest.mark.parametrize("rows", [[-1], [0, N], [1 << 60]])
def test_rows_that_are_not_there(whole: Path, rows: list[int]) -> None:
    dataset = Dataset.open(whole)
    for ask in (lambda r: dataset.numbers("fps", r), lambda r: dataset.texts("key", r), dataset.first_labels):
        with pytest.raises(IndexError, match=f"there are {N} rows"):
            ask(np.array(rows))


def test_columns_of_the_other_kind(whole: Path) -> None:
    dataset = Dataset.open(whole)
    with pytest.raises(DatasetError, match=r"holds text or lists; read it by texts\(\)"):
        dataset.numbers("key", [0])
    with pytest.raises(DatasetError, match=r"column fps .* holds numbers; read it by numbers\(\)"):
        dataset.texts("fps", [0])
    with pytest.raises(DatasetError, match="no column 'nope'"):
        dataset.numbers("nope", [0])


def test_only_the_chunks_touched_are_read_and_once(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Catalog, "chunk_rows", lambda *_: 4)
    dataset, asked = Dataset.open(whole), []
    for kind in ("column", "part"):
        real = getattr(dataset.catalog, kind)
        monkeypatch.setattr(dataset.catalog, kind, lambda n, rows, real=real: (asked.append((n, rows.start)), real(n, rows))[1])
    for _ in range(3):
        dataset.numbers("n_frames", np.array([9, 1, 8]))
        dataset.first_labels(np.array([2, 3]))
    assert asked == [("n_frames", 0), ("n_frames", 8), ("labels/offsets", 0), ("labels/offsets", 4), ("labels/values", 0)]


def test_memory_has_a_bound(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Catalog, "chunk_rows", lambda *_: 1)
    monkeypatch.setattr("cmacc.shards.rows._KEPT", 5)
    dataset = Dataset.open(whole)
    assert dataset.texts("key", np.arange(N)) == dataset.keys.tolist()
    assert dataset._rows._block.cache_info().currsize == 5


@pytest.mark.parametrize("value", [-1, 1 << 40, (1 << 63) - 1])
@pytest.mark.parametrize("at", [3, 4])
def test_forged_bounds(damaged: Path, value: int, at: int) -> None:
    """Of row 3: where it begins, or where it ends."""
    zarr.open_group(damaged / "catalog.zarr", mode="r+")["key/offsets"][at] = value
    zarr.open_group(damaged / "catalog.zarr", mode="r+")["labels/offsets"][at] = value
    dataset = Dataset.open(damaged)
    with pytest.raises(DatasetError, match=r"column key.* is damaged; opening .* mends it"):
        dataset.texts("key", np.array([0, 3]))
    if value < 0 or at == 3:
        with pytest.raises(DatasetError, match=r"column labels.* is damaged; opening .* mends it"):
            dataset.first_labels(np.array([0, 3]))


def test_text_that_is_none(damaged: Path) -> None:
    zarr.open_group(damaged / "catalog.zarr", mode="r+")["key/values"][:3] = 255
    with pytest.raises(DatasetError, match=r"column key .*is damaged"):
        Dataset.open(damaged).texts("key", [0])


def test_many_threads(whole: Path) -> None:
    dataset = Dataset.open(whole)
    keys, rows = dataset.keys.tolist(), np.random.default_rng(0).integers(0, N, (200, 7))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda r: dataset.texts("key", r), rows)) == [[keys[i] for i in row] for row in rows]
