"""The objective: what may be picked and when, and ten steps against a slow plain model of the whole memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from oracles import gradients, rejection_seeding
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_data import unit

from cmacc.train.contrast.objective import Choice, Contrast, Memory, ObjectiveConfig, Pool, Queries, after_step, choose, contrast
from cmacc.train.contrast.rings import Entries, Ring
from cmacc.train.contrast.seeding import kmeans_plus_plus
from cmacc.train.contrast.selection import SEEDINGS, Select
from cmacc.train.schedule import ramp, warmup_constant, warmup_cosine

WIDTH, BATCH = 6, 3
CLIPS = 30
"""In the toy's data; two clips share a source video, five classes."""
ACTIVE: tuple[Select, ...] = ("kmeans++", "greedy", "k-center", "uncertainty", "random")


def entries(keys: torch.Tensor, ids: list[int], born: int = 0) -> Entries:
    index = torch.tensor(ids)
    return Entries(keys, index, index // 2, index % 5, torch.full_like(index, born))


def chosen_and_scored(
    q_video: torch.Tensor, q_audio: torch.Tensor, k_video: Entries, k_audio: Entries, memory: Memory, step: int, seed: int = 0
) -> tuple[Choice, Contrast]:
    queries = Queries(q_video, q_audio)
    choice = choose(queries, k_video, k_audio, memory, memory.config, step, draws(seed))
    return choice, contrast(queries, k_video, k_audio, memory, memory.config, choice)


def memory_with_pools(config: ObjectiveConfig, ids: list[int], born: int = 0) -> Memory:
    memory = Memory(config, WIDTH)
    for seed, pool in enumerate((memory.pool_video, memory.pool_audio) if config.keeps_pool else ()):
        pool.enqueue(entries(unit(len(ids), WIDTH, seed=len(ids) + seed), ids, born))
    return memory


def picks(memory: Memory, ids: list[int], step: int = 0, seed: int = 0, **more: Any) -> list[list[int]]:
    """Clips picked for a batch of `ids`: of sounds, and of pictures."""
    keys = entries(unit(len(ids), WIDTH, seed=seed), ids, step)
    queries = Queries(unit(len(ids), WIDTH, seed=seed + 1), unit(len(ids), WIDTH, seed=seed + 2))
    choice = choose(queries, keys, keys, memory, memory.config, step, draws(seed), **more)
    return [choice.picked_audio.ids.tolist(), choice.picked_video.ids.tolist()]


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("selector", ACTIVE)
def test_the_batch_and_its_source_videos_are_never_picked(selector: Select) -> None:
    """Clips 0, 1, 8, 9, 14 and 15 are of the batch's sources; none of them is picked, each other one now and then."""
    memory, picked = memory_with_pools(ObjectiveConfig(selector=selector, candidates=20), list(range(20))), set()
    for seed in range(40):
        for clips in picks(memory, [0, 8, 14], seed=seed):
            assert len(set(clips)) == BATCH
            picked |= set(clips)
    others = set(range(20)) - {0, 1, 8, 9, 14, 15}
    assert picked == others if selector in ("kmeans++", "random") else picked <= others


@pytest.mark.parametrize("selector", ACTIVE)
def test_a_pool_of_less_than_four_batches_is_left_alone(selector: Select) -> None:
    """The count is of the slots in use, not of those that may be picked. A pool that holds less at all is used when full."""
    config = ObjectiveConfig(selector=selector, candidates=20)
    for clips in picks(memory_with_pools(config, list(range(4 * BATCH - 1))), [0, 2, 4]):
        assert clips == [-1] * BATCH
    for clips in picks(memory_with_pools(config, list(range(4 * BATCH))), [0, 2, 4]):
        assert all(i >= 6 for i in clips)
    small = ObjectiveConfig(selector=selector, candidates=8)
    for clips in picks(memory_with_pools(small, list(range(7))), [20, 22, 24]):
        assert clips == [-1] * BATCH
    for clips in picks(memory_with_pools(small, list(range(8))), [20, 22, 24]):
        assert -1 not in clips


def test_batch_keys_fill_the_places_for_which_nothing_is_left() -> None:
    """Twelve clips in the pool, all but two of the batch's sources: two picks, then the third clip's own key."""
    memory = Memory(ObjectiveConfig(selector="kmeans++", candidates=12, dictionary=9), WIDTH)
    none = torch.zeros(12, dtype=torch.int64)
    memory.pool_audio.enqueue(Entries(unit(12, WIDTH), torch.arange(12), torch.tensor([7] * 10 + [8, 9]), none, none))
    keys = Entries(unit(3, WIDTH), torch.tensor([20, 21, 22]), torch.tensor([7, 7, 7]), none[:3], none[:3])
    choice, _ = chosen_and_scored(unit(3, WIDTH), unit(3, WIDTH), keys, keys, memory, 1)
    assert sorted(memory.dictionary_audio.entries.ids[:2].tolist()) == [10, 11]
    assert int(memory.dictionary_audio.filled.sum()) == 2
    assert choice.late_audio.ids.tolist() == [-1, -1, 22]
    assert choice.late_video.ids.tolist() == [20, 21, 22]
    facts = choice.facts()
    assert facts.pop("selection/seconds") > 0
    assert facts == {"selection/picked": 2, "selection/age": 1}
    after_step(memory, choice, keys, keys)
    assert memory.dictionary_audio.entries.ids.tolist()[2:4] == [22, -1]
    assert memory.dictionary_video.entries.ids.tolist()[:4] == [20, 21, 22, -1]


def test_the_age_limit() -> None:
    """Keys of more than so many steps ago are neither picked nor among the negatives; -1 of age, the limit, is."""
    config = ObjectiveConfig(candidates=24, dictionary=9, age_limit=10, tau=0.5)
    memory = memory_with_pools(config, list(range(12)), born=5)
    for pool in (memory.pool_video, memory.pool_audio):
        pool.enqueue(entries(unit(6, WIDTH, seed=3), list(range(12, 18)), 6))
    for clips in picks(memory, [20, 22, 24], step=15):
        assert -1 not in clips
    memory = memory_with_pools(config, list(range(12)), born=5)
    for pool in (memory.pool_video, memory.pool_audio):
        pool.enqueue(entries(unit(2, WIDTH, seed=3), [12, 13], 6))
    for clips in picks(memory, [20, 22, 24], step=16):
        assert sorted(clips) == [-1, 12, 13]
    late = Memory(dataclasses.replace(config, selector="fifo"), WIDTH)
    for ring in (late.dictionary_video, late.dictionary_audio):
        ring.enqueue(entries(unit(5, WIDTH), [0, 2, 4, 6, 8], 5))
        ring.enqueue(entries(unit(2, WIDTH), [10, 12], 6))
    keys = entries(unit(3, WIDTH, seed=4), [20, 22, 24])
    for step, negatives in ((15, 7), (16, 2), (17, 0)):
        _, result = chosen_and_scored(unit(3, WIDTH), unit(3, WIDTH), keys, keys, late, step)
        assert result.video_to_audio.chance.item() == pytest.approx(math.log(1 + negatives))


def test_without_repeats_what_is_in_the_dictionary_is_not_picked() -> None:
    config = ObjectiveConfig(candidates=14, dictionary=9, selector="random")
    for repeats, expected in ((True, range(14)), (False, range(5, 14))):
        memory = memory_with_pools(dataclasses.replace(config, repeats=repeats), list(range(14)))
        found: set[int] = set()
        for seed in range(40):
            memory.dictionary_audio.clear()
            memory.dictionary_audio.enqueue(entries(unit(5, WIDTH), [0, 1, 2, 3, 4]))
            found |= set(picks(memory, [20, 22, 24], seed=seed)[0])
        assert found == set(expected)


def test_fresh_candidates_are_picked_from_the_first_step_on_and_no_clip_twice() -> None:
    """No pool is kept. A clip that comes twice counts once, a key that is not finite and the batch's sources not at all."""
    memory = Memory(ObjectiveConfig(pool="fresh", fresh=3, dictionary=9, selector="random"), WIDTH)
    assert not [name for name in memory.state_dict() if "pool" in name]
    ids = [0, 1, 6, 6, 7, 8, 9, 10, 11]
    fresh = [entries(unit(9, WIDTH, seed=seed), ids, 3) for seed in (5, 6)]
    fresh[0].keys[8, 2] = math.nan
    seen: list[set[int]] = [set(), set()]
    for seed in range(40):
        both = picks(memory, [0, 20, 22], step=3, seed=seed, fresh=(fresh[0], fresh[1]))
        for found, clips in zip(seen, both, strict=True):
            assert len(set(clips)) == 3
            found |= set(clips)
    assert seen == [{6, 7, 8, 9, 10, 11}, {6, 7, 8, 9, 10}]
    assert torch.isfinite(memory.dictionary_video.entries.keys).all()
    with pytest.raises(ValueError, match=r"objective\.pool is fresh, but .* no candidates"):
        picks(memory, [0, 20, 22])


def test_a_filled_pool_is_of_its_epoch_and_batch_keys_do_not_enter_it() -> None:
    config = ObjectiveConfig(pool="epoch", candidates=12, dictionary=9)
    memory = Memory(config, WIDTH)
    assert memory.filled_in == -1
    for epoch, clips in ((0, list(range(12))), (1, list(range(20, 32)))):
        with memory.filling(epoch) as fill:
            assert memory.filled_in == int(memory.pool_epoch) == -1
            for part in (clips[:7], clips[7:]):
                fill(entries(unit(len(part), WIDTH, seed=epoch), part), entries(unit(len(part), WIDTH, seed=epoch + 2), part))
        assert memory.filled_in == int(memory.pool_epoch) == epoch
        assert memory.pool_video.entries.ids.tolist() == memory.pool_audio.entries.ids.tolist() == clips
    keys = entries(unit(3, WIDTH), [40, 42, 44])
    choice, _ = chosen_and_scored(unit(3, WIDTH), unit(3, WIDTH), keys, keys, memory, 0)
    after_step(memory, choice, keys, keys)
    assert memory.pool_video.entries.ids.tolist() == list(range(20, 32))
    assert set(choice.picked_audio.ids.tolist()) < set(range(20, 32))

    other = torch.nn.ModuleDict({"memory": Memory(config, WIDTH)})
    inner = other["memory"]
    assert isinstance(inner, Memory)
    assert inner.filled_in == -1
    other.load_state_dict({f"memory.{name}": value for name, value in memory.state_dict().items()})
    assert inner.filled_in == 1
    with pytest.raises(RuntimeError, match="broken off"), inner.filling(2):
        raise RuntimeError("broken off")
    assert inner.filled_in == int(inner.pool_epoch) == -1


@pytest.mark.parametrize(
    ("config", "rings"),
    [(ObjectiveConfig(), 4), (ObjectiveConfig(selector="fifo"), 2), (ObjectiveConfig(share=0.0), 2),
     (ObjectiveConfig(pool="fresh"), 2), (ObjectiveConfig(pool="epoch"), 4), (ObjectiveConfig(negatives="batch"), 0)],
)  # fmt: skip
def test_memory_is_no_more_than_is_used(config: ObjectiveConfig, rings: int) -> None:
    memory = Memory(dataclasses.replace(config, dictionary=5, candidates=7), WIDTH)
    state = memory.state_dict()
    assert len([name for name in state if name.endswith(".keys")]) == rings
    assert ("pool_epoch" in state) == (config.pool == "epoch")


class NoLook(TorchDispatchMode):
    """Refuses what on a GPU would make the host wait: reading a number, or a shape that depends on numbers. And what there is
    not the same on all ranks bit for bit: the cumulative sum of floats that are a single row."""

    LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(getattr(index, "dtype", None) == torch.bool for index in tree_leaves(args[1]))
        assert not by_mask, name
        assert name not in self.LOOKS, name
        assert name != "cumsum" or not args[0].is_floating_point() or args[0].numel() > args[0].shape[args[1]], name
        return func(*args, **(kwargs or {}))


def test_looking_is_noticed() -> None:
    index = torch.tensor(2)
    looks: list[Callable[[torch.Tensor], object]] = [
        lambda x: x[index], lambda x: x[x > 2], lambda x: float(x.sum()), lambda x: x.unique(), lambda x: bool(x[0]),
        lambda x: x.cumsum(0), lambda x: x[None].cumsum(1),
    ]  # fmt: skip
    for look in looks:
        with NoLook(), pytest.raises(AssertionError):
            look(torch.arange(4.0))


@pytest.mark.parametrize(("pool", "more"), [("fifo", {"repeats": False, "age_limit": 9}), ("fresh", {"first": "uniform"})])
@pytest.mark.parametrize("selector", [*ACTIVE, "fifo"])
def test_a_step_waits_for_no_number(selector: Select, pool: Pool, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: no look at numbers from the choice to what enters the rings."""
    monkeypatch.setitem(SEEDINGS, "kmeans++", partial(kmeans_plus_plus, looks=False))
    memory = memory_with_pools(ObjectiveConfig(selector=selector, candidates=30, dictionary=9), list(range(30)))
    memory.config = dataclasses.replace(memory.config, pool=pool, **more)
    candidates, k = entries(unit(9, WIDTH), list(range(9))), entries(unit(3, WIDTH, seed=1), [40, 42, 44])
    fresh = (candidates, candidates) if pool == "fresh" else None
    queries, generator, ok = Queries(unit(3, WIDTH, seed=3), unit(3, WIDTH, seed=4)), draws(), torch.tensor(True)
    for query in queries[:2]:
        query.requires_grad_()
    with NoLook():
        choice = choose(queries, k, k, memory, memory.config, 5, generator, fresh)
        contrast(queries, k, k, memory, memory.config, choice).loss.backward()
        after_step(memory, choice, k, k, ok)
    assert (-1 in choice.picked_audio.ids.tolist()) == (selector == "fifo")


@pytest.mark.parametrize("pool", ["fifo", "fresh"])
@pytest.mark.parametrize("selector", ACTIVE)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_queries_that_are_not_finite_do_no_harm(bad: float, selector: Select, pool: Pool) -> None:
    """Picks are entries of the pool all the same; keys that are not finite enter nothing, nor does anything when not ok."""
    config = ObjectiveConfig(selector=selector, pool=pool, candidates=20, dictionary=30, share=0.7)
    memory = Memory(config, WIDTH)
    candidates = entries(unit(20, WIDTH, seed=7), list(range(20)))
    if pool == "fifo":
        memory.pool_video.enqueue(candidates)
        memory.pool_audio.enqueue(candidates)
    fresh = (candidates, candidates) if pool == "fresh" else None
    for ok in (False, True, None):
        keys, queries = unit(3, WIDTH, seed=1), unit(3, WIDTH, seed=2)
        keys[2, 0], queries[1, 3] = bad, bad
        k = entries(keys, [20, 22, 24])
        choice = choose(Queries(queries, queries), k, k, memory, config, 0, draws(), fresh)
        for picked in (choice.picked_video, choice.picked_audio):
            assert [i in range(20) for i in picked.ids.tolist()] == [True, True, False]
        assert choice.late_video.ids.tolist() == [-1, -1, 24]
        before = {name: value.clone() for name, value in memory.state_dict().items()}
        after_step(memory, choice, k, k, None if ok is None else torch.tensor(ok))
        changed = [name for name, value in memory.state_dict().items() if not torch.equal(value, before[name])]
        assert not [name for name in changed if name.startswith("dictionary") or ok is False]
        assert all(torch.isfinite(value).all() for value in memory.state_dict().values())
        if pool == "fifo":
            assert ({20, 22} <= set(memory.pool_video.entries.ids.tolist())) == (ok is not False)
            assert 24 not in memory.pool_video.entries.ids.tolist()


def test_share_schedule() -> None:
    config = ObjectiveConfig(selector="kmeans++", share=0.5, share_start=100, share_ramp=200)
    steps = (0, 99, 100, 150, 200, 299, 300, 10_000)
    assert [config.picks(step, 32) for step in steps] == [0, 0, 0, 4, 8, 16, 16, 16]
    assert [ObjectiveConfig(selector="random", share_start=3).picks(step, 7) for step in (0, 2, 3, 4)] == [0, 0, 7, 7]
    for never in (ObjectiveConfig(selector="fifo"), ObjectiveConfig(negatives="batch"), ObjectiveConfig(share=0.0)):
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
    config = ObjectiveConfig(selector="random", share=0.5, dictionary=8, candidates=20, tau=0.5)
    memory = Memory(config, WIDTH)
    memory.pool_audio.enqueue(entries(unit(20, WIDTH, seed=1), list(range(20))))
    memory.pool_video.enqueue(entries(unit(20, WIDTH, seed=2), list(range(20))))
    ids = [20, 22, 24, 26]
    k_video, k_audio = entries(unit(4, WIDTH, seed=3), ids, 5), entries(unit(4, WIDTH, seed=4), ids, 5)
    choice, result = chosen_and_scored(unit(4, WIDTH, seed=5), unit(4, WIDTH, seed=6), k_video, k_audio, memory, 5)
    for parts, ring, late in (
        (result.video_to_audio, memory.dictionary_audio, choice.late_audio),
        (result.audio_to_video, memory.dictionary_video, choice.late_video),
    ):
        held = ring.entries.ids.tolist()
        assert all(0 <= i < 20 for i in held[:2])
        assert held[2:] == [-1] * 6
        assert parts.chance.item() == pytest.approx(math.log(3))
        assert late.ids.tolist() == [-1, -1, 24, 26]
    after_step(memory, choice, k_video, k_audio)
    for dictionary, keys in ((memory.dictionary_video, k_video), (memory.dictionary_audio, k_audio)):
        assert dictionary.entries.ids.tolist()[2:] == [24, 26, -1, -1, -1, -1]
        assert torch.equal(dictionary.entries.keys[2:4], keys.keys[2:])
        assert dictionary.entries.born.tolist()[:4] == [0, 0, 5, 5]
    for pool, keys in ((memory.pool_video, k_video), (memory.pool_audio, k_audio)):
        assert set(ids) <= set(pool.entries.ids.tolist())
        assert torch.equal(pool.entries.take(pool.entries.ids == 26).keys, keys.keys[3:])


def test_each_direction_uses_its_own_modality() -> None:
    """Pictures of the batch choose sounds, and meet them; the reverse. Shown by the picks that queries would make."""
    config = ObjectiveConfig(selector="kmeans++", dictionary=8, candidates=20, pseudo_tau=0.2)
    memory = Memory(config, WIDTH)
    pool = list(range(20))
    memory.pool_audio.enqueue(entries(unit(20, WIDTH, seed=1), pool))
    memory.pool_video.enqueue(entries(unit(20, WIDTH, seed=2), pool))
    keys = [entries(unit(4, WIDTH, seed=s), [20, 22, 24, 26]) for s in (3, 4)]
    q_video, q_audio = unit(4, WIDTH, seed=5), unit(4, WIDTH, seed=6)
    chosen_and_scored(q_video, q_audio, *keys, memory, 0, seed=9)
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
    """Active selection by the oracle."""
    free = np.array([bool(s) and s.source not in banned for s in slots])
    keys = np.stack([s.key if s else np.zeros(WIDTH) for s in slots])
    g = gradients(torch.from_numpy(keys), queries, pseudo_tau, "badge")
    return rejection_seeding(g, free, count, generator, "norm")


@dataclass
class PlainMemory:
    """METHOD's step, read aloud: one dictionary and one pool a modality, plain lists, float64."""

    config: ObjectiveConfig
    dictionary: dict[str, PlainSlots] = field(init=False)
    pool: dict[str, PlainSlots] = field(init=False)

    def __post_init__(self) -> None:
        both = ("video", "audio")
        self.dictionary = {m: PlainSlots([None] * self.config.dictionary) for m in both}
        self.pool = {m: PlainSlots([None] * self.config.candidates) for m in both}

    def step(
        self, queries: dict[str, torch.Tensor], keys: dict[str, list[Kept]], step: int, draws: torch.Generator
    ) -> list[float]:
        losses, late = [], {}
        count = self.count(step)
        random = self.config.selector == "random" and count
        scores = torch.rand(2, self.config.candidates, generator=draws, dtype=torch.float64).tolist() if random else [[], []]
        for number, (asking, asked) in enumerate((("video", "audio"), ("audio", "video"))):
            banned = {k.source for k in keys[asked]}
            picks = self.picks(queries[asking], asked, banned, count, scores[number], draws) if count else []
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

    def count(self, step: int) -> int:
        grown = min(1.0, max(0, step - self.config.share_start) / self.config.share_ramp)
        return 0 if self.config.selector == "fifo" else round(self.config.share * grown * BATCH)

    def picks(
        self, queries: torch.Tensor, asked: str, banned: set[int], count: int, scores: list[float], draws: torch.Generator
    ) -> list[int]:
        slots = self.pool[asked].slots
        if sum(s is not None for s in slots) < 4 * BATCH:
            return []
        if self.config.selector == "kmeans++":
            return plain_active(queries, slots, banned, count, self.config.pseudo_tau, draws)
        free = [n for n, s in enumerate(slots) if s and s.source not in banned]
        return sorted(free, key=lambda n: -scores[n])[:count]

    def loss(self, queries: np.ndarray, asked: str, keys: list[Kept]) -> float:
        total = 0.0
        for q, k in zip(queries, keys, strict=True):
            negatives = [s.key for s in self.dictionary[asked].slots if s and s.source != k.source]
            if self.config.negatives == "batch+dictionary":
                negatives += [other.key for other in keys if other.source != k.source]
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
@pytest.mark.parametrize("selector", ["fifo", "random", "kmeans++"])
def test_a_trajectory_against_the_plain_model(selector: str, negatives: str) -> None:
    """Fourteen steps: the dictionary (7 places) wraps, the pool fills, the share of picks grows from 0 to 2 of 3."""
    config = ObjectiveConfig(
        negatives=negatives,
        selector=selector,
        dictionary=7,
        candidates=16,
        tau=0.3,
        pseudo_tau=0.15,
        share=0.7,
        share_start=1,
        share_ramp=4,
    )
    memory, plain = Memory(config, WIDTH), PlainMemory(config)
    order = np.random.default_rng(5)
    picked = 0
    for step in range(14):
        ids = order.choice(CLIPS, BATCH, replace=False).tolist()
        queries = {m: unit(BATCH, WIDTH, seed=100 * step + s) for m, s in (("video", 0), ("audio", 1))}
        keys = {m: entries(unit(BATCH, WIDTH, seed=100 * step + s), ids, step) for m, s in (("video", 2), ("audio", 3))}
        choice, result = chosen_and_scored(
            queries["video"], queries["audio"], keys["video"], keys["audio"], memory, step, seed=step
        )
        after_step(memory, choice, keys["video"], keys["audio"])
        kept = {m: [Kept.of(keys[m], i) for i in range(BATCH)] for m in keys}
        v_to_a, a_to_v = plain.step(queries, kept, step, draws(step))
        assert result.video_to_audio.loss.item() == pytest.approx(v_to_a, rel=1e-5), step
        assert result.audio_to_video.loss.item() == pytest.approx(a_to_v, rel=1e-5), step
        picked += int((choice.late_audio.ids == -1).sum())
        for m in ("video", "audio"):
            assert_slots(getattr(memory, f"dictionary_{m}"), plain.dictionary[m])
            if selector != "fifo":
                assert_slots(getattr(memory, f"pool_{m}"), plain.pool[m])
    assert (picked == 0) == (selector == "fifo")


@pytest.mark.parametrize(
    "wrong",
    [{"tau": 0.0}, {"pseudo_tau": -1.0}, {"momentum": 1.0}, {"share": 1.1}, {"dictionary": 0}, {"candidates": 0},
     {"selector": "lifo"},
     {"negatives": "none"}, {"form": "last"}, {"tau": math.nan}, {"pool": "lifo"}, {"fresh": 0}, {"first": "any"},
     {"age_limit": -1}, {"share_ramp": -1}, {"share_start": -2}],
)  # fmt: skip
def test_a_wrong_option_is_named(wrong: dict[str, object]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"^objective\.{name} is .*; (give|use) "):
        ObjectiveConfig(**wrong)  # type: ignore[arg-type]
