"""Embedding a data set and searching it: exact, over chunks, by the right model, stopped and continued."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train_trained import save
from train_data import LOADER, TINY, clips, with_members, write_dataset

from cmacc.shards.dataset import Dataset
from cmacc.shards.errors import DatasetError
from cmacc.train.export.export import export
from cmacc.train.export.trained import load_trained
from cmacc.train.model import CrossModal
from cmacc.train.search import embed as embedding
from cmacc.train.search import nearest as searching
from cmacc.train.search.embed import default_name, embed_dataset
from cmacc.train.search.nearest import embedded_by, nearest
from cmacc.train.search.page import write_search_page
from cmacc.train.search.query import search_by_file, search_by_key

WIDTH = 16


def make_run(folder: Path, seed: int, step: int = 1) -> Path:
    torch.manual_seed(seed)
    save(folder / "checkpoints", step, CrossModal(TINY.encoders, TINY.objective), TINY)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return make_run(folder / "first", 1), make_run(folder / "second", 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, runs: tuple[Path, Path]) -> Dataset:
    """22 clips of 11 source videos, embedded by the first run; the sound of clip 2 does not decode."""
    folder = tmp_path_factory.mktemp("data")
    some = [with_members(clip, flac=b"bad") if i == 2 else clip for i, clip in enumerate(clips())]
    dataset = write_dataset(folder / "set", some)
    embed_dataset(load_trained(runs[0]), dataset, "first", LOADER, model=str(runs[0]), scratch=folder)
    return Dataset.open(dataset.url)


@pytest.fixture
def few(tmp_path: Path) -> Dataset:
    return write_dataset(tmp_path / "few", clips()[:6])


# --- nearest ---


def put(dataset: Dataset, vectors: np.ndarray, name: str = "video-x") -> Dataset:
    dataset.catalog.add_column(name, vectors.astype(np.float16), replace=True)
    return Dataset.open(dataset.url)


def test_nearest_is_exact_over_chunks(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a sort of all cosines, whatever the chunk, with rows that are NaN in every place."""
    monkeypatch.setattr(type(data.catalog), "chunk_rows", lambda *_: 1)
    rng = np.random.default_rng(0)
    for chunk in (1, 3, 7, 100):
        vectors, query = rng.normal(size=(len(data), 5)), rng.normal(size=5)
        gone = rng.choice(len(data), 4, replace=False)
        vectors[gone] = np.nan
        monkeypatch.setattr(searching, "_BYTES", 4 * 5 * chunk)
        dataset, told = put(data, vectors), []
        found = nearest(dataset, "video-x", query, 6, on_progress=told.append)
        cosines = (vectors @ query) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
        order = [row for row in np.argsort(-cosines) if row not in gone][:6]
        assert found.rows.tolist() == order
        assert np.allclose(found.cosines, cosines[order], atol=2e-3)
        assert found.skipped == 4
        assert told == [min(at + chunk, len(data)) for at in range(0, len(data), chunk)]


