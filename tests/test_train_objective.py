"""The objective: what may be picked and when, and ten steps against a slow plain model of the whole memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from train_data import unit

from cmacc.train.objective import Memory, ObjectiveConfig, after_step, contrast, pick
from cmacc.train.rings import Entries, Ring
from cmacc.train.schedule import ramp, warmup_constant, warmup_cosine

WIDTH, BATCH = 6, 3
CLIPS = 30
"""In the toy's data; two clips share a source video, five classes."""


def entries(keys: torch.Tensor, ids: list[int], born: int = 0) -> Entries:
    index = torch.tensor(ids)
    return Entries(keys, index, index // 2, index % 5, torch.full_like(index, born))


def full_pool(size: int, ids: list[int]) -> Ring:
    pool = Ring(size, WIDTH, unique=True)
    pool.enqueue(entries(unit(len(ids), WIDTH, seed=len(ids)), ids))
    return pool


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("queue", ["active", "uniform"])
def test_the_batch_and_its_source_videos_are_never_picked(queue: str) -> None:
    """Clips 0, 1, 8, 9, 14 and 15 are of the batch's sources; each other clip turns up, none of them does."""
    config = ObjectiveConfig(queue=queue, pool=20)
    pool, picked = full_pool(20, list(range(20))), set()
    for seed in range(60):
        slots = pick(unit(BATCH, WIDTH, seed=seed), pool, torch.tensor([0, 4, 7]), config, 0, draws(seed))
        assert len(set(slots.tolist())) == BATCH
        picked |= set(pool.entries.ids[slots].tolist())
    assert picked == set(range(20)) - {0, 1, 8, 9, 14, 15}


@pytest.mark.parametrize("queue", ["active", "uniform"])
def test_a_pool_of_less_than_four_batches_is_left_alone(queue: str) -> None:
    """The count is of the slots in use, not of those that may be picked."""
    config = ObjectiveConfig(queue=queue, pool=20)
    sources = torch.tensor([0, 1, 2])
    short = pick(unit(BATCH, WIDTH), full_pool(20, list(range(4 * BATCH - 1))), sources, config, 0, draws())
    assert short.tolist() == [-1] * BATCH
    ready = pick(unit(BATCH, WIDTH), full_pool(20, list(range(4 * BATCH))), sources, config, 0, draws())
    assert (ready >= 6).all()


def test_batch_keys_fill_the_places_for_which_nothing_is_left() -> None:
    """Twelve clips in the pool, all but two of the batch's sources: two picks, then the third clip's own key."""
    config = ObjectiveConfig(queue="active", pool=12, dictionary=9)
    memory = Memory(config, WIDTH)
    none = torch.zeros(12, dtype=torch.int64)
    memory.pool_audio.enqueue(Entries(unit(12, WIDTH), torch.arange(12), torch.tensor([7] * 10 + [8, 9]), none, none))
    keys = Entries(unit(3, WIDTH), torch.tensor([20, 21, 22]), torch.tensor([7, 7, 7]), none[:3], none[:3])
    result = contrast(unit(3, WIDTH), unit(3, WIDTH), keys, keys, memory, config, 1, draws())
    assert sorted(memory.dictionary_audio.entries.ids[:2].tolist()) == [10, 11]
    assert int(memory.dictionary_audio.filled.sum()) == 2
    assert result.late_audio.ids.tolist() == [-1, -1, 22]
    assert result.late_video.ids.tolist() == [20, 21, 22]
    after_step(memory, result, keys, keys)
    assert memory.dictionary_audio.entries.ids.tolist()[2:4] == [22, -1]
    assert memory.dictionary_video.entries.ids.tolist()[:4] == [20, 21, 22, -1]


def test_share_schedule() -> None:
    config = ObjectiveConfig(queue="active", share=0.5, share_start=100, share_ramp=200)
    steps = (0, 99, 100, 150, 200, 299, 300, 10_000)
    assert [config.picks(step, 32) for step in steps] == [0, 0, 0, 4, 8, 16, 16, 16]
    assert [ObjectiveConfig(queue="uniform", share_start=3).picks(step, 7) for step in (0, 2, 3, 4)] == [0, 0, 7, 7]
    for never in (ObjectiveConfig(queue="fifo"), ObjectiveConfig(negatives="batch"), ObjectiveConfig(share=0.0)):
        assert never.picks(10_000, 32) == 0


def test_schedules_of_the_rate() -> None:
    assert [ramp(step, 2, 4) for step in (0, 2, 3, 6, 9)] == [0, 0, 0.25, 1, 1]
    assert [warmup_constant(step, 4) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1, 1, 1]
    assert warmup_constant(0, 0) == warmup_cosine(0, 0, 10) == 1
    assert [warmup_cosine(step, 2, 10) for step in (0, 1, 2)] == [0.5, 1, 1]
    assert warmup_cosine(6, 2, 10) == pytest.approx(0.5)
    assert warmup_cosine(10, 2, 10) == pytest.approx(0)
    assert warmup_cosine(10, 2, 10, floor=0.1) == pytest.approx(0.1)


def test_picks_enter_before_the_loss_and_batch_keys_after() -> None:
    """Half the places go to picks: those are in this step's denominator, the batch's own keys in the next one's."""
    config = ObjectiveConfig(queue="uniform", share=0.5, dictionary=8, pool=20, tau=0.5)
    memory = Memory(config, WIDTH)
    memory.pool_audio.enqueue(entries(unit(20, WIDTH, seed=1), list(range(20))))
    memory.pool_video.enqueue(entries(unit(20, WIDTH, seed=2), list(range(20))))
    ids = [20, 22, 24, 26]
    k_video, k_audio = entries(unit(4, WIDTH, seed=3), ids, 5), entries(unit(4, WIDTH, seed=4), ids, 5)
    result = contrast(unit(4, WIDTH, seed=5), unit(4, WIDTH, seed=6), k_video, k_audio, memory, config, 5, draws())
    for parts, ring, late in (
        (result.video_to_audio, memory.dictionary_audio, result.late_audio),
        (result.audio_to_video, memory.dictionary_video, result.late_video),
    ):
        held = ring.entries.ids.tolist()
        assert all(0 <= i < 20 for i in held[:2])
        assert held[2:] == [-1] * 6
        assert parts.chance.item() == pytest.approx(math.log(3))
        assert late.ids.tolist() == [-1, -1, 24, 26]
    after_step(memory, result, k_video, k_audio)
    for dictionary, keys in ((memory.dictionary_video, k_video), (memory.dictionary_audio, k_audio)):
        assert dictionary.entries.ids.tolist()[2:] == [24, 26, -1, -1, -1, -1]
        assert torch.equal(dictionary.entries.keys[2:4], keys.keys[2:])
        assert dictionary.entries.born.tolist()[:4] == [0, 0, 5, 5]
    for pool, keys in ((memory.pool_video, k_video), (memory.pool_audio, k_audio)):
        assert set(ids) <= set(pool.entries.ids.tolist())
        assert torch.equal(pool.entries.take(pool.entries.ids == 26).keys, keys.keys[3:])


def test_each_direction_uses_its_own_modality() -> None:
    """Pictures of the batch choose sounds, and meet them; the reverse. Shown by the picks that queries would make."""
    config = ObjectiveConfig(queue="active", dictionary=8, pool=20, pseudo_tau=0.2)
    memory = Memory(config, WIDTH)
    pool = list(range(20))
    memory.pool_audio.enqueue(entries(unit(20, WIDTH, seed=1), pool))
    memory.pool_video.enqueue(entries(unit(20, WIDTH, seed=2), pool))
    keys = [entries(unit(4, WIDTH, seed=s), [20, 22, 24, 26]) for s in (3, 4)]
    q_video, q_audio = unit(4, WIDTH, seed=5), unit(4, WIDTH, seed=6)
    contrast(q_video, q_audio, *keys, memory, config, 0, draws(9))
    generator, chosen = draws(9), {}
    for query, name in ((q_video, "audio"), (q_audio, "video")):
        ring = getattr(memory, f"pool_{name}")
        slots = plain_active(query, [Kept.of(ring.entries, i) for i in range(20)], {10, 11, 12, 13}, 4, 0.2, generator)
        chosen[name] = [slots, ring.entries.keys[slots]]
    for name, (slots, picked) in chosen.items():
        dictionary = getattr(memory, f"dictionary_{name}").entries
        assert dictionary.ids.tolist()[:4] == slots
        assert torch.equal(dictionary.keys[:4], picked)
    assert chosen["audio"][0] != chosen["video"][0]


@dataclass
class Kept:
    """One entry of the plain model."""

    key: np.ndarray
    id: int
    source: int
    label: int
    born: int

    @classmethod
    def of(cls, entries: Entries, row: int) -> Kept:
        return cls(entries.keys[row].double().numpy(), *(int(column[row]) for column in entries[1:]))


@dataclass
class PlainSlots:
    slots: list[Kept | None]
    cursor: int = 0

    def put(self, kept: Kept) -> None:
        self.slots[self.cursor] = kept
        self.cursor = (self.cursor + 1) % len(self.slots)

    def forget(self, ids: list[int]) -> None:
        self.slots = [None if s and s.id in ids else s for s in self.slots]


def plain_active(
    queries: torch.Tensor, slots: list[Kept | None], banned: set[int], count: int, pseudo_tau: float, generator: torch.Generator
) -> list[int]:
    """k-means++ over materialised outer products in float64, by the same draws."""
    u = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    free = [n for n, s in enumerate(slots) if s and s.source not in banned]
    gradients = {}
    for n in free:
        p = np.exp(queries.double().numpy() @ slots[n].key / pseudo_tau)
        p /= p.sum()
        p[np.argmax(p)] -= 1
        gradients[n] = np.outer(p, slots[n].key)
    picks = [max(free, key=lambda n: (gradients[n] ** 2).sum())]
    while len(picks) < count:
        weights = [min(((gradients[n] - gradients[c]) ** 2).sum() for c in picks) if n not in picks else 0.0 for n in free]
        sums = np.cumsum(weights)
        picks.append(free[int(np.argmax(sums > u[len(picks)] * sums[-1]))])
    return picks


@dataclass
class PlainMemory:
    """METHOD's step, read aloud: one dictionary and one pool a modality, plain lists, float64."""

    config: ObjectiveConfig
    dictionary: dict[str, PlainSlots] = field(init=False)
    pool: dict[str, PlainSlots] = field(init=False)

    def __post_init__(self) -> None:
        both = ("video", "audio")
        self.dictionary = {m: PlainSlots([None] * self.config.dictionary) for m in both}
        self.pool = {m: PlainSlots([None] * self.config.pool) for m in both}

    def step(
        self, queries: dict[str, torch.Tensor], keys: dict[str, list[Kept]], step: int, draws: torch.Generator
    ) -> list[float]:
        losses, late = [], {}
        for asking, asked in (("video", "audio"), ("audio", "video")):
            picks = self.picks(queries[asking], asked, {k.source for k in keys[asked]}, step, draws)
            for n in picks:
                self.dictionary[asked].put(self.pool[asked].slots[n])
            late[asked] = keys[asked][len(picks) :]
            losses.append(self.loss(queries[asking].double().numpy(), asked, keys[asked]))
        for asked in ("video", "audio"):
            for kept in late[asked]:
                self.dictionary[asked].put(kept)
            self.pool[asked].forget([k.id for k in keys[asked]])
            for kept in keys[asked]:
                self.pool[asked].put(kept)
        return losses

    def picks(self, queries: torch.Tensor, asked: str, banned: set[int], step: int, draws: torch.Generator) -> list[int]:
        grown = min(1.0, max(0, step - self.config.share_start) / self.config.share_ramp)
        count = 0 if self.config.queue == "fifo" else round(self.config.share * grown * BATCH)
        slots = self.pool[asked].slots
        if count == 0:
            return []
        ready = sum(s is not None for s in slots) >= 4 * BATCH
        if self.config.queue == "active":
            if ready:
                return plain_active(queries, slots, banned, count, self.config.pseudo_tau, draws)
            torch.rand(count, generator=draws, dtype=torch.float64)
            return []
        scores = torch.rand(len(slots), generator=draws).tolist()
        free = [n for n, s in enumerate(slots) if s and s.source not in banned]
        return sorted(free, key=lambda n: -scores[n])[:count] if ready else []

    def loss(self, queries: np.ndarray, asked: str, keys: list[Kept]) -> float:
        total = 0.0
        for i, (q, k) in enumerate(zip(queries, keys, strict=True)):
            negatives = [s.key for s in self.dictionary[asked].slots if s and s.source != k.source]
            if self.config.negatives == "batch+dictionary":
                negatives += [other.key for j, other in enumerate(keys) if j != i]
            own = math.exp(q @ k.key / self.config.tau)
            total -= math.log(own / (own + sum(math.exp(q @ n / self.config.tau) for n in negatives)))
        return total / len(keys)


def assert_slots(ring: Ring, plain: PlainSlots) -> None:
    assert int(ring.cursor) == plain.cursor
    assert ring.entries.ids.tolist() == [s.id if s else -1 for s in plain.slots]
    for i, s in enumerate(plain.slots):
        if s:
            found = Kept.of(ring.entries, i)
            assert np.array_equal(found.key, s.key)
            assert (found.source, found.label, found.born) == (s.source, s.label, s.born)


@pytest.mark.parametrize("negatives", ["dictionary", "batch+dictionary"])
@pytest.mark.parametrize("queue", ["fifo", "uniform", "active"])
def test_a_trajectory_against_the_plain_model(queue: str, negatives: str) -> None:
    """Fourteen steps: the dictionary (7 places) wraps, the pool fills, the share of picks grows from 0 to 2 of 3."""
    config = ObjectiveConfig(
        negatives=negatives, queue=queue, dictionary=7, pool=16, tau=0.3, pseudo_tau=0.15, share=0.7, share_start=1, share_ramp=4
    )
    memory, plain = Memory(config, WIDTH), PlainMemory(config)
    order = np.random.default_rng(5)
    picked = 0
    for step in range(14):
        ids = order.choice(CLIPS, BATCH, replace=False).tolist()
        queries = {m: unit(BATCH, WIDTH, seed=100 * step + s) for m, s in (("video", 0), ("audio", 1))}
        keys = {m: entries(unit(BATCH, WIDTH, seed=100 * step + s), ids, step) for m, s in (("video", 2), ("audio", 3))}
        result = contrast(queries["video"], queries["audio"], keys["video"], keys["audio"], memory, config, step, draws(step))
        after_step(memory, result, keys["video"], keys["audio"])
        kept = {m: [Kept.of(keys[m], i) for i in range(BATCH)] for m in keys}
        v_to_a, a_to_v = plain.step(queries, kept, step, draws(step))
        assert result.video_to_audio.loss.item() == pytest.approx(v_to_a, rel=1e-5), step
        assert result.audio_to_video.loss.item() == pytest.approx(a_to_v, rel=1e-5), step
        picked += int((result.late_audio.ids == -1).sum())
        for m in ("video", "audio"):
            assert_slots(getattr(memory, f"dictionary_{m}"), plain.dictionary[m])
            assert_slots(getattr(memory, f"pool_{m}"), plain.pool[m])
    assert (picked == 0) == (queue == "fifo")


@pytest.mark.parametrize(
    "wrong",
    [{"tau": 0.0}, {"pseudo_tau": -1.0}, {"momentum": 1.0}, {"share": 1.1}, {"dictionary": 0}, {"pool": 0}, {"queue": "lifo"},
     {"negatives": "none"}, {"form": "last"}, {"tau": math.nan}],
)  # fmt: skip
def test_a_wrong_option_is_named(wrong: dict[str, object]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"^objective\.{name} is .*; (give|use) "):
        ObjectiveConfig(**wrong)  # type: ignore[arg-type]
