"""Candidates of their own: which clips, by whom, and that a continued run comes to the same ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from train_data import TINY, TRAIN_CLIPS, clips, with_members, write_dataset

from cmacc.train.contrast.candidates import Candidates, Interrupted
from cmacc.train.contrast.objective import Memory
from cmacc.train.contrast.rings import Entries
from cmacc.train.loading.loader import BadClip, Batch
from cmacc.train.loading.sampler import Source

BATCH, WIDTH = TINY.loader.batch, 2


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    folder: Path = tmp_path_factory.mktemp("candidates") / "data"
    return [Source(write_dataset(folder, clips()), "train")]


def encode(batch: Batch, step: int, total: int) -> tuple[Entries, Entries]:
    """Keys that tell the clip and its view."""
    keys = torch.stack([batch.ids.float(), batch.video.double().mean((1, 2, 3, 4)).float()], 1)
    both = Entries(keys, batch.ids, batch.sources, batch.labels, torch.full_like(batch.ids, step))
    return both, both._replace(keys=-both.keys)


@contextmanager
def candidates(sources: list[Source], rank: int = 0, world: int = 1, **more: Any) -> Iterator[Candidates]:
    given: dict[str, Any] = {"encode": encode, "interrupted": lambda: False, "on_bad": None}
    given |= {name: more.pop(name) for name in list(more) if name in given}
    config = dataclasses.replace(TINY, objective=dataclasses.replace(TINY.objective, **more))
    ranks: Any = SimpleNamespace(rank=rank, size=world, device=torch.device("cpu"), agree=list)
    found = Candidates(
        sources, config, ranks, given["encode"], Memory(config.objective, WIDTH),
        interrupted=given["interrupted"], on_bad=given["on_bad"],
    )  # fmt: skip
    try:
        yield found
    finally:
        found.close()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pool", ["fresh", "epoch"])
def test_clips_that_do_not_decode_are_told(tmp_path: Path, pool: str) -> None:
    """Once each, as those of the training batches are."""
    some = [with_members(clip, flac=b"bad") if i in (3, 11) else clip for i, clip in enumerate(clips())]
    told: list[BadClip] = []
    with candidates([Source(write_dataset(tmp_path / "data", some), "train")], pool=pool, on_bad=told.append) as found:
        for step in range(2):
            found.for_step(step, BATCH * step)
    assert sorted(bad.row for bad in told) == [3, 11]


@pytest.mark.parametrize("more", [{"pool": "fifo"}, {"selector": "fifo"}, {"pool": "fresh", "share_start": 6}])
def test_nothing_is_read_where_nothing_is_picked(sources: list[Source], more: dict[str, Any]) -> None:
    def never(batch: Batch, step: int, total: int) -> tuple[Entries, Entries]:
        raise AssertionError

    with candidates(sources, encode=never, **more) as found:
        assert [found.for_step(step, BATCH * step) for step in range(6)] == [None] * 6


def test_fresh_candidates_are_a_function_of_the_step(sources: list[Source]) -> None:
    """Two epochs in order; from the middle; one step again; and none before the share of picks has risen above 0."""
    with candidates(sources, pool="fresh", fresh=2) as found:
        steps = [found.for_step(step, BATCH * step) for step in range(4)]
        for video, audio in filter(None, steps):
            assert len(video.ids) == 2 * BATCH
            assert torch.equal(video.ids, audio.ids)
        ids = [video.ids.tolist() for video, _ in filter(None, steps)]
        assert len({*ids[0], *ids[1]}) == len({*ids[2], *ids[3]}) == TRAIN_CLIPS
        assert ids[:2] != ids[2:]
        assert found.waited_s > 0
        again = found.for_step(1, BATCH)
    with candidates(sources, pool="fresh", fresh=2) as found:
        later = [found.for_step(step, BATCH * step) for step in (2, 3)]
    for one, other in zip((again, *later), steps[1:], strict=True):
        assert one
        assert other
        assert all(torch.equal(a, b) for one_column, other_column in zip(one, other, strict=True)
                   for a, b in zip(one_column, other_column, strict=True))  # fmt: skip


def test_candidates_are_not_the_batches_of_training(sources: list[Source]) -> None:
    """Another order, and other views of the same clips."""
    with candidates(sources, pool="fresh", fresh=4) as found:
        fresh = found.for_step(0, 0)
        seed = found.seed
    assert seed != TINY.seed
    assert fresh
    with candidates(sources, pool="fresh", fresh=4) as found:
        found.seed = TINY.seed
        same = found.for_step(0, 0)
    assert same
    assert same[0].ids.tolist() != fresh[0].ids.tolist()
    assert sorted(same[0].ids.tolist()) == sorted(fresh[0].ids.tolist())
    views = [dict(zip(video.ids.tolist(), video.keys[:, 1].tolist(), strict=True)) for video, _ in (fresh, same)]
    assert sum(views[0][clip] == views[1][clip] for clip in views[0]) < 4


def test_each_rank_reads_its_share(sources: list[Source]) -> None:
    with candidates(sources, pool="fresh", fresh=3) as found:
        whole = found.for_step(1, BATCH)
    assert whole
    for rank in range(2):
        with candidates(sources, rank, 2, pool="fresh", fresh=3) as found:
            part = found.for_step(1, BATCH)
        assert part
        assert part[0].ids.tolist() == whole[0].ids.tolist()[rank::2]


@pytest.mark.parametrize(("size", "held"), [(7, 7), (12, 12), (TRAIN_CLIPS, TRAIN_CLIPS), (40, TRAIN_CLIPS)])
def test_pools_are_filled_at_each_epochs_start(sources: list[Source], size: int, held: int) -> None:
    """N clips, none twice, all encoded in the step in which the epoch begins; another selection of them in each epoch."""
    with candidates(sources, pool="epoch", candidates=size) as found:
        memory, seen = found.memory, []
        for step in range(3 * TRAIN_CLIPS // BATCH):
            assert found.for_step(step, BATCH * step) is None
            epoch = step // (TRAIN_CLIPS // BATCH)
            assert memory.filled_in == epoch
            for ring in (memory.pool_video, memory.pool_audio):
                entries = ring.entries.take(ring.filled)
                assert len(set(entries.ids.tolist())) == len(entries.ids) == held
                assert set(entries.born.tolist()) == {epoch * (TRAIN_CLIPS // BATCH)}
            assert torch.equal(memory.pool_video.keys[:held], -memory.pool_audio.keys[:held])
            seen.append(memory.pool_video.ids.tolist())
        assert len({tuple(ids) for ids in seen}) == 3
    with candidates(sources, pool="epoch", candidates=size) as found:
        found.for_step(9, BATCH * 9)
        assert found.memory.pool_video.ids.tolist() == seen[9]


def test_a_fill_that_is_broken_off_begins_again(sources: list[Source]) -> None:
    """As when SIGTERM comes meanwhile: what is saved then holds pools of no epoch."""
    stop = [False]

    def stopping(batch: Batch, step: int, total: int) -> tuple[Entries, Entries]:
        stop[0] = True
        return encode(batch, step, total)

    more: dict[str, Any] = {"pool": "epoch", "candidates": 12}
    with candidates(sources, encode=stopping, interrupted=lambda: stop[0], **more) as found:
        with pytest.raises(Interrupted, match="step 4"):
            found.for_step(4, 16)
        assert found.memory.filled_in == int(found.memory.pool_epoch) == -1
        saved = {name: value.clone() for name, value in found.memory.state_dict().items()}
    with candidates(sources, **more) as found, candidates(sources, **more) as unbroken:
        found.memory.load_state_dict(saved)
        found.for_step(4, 16)
        unbroken.for_step(4, 16)
        for name, value in found.memory.state_dict().items():
            assert torch.equal(value, unbroken.memory.state_dict()[name])


def test_reading_fresh_candidates_can_be_interrupted(sources: list[Source]) -> None:
    with candidates(sources, pool="fresh", interrupted=lambda: True) as found, pytest.raises(Interrupted, match="step 3"):
        found.for_step(3, 12)