def test_no_more_than_a_chunk_is_read_at_once(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    column = type(data.catalog).column

    def watched(self: Any, name: str, rows: Any = None) -> Any:
        found = column(self, name, rows)
        asked.append(len(found))
        return found

    monkeypatch.setattr(type(data.catalog), "column", watched)
    monkeypatch.setattr(type(data.catalog), "chunk_rows", lambda *_: 2)
    monkeypatch.setattr(searching, "_BYTES", 4 * WIDTH * 5)
    nearest(data, "video-first", np.ones(WIDTH), 3)
    assert max(asked) == 4


def test_equal_ones_come_by_row(data: Dataset) -> None:
    vectors = np.tile([1.0, 0.0], (len(data), 1))
    vectors[[3, 9]] = [0.0, 1.0]
    dataset = put(data, vectors)
    assert nearest(dataset, "video-x", np.array([0.0, 2.0]), 4).rows.tolist() == [3, 9, 0, 1]
    assert len(nearest(dataset, "video-x", np.array([0.0, 2.0]), 99).rows) == len(data)


def test_clips_of_one_video_are_hidden(data: Dataset) -> None:
    """However many of the first ones they are."""
    sources = data.catalog.texts("source")
    order = np.argsort(sources != sources[0], kind="stable")  # those of the first video lead
    vectors = np.zeros((len(data), 2))
    vectors[order] = np.stack([np.ones(len(data)), np.linspace(0, 3, len(data))], axis=1)
    dataset, query = put(data, vectors), np.array([1.0, 0.0])
    others = [row for row in order.tolist() if sources[row] != sources[0]]
    assert nearest(dataset, "video-x", query, 3, without_source=sources[0]).rows.tolist() == others[:3]
    assert nearest(dataset, "video-x", query, 99, without_source=sources[0]).rows.tolist() == others
    assert nearest(dataset, "video-x", query, 2, without_row=int(order[0])).rows.tolist() == order[1:3].tolist()


def test_queries_that_cannot_be_searched_with(data: Dataset) -> None:
    for query, count, sentence in (
        (np.ones(3), 1, r"the query has \(3,\) numbers, video-first has 16 a clip; embed both with one model"),
        (np.full(WIDTH, np.nan), 1, "is not a number"),
        (np.zeros(WIDTH), 1, "is not a number"),
        (np.ones(WIDTH), 0, "count is 0; give 1 or more"),
    ):
        with pytest.raises(ValueError, match=sentence):
            nearest(data, "video-first", query, count)


# --- of which model ---


def test_only_the_very_model_is_searched_with(data: Dataset, runs: tuple[Path, Path], tmp_path: Path) -> None:
    """By its hash: an export of it will do, another run will not, whatever it is called."""
    file = tmp_path / "query.flac"
    file.write_bytes(data.read(0)["flac"])
    export(runs[0], tmp_path / "exported", programs=False)
    by_run, by_export, by_itself = (
        search_by_file(data, str(file), "audio", model=model) for model in (str(runs[0]), str(tmp_path / "exported"), None)
    )
    assert by_run == by_export == by_itself
    with pytest.raises(DatasetError, match=r"no embeddings of this very model \(first came from another\); run `cmacc embed`"):
        search_by_file(data, str(file), "audio", model=str(runs[1]))
    with pytest.raises(DatasetError, match="no embeddings of this very model"):
        search_by_key(data, str(data.keys[0]), model=str(runs[1]))


def test_a_model_that_trained_on_or_is_gone(few: Dataset, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 5)
    embed_dataset(load_trained(run), few, "run", LOADER, model=str(run), scratch=tmp_path)
    few = Dataset.open(few.url)
    file = tmp_path / "query.mp4"
    file.write_bytes(few.read(0)["mp4"])
    search_by_file(few, str(file), "video")
    make_run(run, 6, step=2)
    with pytest.raises(
        ValueError, match=r"give the model that embedded .+ as --model RUN_OR_EXPORT; .+ is another one now \(step 2"
    ):
        search_by_file(few, str(file), "video")
    run.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"it was .+/run, which cannot be loaded now"):
        search_by_file(few, str(file), "video")
    found = search_by_file(few, str(file), "video", model=f"{tmp_path}/moved/checkpoints/step-00000001.safetensors")
    assert found.model == "run"


def test_which_columns(few: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"has no embeddings; run: cmacc embed RUN"):
        embedded_by(few)
    for name in ("one", "two"):
        for modality in ("video", "audio"):
            few.catalog.add_column(f"{modality}-{name}", np.ones((6, 2), np.float16), {"hash": name[0] if modality else ""})
    few.catalog.add_column("video-alone", np.ones((6, 2), np.float16), {"hash": "a"})
    few.catalog.add_column("video-mixed", np.ones((6, 2), np.float16), {"hash": "m"})
    few.catalog.add_column("audio-mixed", np.ones((6, 2), np.float16), {"hash": "n"})
    few = Dataset.open(few.url)
    assert embedded_by(few, "two").hash == "t" and embedded_by(few, None, "o").name == "one"
    assert embedded_by(few, "mixed").hash == ""
    with pytest.raises(DatasetError, match="embeddings of mixed, one, two; choose one with --name"):
        embedded_by(few)
    with pytest.raises(DatasetError, match="no embeddings 'alone'; it has those of mixed, one, two"):
        embedded_by(few, "alone")


