"""The loader: every clip once an epoch, the same from any position, bad clips replaced by rule, no thread left."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from media import audio_bytes, make_clip, video_bytes
from train_data import EVAL_CLIPS, LOADER, TRAIN_CLIPS, VIEW, clips, damaged, with_members, write_dataset

from cmacc.shards.dataset import Dataset
from cmacc.shards.errors import DatasetError
from cmacc.train.loading.frames import decode_frames
from cmacc.train.loading.graph import Graph
from cmacc.train.loading.loader import LoaderConfig, TrainingLoader, evaluation_batches
from cmacc.train.loading.reader import BadClip, Batch, Pending, ViewReader
from cmacc.train.loading.sampler import Source
from cmacc.train.loading.views import ClipShape, ViewConfig, central_view, training_views


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("loader") / "data", clips())


BAD = {
    2: {"mp4": b"no video"},
    3: {"mp4": video_bytes(3, 20)[:1500]},
    7: {"flac": bytes(500)},
    # FFmpeg decodes this one without a word, DALI does not; a second has one frame, so no cut leaves the damage out
    11: {"flac": damaged(audio_bytes(3, 0.5))},
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

    def loader(
        dataset: Dataset | list[Source],
        config: LoaderConfig = LOADER,
        *,
        split: str = "train",
        view: ViewConfig = VIEW,
        **options: Any,
    ) -> TrainingLoader:
        sources = [Source(dataset, split)] if isinstance(dataset, Dataset) else dataset
        made.append(TrainingLoader(sources, view, config, **{"seed": 5, **options}))
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


def shape(row: int) -> ClipShape:
    return ClipShape(clips()[row].key, clips()[row].facts.n_frames, 8.0, 48, 32)


def test_a_batch_is_its_clips(data: Dataset, make: Callable[..., TrainingLoader]) -> None:
    """Frames and sound by the views of (seed, epoch, key); ids, sources and labels are the catalog's."""
    batch = take(make(data), 6)[-1]  # of the second epoch
    assert batch.video.shape == (4, 3, VIEW.frames, VIEW.size, VIEW.size)
    assert batch.audio.shape == (4, 1, VIEW.n_mels, VIEW.mel_steps)
    assert batch.second_video is None
    frames, sounds, views = [], [], []
    for row in batch.ids.tolist():
        clip, (view,) = clips()[row], training_views(VIEW, 5, 1, shape(row))
        numbers = VIEW.frame_numbers(view.start_frame, 8.0)
        frames.append(decode_frames(clip.members["mp4"], numbers, crop=view.crop, size=VIEW.size, deblock=False))
        sounds.append(np.frombuffer(clip.members["flac"], np.uint8))
        views.append(view)
    video, audio = Graph(VIEW, 4, "cpu", 1).run(frames, sounds, views)
    assert torch.equal(batch.video, video)
    assert torch.equal(batch.audio, audio)
    vocabulary = data.catalog.vocabulary("labels")
    assert [vocabulary[i] for i in batch.labels] == [f"label {row % 3}" for row in batch.ids.tolist()]
    sources = batch.sources[:, None] == batch.sources[None, :]
    assert torch.equal(sources, batch.ids[:, None] // 2 == batch.ids[None, :] // 2)


@pytest.mark.parametrize("second", ["same", "apart"])
def test_two_views_of_a_clip(data: Dataset, make: Callable[..., TrainingLoader], second: Literal["same", "apart"]) -> None:
    """Each as it would be alone."""
    config = replace(VIEW, second=second)
    batch = take(make(data, view=config), 2)[1]
    assert batch.second_video is not None
    assert batch.second_audio is not None
    views = [training_views(config, 5, 0, shape(row)) for row in batch.ids.tolist()]
    found = (batch.video, batch.audio), (batch.second_video, batch.second_audio)
    for which, (video, audio) in enumerate(found):
        for n, row in enumerate(batch.ids.tolist()):
            view, members = views[n][which], clips()[row].members
            numbers = config.frame_numbers(view.start_frame, 8.0)
            frames = decode_frames(members["mp4"], numbers, crop=view.crop, size=VIEW.size, deblock=False)
            alone = Graph(config, 1, "cpu", 1).run([frames], [np.frombuffer(members["flac"], np.uint8)], [view])
            assert torch.equal(video[n], alone[0][0])
            assert torch.equal(audio[n], alone[1][0])
    starts = [(a.start_frame, b.start_frame) for a, b in views]
    assert all(a == b for a, b in starts) if second == "same" else any(a != b for a, b in starts)


@pytest.mark.parametrize("on", [True, False])
def test_deblocked_when_asked(data: Dataset, make: Callable[..., TrainingLoader], on: bool) -> None:
    """Training as its option says, evaluation always."""
    assert make(data, replace(LOADER, deblock=on)).reader.deblock == on
    assert LOADER.reader([data], VIEW).deblock


def test_a_view_depends_on_its_epoch(data: Dataset, make: Callable[..., TrainingLoader]) -> None:
    batches = take(make(data), 8)
    first, second = ({int(i): b.video[n] for b in part for n, i in enumerate(b.ids)} for part in (batches[:4], batches[4:]))
    assert sum(torch.equal(first[i], second[i]) for i in range(TRAIN_CLIPS)) <= 1


def test_the_same_batches_from_every_position(data: Dataset, make: Callable[..., TrainingLoader]) -> None:
    """Bit for bit, whatever the threads and however far ahead; batches of 5 of 16 clips, so across the ends of epochs."""
    config = replace(LOADER, batch=5)
    unbroken = take(make(data, config), 10)
    walker = make(data, config)
    for stop, _ in enumerate(zip(range(10), walker, strict=False), start=1):
        after = make(data, replace(config, threads=1, ahead=1 + stop % 3))
        after.load_state_dict(json.loads(json.dumps(walker.state_dict())))
        assert after.position == 5 * stop
        for a, b in zip(take(after, min(2, 10 - stop)), unbroken[stop:], strict=False):
            assert_equal(a, b)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_make_the_batches_of_one(data: Dataset, make: Callable[..., TrainingLoader], world: int) -> None:
    """Every `world`-th clip of each global batch, bit for bit, also from another number of ranks' position on."""
    whole = take(make(data, replace(LOADER, batch=6)), 8)
    state = {}
    for rank in range(world):
        loader = make(data, replace(LOADER, batch=6, threads=1), rank=rank, world=world)
        for part, batch in zip(take(loader, 4), whole, strict=False):
            for name in ("video", "audio", "ids"):
                assert torch.equal(getattr(part, name), getattr(batch, name)[rank::world])
        state = loader.state_dict()
    later = make(data, replace(LOADER, batch=6))
    later.load_state_dict(state)
    assert ids(take(later, 4)) == ids(whole[4:])


@pytest.mark.parametrize(("world", "batch"), [(1, 5), (3, 5), (4, 6), (4, 4)])
def test_an_end_that_all_ranks_reach(data: Dataset, make: Callable[..., TrainingLoader], world: int, batch: int) -> None:
    """Two epochs of 16 clips: the same number of batches on each rank, the last one smaller, perhaps with nothing for a rank."""
    parts = []
    for rank in range(world):
        parts.append(list(make(data, replace(LOADER, batch=batch, threads=1), rank=rank, world=world, epochs=2)))
    assert {len(part) for part in parts} == {-(-32 // batch)}
    assert Counter(i for part in parts for i in ids(part)) == dict.fromkeys(range(TRAIN_CLIPS), 2)
    last = [part[-1] for part in parts]
    assert sum(len(b.ids) for b in last) == (32 - 1) % batch + 1
    assert all(b.video.shape == (len(b.ids), 3, VIEW.frames, VIEW.size, VIEW.size) for b in last)


def test_more_ranks_than_clips_in_a_batch(data: Dataset, make: Callable[..., TrainingLoader]) -> None:
    with pytest.raises(ValueError, match=r"^loader\.batch is 4 for 5 ranks; give at least 5"):
        make(data, rank=0, world=5)


def test_one_clip(tmp_path: Path, make: Callable[..., TrainingLoader]) -> None:
    """And a batch larger than the data set: the clip of several epochs, each with a view of its own."""
    one = write_dataset(tmp_path / "data", clips()[:1])
    first, second = take(make(one), 2)
    assert ids([first, second]) == [0] * 8
    views = [training_views(VIEW, 5, epoch, shape(0))[0] for epoch in range(8)]
    assert len(set(views)) == 8
    assert len({v.numpy().tobytes() for v in first.video}) == 4


def test_data_sets_are_mixed_by_weight(data: Dataset, tmp_path: Path, make: Callable[..., TrainingLoader]) -> None:
    """Ids and labels are numbered on; each source has epochs of its own; the position is one number."""
    other = write_dataset(tmp_path / "other", [make_clip(100 + i, labels=("else",), seconds=1.0) for i in range(4)])
    sources = [Source(data, "train", 3.0), Source(other, None, 1.0)]
    loader = make(sources)
    batches = take(loader, 16)
    seen = ids(batches)
    assert Counter(i >= len(data) for i in seen) == {False: 48, True: 16}
    assert sorted(seen) == sorted([*range(TRAIN_CLIPS)] * 3 + [len(data) + i for i in range(4)] * 4)
    labels = data.catalog.vocabulary("labels")
    of_other = torch.cat([batch.labels[batch.ids >= len(data)] for batch in batches])
    assert set(of_other.tolist()) == {len(labels)}
    assert loader.reader.key(len(data) + 2) == make_clip(102, seconds=1.0).key
    later = make(sources)
    later.load_state_dict({**loader.state_dict(), "position": 24})
    for a, b in zip(take(later, 3), batches[6:], strict=False):
        assert_equal(a, b)
    with pytest.raises(ValueError, match="the order of samples has shares"):
        make([Source(data, "train", 1.0), Source(other)]).load_state_dict(loader.state_dict())


def test_the_seed_matters(data: Dataset, make: Callable[..., TrainingLoader]) -> None:
    assert ids(take(make(data), 4)) != ids(take(make(data, seed=6), 4))


def test_fewer_clips_than_a_batch(data: Dataset, make: Callable[..., TrainingLoader]) -> None:
    """Six clips, batches of 16: each clip two or three times in the first, 8 times in three."""
    batches = take(make(data, replace(LOADER, batch=16), split="eval"), 3)
    assert [len(batch.ids) for batch in batches] == [16, 16, 16]
    eval_rows = range(TRAIN_CLIPS, TRAIN_CLIPS + EVAL_CLIPS)
    assert Counter(ids(batches)) == Counter(dict.fromkeys(eval_rows, 8))
    assert set(Counter(ids(batches[:1])).values()) == {2, 3}


@pytest.mark.parametrize("change", [{"window": 4}, {"streams": 3}])
def test_another_order_is_refused(data: Dataset, make: Callable[..., TrainingLoader], change: dict[str, int]) -> None:
    state = make(data).state_dict()
    with pytest.raises(ValueError, match=rf"the order of samples has {next(iter(change))} .*; use another run folder"):
        make(data, replace(LOADER, **change)).load_state_dict(state)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has seed 6, this run's checkpoint 5"):
        make(data, seed=6).load_state_dict(state)


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
    assert loader.state_dict()["bad"] == [[0, row, clips()[row].key] for row in sorted(replaced)]
    for rank in range(3):  # and every rank comes to the same by itself
        part = take(make(spoilt, rank=rank, world=3), 12)
        assert [b.ids.tolist() for b in part] == [b.ids.tolist()[rank::3] for b in found]


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
    view = central_view(VIEW, shape(20))
    numbers = VIEW.frame_numbers(view.start_frame, 8.0)
    frames = decode_frames(clip.members["mp4"], numbers, crop=view.crop, size=VIEW.size)
    expected, _ = Graph(VIEW, 1, "cpu", 1).run([frames], [np.frombuffer(clip.members["flac"], np.uint8)], [view])
    assert torch.equal(pictures[20], expected[0])


def test_only_bad_clips_make_no_batch(spoilt: Dataset) -> None:
    assert list(evaluation_batches(spoilt, VIEW, LOADER, np.array([2, 17]))) == []


def ours() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith(("loader", "decode"))}


def test_close_leaves_no_thread(data: Dataset) -> None:
    before = ours()
    loader = TrainingLoader([Source(data, "train")], VIEW, LOADER, seed=0)
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


def test_a_loader_that_is_let_go_of_leaves_no_thread(data: Dataset) -> None:
    """Never closed, its iterator broken out of."""
    before, threads = set(threading.enumerate()), set[threading.Thread]()
    for _ in range(3):
        loader = TrainingLoader([Source(data, "train")], VIEW, LOADER, seed=0)
        for _ in loader:
            break
        threads |= set(threading.enumerate()) - before
        del loader
    assert {"loader", "prefetch"} <= {t.name for t in threads}
    for _ in range(100):
        gc.collect()
        if not any(t.is_alive() for t in threads):
            break
        time.sleep(0.1)
    assert [t.name for t in threads if t.is_alive()] == []


def test_closing_ends_the_wait_of_another_thread(
    data: Dataset, make: Callable[..., TrainingLoader], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, read = threading.Event(), Dataset.read_rows
    monkeypatch.setattr(Dataset, "read_rows", lambda self, *args: (gate.wait(60), read(self, *args))[1])
    loader, found = make(data), list[list[Batch]]()
    consumer = threading.Thread(target=lambda: found.append(list(loader)), daemon=True)
    consumer.start()
    while not [t for t in threading.enumerate() if t.name == "read"]:
        time.sleep(0.01)
    loader.close()
    consumer.join(20)
    gate.set()
    assert found == [[]]


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
    finish, calls = ViewReader.finish, []

    def failing(self: ViewReader, pending: Pending, replace: Any) -> Batch:
        calls.append(pending)
        if len(calls) == 3:
            raise error
        return finish(self, pending, replace)

    monkeypatch.setattr(ViewReader, "finish", failing)
    batches = iter(loader)
    got = [next(batches), next(batches)]
    with pytest.raises(type(error)):
        next(batches)
    assert not told
    assert loader.position == 8
    got += take(loader, 1)
    for a, b in zip(got, take(make(data), 3), strict=True):
        assert_equal(a, b)


def test_the_producer_waits_for_the_consumer(
    data: Dataset, make: Callable[..., TrainingLoader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished are the batch in hand, one that is ready and one to follow it; begun are `ahead` more."""
    loader, begun, made = make(data, replace(LOADER, ahead=2)), [], []
    begin, finish = loader._begin, loader._finish
    monkeypatch.setattr(loader, "_begin", lambda position: begun.append(position) or begin(position))
    monkeypatch.setattr(loader, "_finish", lambda position, pending: made.append(position) or finish(position, pending))
    batches = iter(loader)
    next(batches)
    deadline = time.monotonic() + 20
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert made == [0, 4, 8]
    assert begun == [0, 4, 8, 12, 16]
    assert loader.position == 4


def test_what_is_waited_for_is_named(
    data: Dataset, make: Callable[..., TrainingLoader], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A source that answers no more: a warning every so often that names its shards, and no hang once it answers again."""
    loader, gate = make(data, replace(LOADER, patience_s=0.1)), threading.Event()
    read = Dataset.read_rows
    monkeypatch.setattr(Dataset, "read_rows", lambda self, *args: gate.wait(20) and read(self, *args))
    threading.Timer(0.5, gate.set).start()
    assert len(take(loader, 1)) == 1
    said = [r.getMessage() for r in caplog.records if "no batch for" in r.getMessage()]
    assert len(said) >= 2
    assert all(re.match(r"no batch for 0\.1 s: still reading .*/clips-00000\d\.tar", text) for text in said[:2])


def test_a_lost_shard_is_no_bad_clip(tmp_path: Path, make: Callable[..., TrainingLoader]) -> None:
    data = write_dataset(tmp_path / "data", clips())
    (tmp_path / "data" / "clips-000001.tar").unlink()
    told: list[BadClip] = []
    with pytest.raises(Exception, match=r"clips-000001\.tar is missing"):
        take(make(data, on_bad=told.append), 12)
    assert not told


def test_a_shard_cut_short_is_no_bad_clip(tmp_path: Path, make: Callable[..., TrainingLoader]) -> None:
    data = write_dataset(tmp_path / "data", clips())
    os.truncate(tmp_path / "data" / "clips-000001.tar", 2000)
    told: list[BadClip] = []
    with pytest.raises(DatasetError, match=r"clips-000001\.tar is truncated or changed"):
        take(make(data, on_bad=told.append), 12)
    assert not told


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"mp4": video_bytes(1, 12, 8, 64, 48)}, "its pictures are 64x48, the catalog says 48x32"),
        ({"mp4": audio_bytes(1)}, "there is no video in it"),
    ],
)
def test_a_clip_that_is_not_what_the_catalog_says(
    tmp_path: Path, make: Callable[..., TrainingLoader], members: dict[str, bytes], said: str
) -> None:
    some = clips()[:6]
    data = write_dataset(tmp_path / "data", [with_members(some[0], **members), *some[1:]])
    told: list[BadClip] = []
    assert set(ids(take(make(data, on_bad=told.append), 6))) == {1, 2, 3, 4, 5}
    assert [str(bad) for bad in told] == [f"clip {some[0].key} (row 0) does not decode: {said}"]


def test_a_shard_cut_short_while_it_is_read_is_no_bad_clip(tmp_path: Path) -> None:
    """The clip's file is open already: what is missing of it is the shard's fault, not its content's."""
    data = write_dataset(tmp_path / "data", clips())
    reader = LOADER.reader([data], VIEW)
    some = reader.look_up([0] * 3, [3, 9, 10])
    encoded = reader.read(some)
    for name in ("clips-000000.tar", "clips-000001.tar"):
        os.truncate(tmp_path / "data" / name, 3000)
    for clip, (video, sound) in zip(some, encoded, strict=True):
        with pytest.raises(DatasetError, match=r"clips-00000.\.tar is truncated: it should have bytes"):
            reader.decode(clip, [central_view(VIEW, clip.shape)], video, sound)
    reader.close()


def test_an_empty_member(data: Dataset) -> None:
    """Only the tars of others can have one."""
    reader = LOADER.reader([data], VIEW)
    (clip,) = reader.look_up([0], [1])
    for members, said in (((b"", b"x"), "video"), ((b"x", b""), "sound")):
        with pytest.raises(BadClip, match=f"its {said} member is empty"):
            reader.decode(clip, [central_view(VIEW, clip.shape)], *members)
    reader.close()


def test_clips_without_sound_are_refused(tmp_path: Path, data: Dataset) -> None:
    meta = json.loads((Path(data.url) / "dataset.json").read_text())
    shutil.copytree(data.url, tmp_path / "data")
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({**meta, "members": ["mp4", "json"]}))
    with pytest.raises(DatasetError, match=r"have no sound \(flac\), only mp4, json; training needs both"):
        LOADER.reader([Dataset.open(tmp_path / "data")], VIEW)


def test_a_wrong_option_is_named() -> None:
    wrong = {"batch": 0, "ahead": 0, "streams": 0, "window": -1, "threads": -1, "device": "tpu", "decoder": "x", "patience_s": 0}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=rf"^loader\.{name} is .*; (give|use) "):
            LoaderConfig(**{name: value})  # type: ignore[arg-type]
