"""The loader: every clip once an epoch, the same from any position, bad clips replaced by rule, no thread left."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from media import audio_bytes, video_bytes
from train_data import EVAL_CLIPS, LOADER, TRAIN_CLIPS, VIEW, clips, damaged, with_members, write_dataset

from cmacc.shards.dataset import Dataset
from cmacc.train.frames import decode_frames
from cmacc.train.graph import Graph
from cmacc.train.loader import BadClip, Batch, LoaderConfig, TrainingLoader, ViewReader, evaluation_batches
from cmacc.train.views import central_view, training_view


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("loader") / "data", clips())


BAD = {
    2: {"mp4": b"no video"},
    3: {"mp4": video_bytes(3, 20)[:1500]},
    7: {"flac": bytes(500)},
    # FFmpeg decodes this one without a word, DALI does not
    11: {"flac": damaged(audio_bytes(3, 2.0))},
    17: {"flac": b"no sound"},
}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The same clips, five of them damaged: rows 2, 3, 7 and 11 of split train, row 17 of eval."""
    some = [with_members(clip, **BAD.get(i, {})) for i, clip in enumerate(clips())]
    return write_dataset(tmp_path_factory.mktemp("spoilt") / "data", some)


@pytest.fixture
def make() -> Iterator[Callable[..., TrainingLoader]]:
    """Makes loaders and closes them at the end."""
    made = []

    def loader(dataset: Dataset, config: LoaderConfig = LOADER, **options: object) -> TrainingLoader:
        made.append(TrainingLoader(dataset, VIEW, config, **{"split": "train", "seed": 5, **options}))  # type: ignore[arg-type]
        return made[-1]

    yield loader
    for each in made:
        each.close()


def take(loader: TrainingLoader, count: int) -> list[Batch]:
    return list(islice(iter(loader), count))


def ids(batches: list[Batch]) -> list[int]:
    return torch.cat([batch.ids for batch in batches]).tolist()