# --- queries ---


def test_a_clip_finds_itself_across_modalities(data: Dataset, runs: tuple[Path, Path]) -> None:
    """Its sound is compared with all pictures, or the reverse; within a modality it is left out."""
    video, audio = (data.catalog.column(f"{m}-first").astype(np.float32) for m in ("video", "audio"))
    key, row = str(data.keys[5]), 5
    cosines = np.nan_to_num(audio @ video[row], nan=-2)
    found = search_by_key(data, key, count=30)
    assert (found.by, found.to, found.model, found.skipped) == ("video", "audio", "first", 1)
    assert [hit.row for hit in found.hits] == [r for r in np.argsort(-cosines, kind="stable") if r != 2]
    labels = data.catalog.labels()
    for hit in found.hits:
        assert hit.mark == ("own" if hit.row == row else "class" if labels[hit.row] == labels[row] else "other")
    back = search_by_key(data, key, to="video", count=1)
    assert (back.by, back.hits[0].row) == ("audio", int(np.nan_to_num(video @ audio[row], nan=-2).argmax()))
    within = search_by_key(data, key, by="audio", to="audio", count=30)
    assert row not in [hit.row for hit in within.hits] and len(within.hits) == 20
    others = search_by_key(data, key, count=30, other_videos=True)
    sources = data.catalog.texts("source")
    assert {sources[hit.row] for hit in others.hits} == set(sources) - {sources[row]}
    with pytest.raises(ValueError, match="has no embedding, since it did not decode; search with another one"):
        search_by_key(data, str(data.keys[2]))
    with pytest.raises(DatasetError, match="has the key 'nothing'"):
        search_by_key(data, "nothing")


def test_a_file_is_embedded_as_its_clip_was(data: Dataset, tmp_path: Path) -> None:
    """The members of a clip as files: its own embedding comes first within the modality, with a cosine of one."""
    for member, by in (("mp4", "video"), ("flac", "audio")):
        file = tmp_path / f"x.{member}"
        file.write_bytes(data.read(7)[member])
        found = search_by_file(data, str(file), by, to=by, count=3)  # type: ignore[arg-type]
        best = [hit.row for hit in found.hits if hit.cosine > 0.999]
        assert 7 in best or found.hits[0].cosine > 0.999
        across = search_by_file(data, str(file), by, count=3)  # type: ignore[arg-type]
        assert across.to != by and {hit.by for hit in across.hits} == {across.to}
    with pytest.raises(ValueError, match=r"nothing.mp4 is no file; give a sound or a film"):
        search_by_file(data, str(tmp_path / "nothing.mp4"), "video")
    with pytest.raises(ValueError, match="no picture that decodes"):
        search_by_file(data, str(tmp_path / "x.flac"), "video")


def test_the_page_of_a_search(data: Dataset, tmp_path: Path) -> None:
    file = tmp_path / "<img src=x onerror=alert(1)>.flac"
    file.write_bytes(data.read(0)["flac"])
    found = search_by_file(data, str(file), "audio", count=2)
    text = write_search_page(data, found, tmp_path / "page.html").read_text()
    assert "<img src=x" not in text and "&lt;img src=x onerror=alert(1)&gt;.flac" in text
    assert text.count("<article") == 3 and "1 clip without an embedding" in text


# --- embedding ---


