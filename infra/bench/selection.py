"""Active selection beside a plain loop, a materialised one, and the encoders' own time, on two CPU threads.

    python infra/bench/selection.py            # a minute or two; about 1 GB for the materialised gradients
    python infra/bench/selection.py --large    # M = 128, N = 38,400, d = 512 beside R3D-18, too; two minutes more

Each way makes the M picks of both directions, gradients included, in turn, for some rounds; read the ratios of one round.
`even` keys lie all over the sphere; `clustered` ones in 100 clusters, as those of an encoder that has learned something.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from contest import ratio
from torch import Tensor

from cmacc.train.config import RECIPES
from cmacc.train.contrast.objective import Memory, ObjectiveConfig, Queries, choose
from cmacc.train.contrast.rings import Entries
from cmacc.train.contrast.selection import Asking, Seeding
from cmacc.train.loading.views import ViewConfig
from cmacc.train.networks.encoders import EncoderConfig, build_encoders

THREADS = 2
TAU = 0.1


@dataclass(frozen=True)
class Task:
    """M queries and N candidates a direction. pools, queries: (n, d) unit vectors."""

    queries: tuple[Tensor, Tensor]
    pools: tuple[Tensor, Tensor]

    @classmethod
    def make(cls, batch: int, size: int, width: int, clustered: bool) -> Task:
        draws = torch.Generator().manual_seed(0)

        def unit(count: int) -> Tensor:
            return torch.nn.functional.normalize(torch.randn(count, width, generator=draws), dim=1)

        centres = unit(100)

        def keys(count: int) -> Tensor:
            around = centres[torch.randint(0, 100, (count,), generator=draws)] if clustered else 0
            return torch.nn.functional.normalize(around + 0.7 * unit(count), dim=1)

        return cls((keys(batch), keys(batch)), (keys(size), keys(size)))


def ours(task: Task) -> None:
    asking, allowed = [Asking(q) for q in task.queries], torch.ones(2, len(task.pools[0]), dtype=torch.bool)
    Seeding(pseudo_tau=TAU).select(asking, task.pools, allowed, len(task.queries[0]), torch.Generator().manual_seed(1))


def gradients(keys: Tensor, queries: Tensor) -> Tensor:
    """The left factor: what the softmax is off its own best guess."""
    p = torch.softmax(keys @ queries.T / TAU, 1)
    return p - torch.nn.functional.one_hot(p.argmax(1), p.shape[1])


def plain(task: Task) -> None:
    """k-means++ over products of two factors (arXiv 1906.03671), as one writes it down: one look at the pool a pick."""
    for keys, queries in zip(task.pools, task.queries, strict=True):
        left = gradients(keys, queries)
        square = left.square().sum(1) * keys.square().sum(1)
        draws = torch.Generator().manual_seed(1)
        picks = [int(square.argmax())]
        nearest = torch.full_like(square, torch.inf)
        for _ in range(1, len(queries)):
            last = picks[-1]
            distance = square + square[last] - 2 * (left @ left[last]) * (keys @ keys[last])
            nearest = torch.minimum(nearest, distance.clamp_min(0))
            nearest[picks] = 0
            picks.append(int(torch.multinomial(nearest, 1, generator=draws)))


def materialised(task: Task) -> None:
    """The same with the outer products written out."""
    for keys, queries in zip(task.pools, task.queries, strict=True):
        whole = (gradients(keys, queries)[:, :, None] * keys[:, None, :]).flatten(1)
        square = whole.square().sum(1)
        draws = torch.Generator().manual_seed(1)
        picks = [int(square.argmax())]
        nearest = torch.full_like(square, torch.inf)
        for _ in range(1, len(queries)):
            distance = square + square[picks[-1]] - 2 * (whole @ whole[picks[-1]])
            nearest = torch.minimum(nearest, distance.clamp_min(0))
            nearest[picks] = 0
            picks.append(int(torch.multinomial(nearest, 1, generator=draws)))


def seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    began = clock()
    work()
    return clock() - began


def compare(batches: list[int], width: int, rounds: int, memory_gb: float, clock: Callable[[], float]) -> None:
    print(f"{'':4}{'M':>4}{'N':>8}  {'keys':<11}{'ms':>7}   {'plain loop / ours':<26}materialised / ours")
    for batch in batches:
        size = 300 * batch
        fits = 4 * size * batch * width <= memory_gb * 1e9
        for clustered in (False, True):
            task = Task.make(batch, size, width, clustered)
            ways = [ours, plain, *([materialised] if fits else [])]
            for way in ways:
                way(task)
            turns = {way: [0.0] * rounds for way in ways}
            for number in range(rounds):
                for way in ways:
                    turns[way][number] = seconds(partial(way, task), clock)
            ratios = [str(ratio(turns[way], turns[ours])) for way in ways[1:]]
            ms = 1000 * statistics.median(turns[ours])
            last = ratios[1] if fits else f"({4 * size * batch * width / 1e9:.1f} GB)"
            print(f"{'':4}{batch:4}{size:8,}  {'clustered' if clustered else 'even':<11}{ms:7.1f}   {ratios[0]:<26}{last}")


def entries(keys: Tensor, first: int) -> Entries:
    ids = torch.arange(first, first + len(keys))
    return Entries(keys, ids, ids // 4, torch.full_like(ids, -1), torch.zeros_like(ids))


def chooser(task: Task) -> tuple[Callable[[], object], Memory]:
    """The whole of `choose`, masks and dictionaries included, with K = 30 M, and the memory that it works on."""
    batch, width = task.queries[0].shape
    size = len(task.pools[0])
    config = ObjectiveConfig(dictionary=30 * batch, candidates=size, pseudo_tau=TAU)
    memory = Memory(config, width)
    for number, name in enumerate(("video", "audio")):
        getattr(memory, f"pool_{name}").enqueue(entries(task.pools[number], 0))
        getattr(memory, f"dictionary_{name}").enqueue(entries(task.pools[number][: 30 * batch], 0))
    keys = entries(task.queries[0], size + 4)
    return lambda: choose(Queries(*task.queries), keys, keys, memory, config, 1, torch.Generator().manual_seed(1)), memory


def encoders_step(encoders: EncoderConfig, view: ViewConfig, batch: int) -> Callable[[], None]:
    """Queries forward and backward, keys forward."""
    networks = [build_encoders(encoders), build_encoders(encoders)]
    pictures = torch.randn(batch, 3, view.frames, view.size, view.size).contiguous(memory_format=torch.channels_last_3d)
    sounds = torch.randn(batch, 1, view.n_mels, view.mel_steps)

    def step() -> None:
        (video, audio), (key_video, key_audio) = networks
        with torch.no_grad():
            key_video(pictures)
            key_audio(sounds)
        (video(pictures).sum() + audio(sounds).sum()).backward()

    return step


def share(
    name: str,
    encoders: EncoderConfig,
    view: ViewConfig,
    batch: int,
    rounds: int,
    asked: str,
    clock: Callable[[], float],
    clips: int = 0,
) -> None:
    """clips: so many are encoded, and the time taken for M of them, where M would take too long."""
    for clustered in (False, True):
        choosing, _ = chooser(Task.make(batch, 300 * batch, encoders.width, clustered))
        step = encoders_step(encoders, view, clips or batch)
        choosing()
        if not clips:
            step()
        turns = [(seconds(choosing, clock), seconds(step, clock) * batch / (clips or batch)) for _ in range(rounds)]
        found = ratio(*(list(column) for column in zip(*turns, strict=True)))
        ms, whole = (1000 * statistics.median(column) for column in zip(*turns, strict=True))
        kind = "clustered" if clustered else "even"
        print(f"    {name}, {kind}: choosing {ms:.1f} ms, encoders {whole:,.0f} ms, share {found}   asked: {asked}")


def peak(batch: int, size: int, width: int, pipe: Connection) -> None:
    torch.set_num_threads(THREADS)
    small, _ = chooser(Task.make(8, 2400, width, clustered=False))
    choosing, held = chooser(Task.make(batch, size, width, clustered=False))
    small()  # what any first product takes

    def resident(field: str) -> int:
        return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is that of now
    before = resident("VmRSS")
    choosing()
    rings = sum(tensor.numel() * tensor.element_size() for tensor in held.state_dict().values())
    pipe.send((rings, resident("VmHWM") - before))


def memory(batch: int, width: int) -> None:
    """In a process of its own, which has freed little that could be used again."""
    size = 300 * batch
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=peak, args=(batch, size, width, there))
    process.start()
    held, more = here.recv()
    process.join()
    print(
        f"    M = {batch}, N = {size:,}, d = {width}: rings {held / 1e6:.0f} MB, choosing takes {more / 1e6:.0f} MB more at its"
        f" peak; the residuals of one direction are {4 * size * batch / 1e6:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128, 256], metavar="M")
    parser.add_argument("--width", type=int, default=128, metavar="d")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-gb", type=float, default=1.0, help="the most that materialised gradients may take")
    parser.add_argument("--large", action="store_true", help="M = 128, N = 38,400, d = 512 beside R3D-18, too")
    parser.add_argument("--busy", action="store_true", help="one thread, by processor time: for a machine that others use, too")
    given = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    threads, clock = (1, time.process_time) if given.busy else (THREADS, time.perf_counter)
    torch.set_num_threads(threads)
    small = next(config for name, config in RECIPES.items() if name.startswith("small"))
    small = small() if callable(small) else small
    print(f"M picks of N candidates, both directions, d = {given.width}, threads: {threads}, medians of {given.rounds} rounds")
    compare(given.batches, given.width, given.rounds, given.memory_gb, clock)
    print("share of the encoders' time (queries forward and backward, keys forward)")
    share("small recipe, M = 32, N = 9,600, K = 960, d = 128", small.encoders, small.view, 32, given.rounds, "0.25", clock)
    if given.large:
        compare([128], 512, 1, 0, clock)
        r3d = EncoderConfig()
        share("R3D-18, M = 128, N = 38,400, K = 3,840, d = 512", r3d, ViewConfig(), 128, 1, "0.05 on a GPU", clock, clips=4)
    print("memory")
    memory(32, 128)
    memory(128, 512)


if __name__ == "__main__":
    main()