def assert_equal(a: Batch, b: Batch) -> None:
    for name in ("video", "audio", "ids", "sources", "labels"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("batch", [4, 5])
def test_every_clip_once_an_epoch(data: Dataset, make: Callable[..., TrainingLoader], batch: int) -> None:
    """Five epochs, whether or not batches divide them; no two in the same order."""
    seen = ids(take(make(data, replace(LOADER, batch=batch)), 5 * TRAIN_CLIPS // batch))
    epochs = [seen[i : i + TRAIN_CLIPS] for i in range(0, len(seen), TRAIN_CLIPS)]
    assert len(epochs) == 5
    assert all(sorted(epoch) == list(range(TRAIN_CLIPS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_a_batch_is_its_clips(data: Dataset, make: Callable[..., TrainingLoader]) -> None:
    """Tensors are those of the views of (seed, epoch, key); ids, sources and labels are the catalog's."""
    batch = take(make(data), 6)[-1]  # of the second epoch
    assert batch.video.shape == (4, 3, VIEW.frames, VIEW.size, VIEW.size)
    assert batch.audio.shape == (4, 1, VIEW.n_mels, VIEW.mel_steps(8.0))
    frames, sounds, views = [], [], []
    for row in batch.ids.tolist():
        clip = clips()[row]
        views.append(training_view(VIEW, 5, 1, clip.key, clip.facts.n_frames, 8.0, 48 / 32))
        frames.append(decode_frames(clip.members["mp4"], views[-1].start_frame, VIEW.frames, 1))
        sounds.append(np.frombuffer(clip.members["flac"], np.uint8))
    video, audio = Graph(VIEW, 8.0, 4, "cpu", 1).run(frames, sounds, views)
    assert torch.equal(batch.video, video)
    assert torch.equal(batch.audio, audio)
    vocabulary = data.catalog.vocabulary("labels")
    assert [vocabulary[i] for i in batch.labels] == [f"label {row % 3}" for row in batch.ids.tolist()]
    sources = batch.sources[:, None] == batch.sources[None, :]
    assert torch.equal(sources, batch.ids[:, None] // 2 == batch.ids[None, :] // 2)


def test_a_view_depends_on_its_epoch(data: Dataset, make: Callable[..., TrainingLoader]) -> None:
    batches = take(make(data), 8)
    first, second = ({int(i): b.video[n] for b in part for n, i in enumerate(b.ids)} for part in (batches[:4], batches[4:]))
    assert sum(torch.equal(first[i], second[i]) for i in range(TRAIN_CLIPS)) <= 1


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 9])
def test_the_same_batches_from_any_position(data: Dataset, make: Callable[..., TrainingLoader], stop: int) -> None:
    """Bit for bit, whatever the threads and however far ahead."""
    unbroken = take(make(data), 12)
    before = make(data)
    take(before, stop)
    after = make(data, replace(LOADER, threads=1, ahead=3))
    after.load_state_dict(before.state_dict())
    assert after.position == 4 * stop
    for a, b in zip(take(after, 12 - stop), unbroken[stop:], strict=True):
        assert_equal(a, b)


def test_the_seed_matters(data: Dataset, make: Callable[..., TrainingLoader]) -> None:
    assert ids(take(make(data), 4)) != ids(take(make(data, seed=6), 4))


def test_fewer_clips_than_a_batch(data: Dataset, make: Callable[..., TrainingLoader]) -> None:
    """Six clips, batches of 16: each clip two or three times in the first, 8 times in three."""
    batches = take(make(data, replace(LOADER, batch=16), split="eval"), 3)
    assert [len(batch.ids) for batch in batches] == [16, 16, 16]
    eval_rows = range(TRAIN_CLIPS, TRAIN_CLIPS + EVAL_CLIPS)
    assert Counter(ids(batches)) == Counter(dict.fromkeys(eval_rows, 8))
    assert set(Counter(ids(batches[:1])).values()) == {2, 3}


def test_another_data_set_is_refused(data: Dataset, spoilt: Dataset, make: Callable[..., TrainingLoader]) -> None:
    with pytest.raises(ValueError, match=r"has changed since this run's checkpoint .*; use another run folder"):
        make(data).load_state_dict(make(spoilt).state_dict())


@pytest.mark.filterwarnings("ignore")
def test_bad_clips_are_replaced_by_rule(data: Dataset, spoilt: Dataset, make: Callable[..., TrainingLoader]) -> None:
    """The next row of the split that decodes: 2 and 3 by 4, 7 by 8, 11 by 12. Told once each, all else as without them."""
    told: list[BadClip] = []
    loader = make(spoilt, on_bad=told.append)
    found, whole = take(loader, 12), take(make(data), 12)
    replaced = {2: 4, 3: 4, 7: 8, 11: 12}
    assert ids(found) == [replaced.get(row, row) for row in ids(whole)]
    assert sorted(bad.row for bad in told) == [2, 3, 7, 11]
    for bad in told:
        assert bad.key == clips()[bad.row].key
        assert str(bad).startswith(f"clip {bad.key} (row {bad.row}) does not decode: ")
        assert "\n" not in str(bad)
    for a, b in zip(found, whole, strict=True):
        for n in range(4):
            if b.ids[n].item() not in replaced:
                assert torch.equal(a.video[n], b.video[n])
                assert torch.equal(a.audio[n], b.audio[n])
    assert loader.state_dict()["replaced"] == sorted(clips()[row].key for row in replaced)


def test_known_bad_clips_stay_known(spoilt: Dataset, make: Callable[..., TrainingLoader]) -> None:
    """A continued run neither tries them again nor tells of them again, and goes on as the unbroken one."""
    unbroken = take(make(spoilt), 9)
    before = make(spoilt)
    take(before, 5)
    told: list[BadClip] = []
    after = make(spoilt, on_bad=told.append)
    after.load_state_dict(before.state_dict())
    for a, b in zip(take(after, 4), unbroken[5:], strict=True):
        assert_equal(a, b)
    assert not told


def test_no_clip_decodes(tmp_path: Path, make: Callable[..., TrainingLoader]) -> None:
    bad = write_dataset(tmp_path / "data", [with_members(clip, mp4=b"no video") for clip in clips()[:3]])
    with pytest.raises(ValueError, match=r"no clip of .* decodes; run `cmacc lint"):
        take(make(bad), 1)


def test_evaluation_leaves_bad_clips_out(data: Dataset, spoilt: Dataset) -> None:
    """Central views, each row once, in the order asked; the good ones as they are without the bad."""
    rows = np.array([17, 3, 20, 5, 16, 2, 7, 21, 0])
    found, whole = (list(evaluation_batches(each, VIEW, LOADER, rows)) for each in (spoilt, data))
    assert ids(whole) == rows.tolist()
    assert [len(batch.ids) for batch in whole] == [4, 4, 1]
    assert ids(found) == [20, 5, 16, 21, 0]
    pictures = {int(i): v for b in whole for i, v in zip(b.ids, b.video, strict=True)}
    for batch in found:
        for i, picture in zip(batch.ids.tolist(), batch.video, strict=True):
            assert torch.equal(picture, pictures[i])
    clip = clips()[20]
    view = central_view(VIEW, clip.facts.n_frames, 8.0, 48 / 32)
    frames = decode_frames(clip.members["mp4"], view.start_frame, VIEW.frames, 1)
    expected, _ = Graph(VIEW, 8.0, 1, "cpu", 1).run([frames], [np.frombuffer(clip.members["flac"], np.uint8)], [view])
    assert torch.equal(pictures[20], expected[0])


def test_only_bad_clips_make_no_batch(spoilt: Dataset) -> None:
    assert list(evaluation_batches(spoilt, VIEW, LOADER, np.array([2, 17]))) == []


def ours() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith(("loader", "decode"))}


def test_close_leaves_no_thread(data: Dataset) -> None:
    before = ours()
    loader = TrainingLoader(data, VIEW, LOADER, split="train", seed=0)
    batches = iter(loader)
    next(batches)
    begun = ours() - before
    assert {t.name for t in begun} >= {"loader", "decode_0"}
    loader.close()
    for thread in begun:
        thread.join(10)
    assert not any(t.is_alive() for t in begun)
    with pytest.raises(StopIteration):  # and an iterator that is still held does not wait for what will never come
        next(batches)
    loader.close()


def test_iterating_again_goes_on_from_what_was_consumed(data: Dataset, make: Callable[..., TrainingLoader]) -> None:
    """The first iterator's thread ends, and so does it: two threads must not share one reader."""
    unbroken = take(make(data), 6)
    loader, before = make(data), ours()
    first = iter(loader)
    again = [next(first), next(first)]
    second = iter(loader)
    again += [next(second), next(second)]
    assert len([t for t in ours() - before if t.name == "loader"]) == 1
    assert list(first) == []
    again += [next(second), next(second)]
    for a, b in zip(again, unbroken, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("error", [OSError("the disk is gone"), MemoryError()])
def test_what_goes_wrong_in_the_thread_reaches_the_consumer(
    data: Dataset, make: Callable[..., TrainingLoader], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """After the batches made before it; a source that fails is no bad clip. The loader can be iterated again."""
    told: list[BadClip] = []
    loader = make(data, on_bad=told.append)
    read, calls = ViewReader.read, []

    def failing(self: ViewReader, rows: list[int], views: list[object]) -> Batch:
        calls.append(rows)
        if len(calls) == 3:
            raise error
        return read(self, rows, views)  # type: ignore[arg-type]

    monkeypatch.setattr(ViewReader, "read", failing)
    batches = iter(loader)
    got = [next(batches), next(batches)]
    with pytest.raises(type(error)):
        next(batches)
    assert not told
    assert loader.position == 8
    got += take(loader, 1)
    for a, b in zip(got, take(make(data), 3), strict=True):
        assert_equal(a, b)


def test_the_producer_waits_for_the_consumer(data: Dataset, make: Callable[..., TrainingLoader]) -> None:
    """No more than `ahead` batches, and the one in hand, are made before they are wanted."""
    loader, made = make(data), []
    batch = loader._batch
    loader._batch = lambda position: made.append(position) or batch(position)  # type: ignore[method-assign, func-returns-value]
    batches = iter(loader)
    next(batches)
    deadline = time.monotonic() + 20
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert made == [0, 4, 8]
    assert loader.position == 4


def test_a_lost_shard_is_no_bad_clip(tmp_path: Path, make: Callable[..., TrainingLoader]) -> None:
    data = write_dataset(tmp_path / "data", clips())
    (tmp_path / "data" / "clips-000001.tar").unlink()
    told: list[BadClip] = []
    with pytest.raises(Exception, match=r"clips-000001\.tar is missing"):
        take(make(data, on_bad=told.append), 12)
    assert not told


def test_a_wrong_option_is_named() -> None:
    for name, value in {"batch": 0, "ahead": 0, "streams": 0, "window": -1, "threads": -1, "device": "tpu"}.items():
        with pytest.raises(ValueError, match=rf"^loader\.{name} is .*; (give|use) "):
            LoaderConfig(**{name: value})  # type: ignore[arg-type]