def test_names_by_default() -> None:
    assert default_name("runs/first") == default_name("runs/first/") == default_name("runs/first/checkpoints") == "first"
    assert default_name("runs/first/checkpoints/step-00000012.safetensors") == "first"
    assert default_name("s3://user:secret@bucket/runs/my run?x=1") == "my-run"
    assert default_name("memory://...") == "model"


def test_what_the_columns_say(data: Dataset, runs: tuple[Path, Path]) -> None:
    for name in ("video-first", "audio-first"):
        assert data.catalog.attrs(name) == {
            "model": "first", "hash": load_trained(runs[0]).hash, "step": 1, "from": str(runs[0]),
        }  # fmt: skip


class Stopped(Exception):
    pass


def stop_at(count: int) -> Callable[[int], None]:
    def tell(done: int) -> None:
        if done >= count:
            raise Stopped

    return tell


def test_stopped_it_goes_on(runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were saved are not embedded again, also behind a clip that does not decode; the columns are the same."""
    some = [with_members(c, flac=b"bad") if i in (3, 15) else c for i, c in enumerate(clips()[:16])]
    trained, whole = load_trained(runs[0]), write_dataset(tmp_path / "whole", some)
    embed_dataset(trained, whole, "x", LOADER, scratch=tmp_path / "scratch")
    stopped = write_dataset(tmp_path / "stopped", some)
    monkeypatch.setattr(embedding, "SAVE_EVERY_S", 0.0)
    with pytest.raises(Stopped):
        embed_dataset(trained, stopped, "x", LOADER, stop_at(8), scratch=tmp_path / "scratch")
    assert stopped.catalog.added == []
    told: list[int] = []
    embed_dataset(trained, stopped, "x", LOADER, told.append, scratch=tmp_path / "scratch")
    assert told[0] == 8 and told[-1] == 16
    assert list((tmp_path / "scratch").iterdir()) == []
    for column in ("video-x", "audio-x"):
        a, b = (Dataset.open(d.url).catalog.column(column) for d in (whole, stopped))
        assert np.array_equal(a, b, equal_nan=True)
        assert np.flatnonzero(np.isnan(a).all(1)).tolist() == [3, 15]


def test_another_model_or_data_begins_anew(runs: tuple[Path, Path], few: Dataset, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        embed_dataset(load_trained(runs[0]), few, "x", LOADER, stop_at(4), scratch=tmp_path / "scratch")
    told: list[int] = []
    embed_dataset(load_trained(runs[1]), few, "x", LOADER, told.append, scratch=tmp_path / "scratch")
    assert told[0] == 0


def _hold(folder: str, ready: Any, done: Any) -> None:
    with embedding._alone(Path(folder)):
        ready.set()
        done.wait(60)


def test_one_at_a_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path / "work"), ready, done))
    other.start()
    try:
        assert ready.wait(60)
        with (
            pytest.raises(ValueError, match="another process embeds this data set with this model; wait"),
            embedding._alone(tmp_path / "work"),
        ):
            pass
    finally:
        done.set()
        other.join()
    with embedding._alone(tmp_path / "work"):
        pass


def test_at_a_url(runs: tuple[Path, Path], few: Dataset, tmp_path: Path) -> None:
    """Columns of a data set in a bucket, by a run in a bucket."""
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(few.url, "/search/few", recursive=True)
    memory.put(str(runs[0]), "/search/run", recursive=True)
    there, model = Dataset.open("memory://search/few"), "memory://search/run"
    embed_dataset(load_trained(model), there, default_name(model), LOADER, model=model, scratch=tmp_path)
    there = Dataset.open("memory://search/few")
    assert there.catalog.attrs("video-run")["from"] == model
    assert len(search_by_key(there, str(there.keys[0])).hits) == 6
    file = tmp_path / "x.flac"
    file.write_bytes(there.read(1)["flac"])
    assert len(search_by_file(there, str(file), "audio", count=2).hits) == 2
    assert json.dumps(there.catalog.attrs("audio-run"))
