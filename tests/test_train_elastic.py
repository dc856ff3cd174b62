"""The loader in several processes: as many as one likes, changed at any time, killed at any moment; the same global batches."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from killing import killing
from train_data import LOADER, VIEW, clips, damaged, with_members, write_dataset

from cmacc.shards.dataset import Dataset
from cmacc.train.loading.loader import TrainingLoader
from cmacc.train.loading.reader import Batch
from cmacc.train.loading.sampler import Source

STEPS, BATCH = 12, 6
CONFIG = replace(LOADER, batch=BATCH, threads=1, streams=3)

# One process that has imported all it needs; for each line it forks `world` ranks, which agree over gloo.
RANKS = """
import json, os, sys
sys.path[:0] = {path!r}
import torch, torch.distributed as dist
from test_train_elastic import CONFIG, VIEW, Dataset, Source, TrainingLoader, clips_of

def work(rank, world, port, data, state, steps, out):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{{port}}", rank=rank, world_size=world)
    loader = TrainingLoader([Source(Dataset.open(data))], VIEW, CONFIG, seed=5, rank=rank, world=world)
    if state:
        loader.load_state_dict(state)
    batches, seen = iter(loader), []
    for _ in range(steps):
        batch = next(batches)
        every = [None] * world
        dist.all_gather_object(every, clips_of(batch))
        seen.append([every[n % world][n // world] for n in range(CONFIG.batch)])
    if rank == 0:
        with open(out, "w") as file:
            json.dump({{"seen": seen, "state": loader.state_dict()}}, file)
    loader.close()
    dist.barrier()
    dist.destroy_process_group()

for line in sys.stdin:
    world, *rest = json.loads(line)
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            work(rank, world, *rest)
            os._exit(0)
        children.append(child)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


def clips_of(batch: Batch) -> list[list[float]]:
    """Of each clip: id, sum of its pictures, sum of its log-mel."""
    sums = batch.video.sum((1, 2, 3, 4)).tolist(), batch.audio.sum((1, 2, 3)).tolist()
    return [list(clip) for clip in zip(batch.ids.tolist(), *sums, strict=True)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three shards of unequal size, and clips among them whose picture or sound does not decode."""
    bad = {4: {"mp4": b"no video"}, 5: {"flac": damaged(clips()[5].members["flac"])}, 13: {"mp4": b"x" * 99}}
    some = [with_members(clip, **bad.get(i, {})) for i, clip in enumerate(clips())]
    return write_dataset(tmp_path_factory.mktemp("elastic") / "data", some, per_shard=9).url


@pytest.fixture(scope="module")
def unbroken(data: str) -> list[list[list[float]]]:
    """The batches of one process."""
    loader = TrainingLoader([Source(Dataset.open(data))], VIEW, CONFIG, seed=5)
    seen = [clips_of(batch) for batch in islice(loader, STEPS)]
    loader.close()
    return seen


Ranks = Callable[[int, dict | None, int], tuple[list, dict]]


@pytest.fixture
def ranks(data: str, tmp_path: Path) -> Iterator[Ranks]:
    """`ranks(world, state, steps)`: the global batches of so many steps, and the state after them."""
    code = RANKS.format(path=[str(Path(__file__).parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert child.stdin and child.stdout
    stdin, stdout = child.stdin, child.stdout

    def run(world: int, state: dict | None, steps: int) -> tuple[list, dict]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        stdin.write(json.dumps([world, port, data, state, steps, str(tmp_path / "seen.json")]) + "\n")
        stdin.flush()
        assert json.loads(stdout.readline()) == [0] * world
        found = json.loads((tmp_path / "seen.json").read_text())
        return found["seen"], found["state"]

    yield run
    stdin.close()
    assert child.wait(30) == 0
    stdout.close()


@pytest.mark.filterwarnings("ignore")
def test_ranks_may_change_at_any_time(ranks: Ranks, unbroken: list[list[list[float]]]) -> None:
    """1, 2, 3, 4 and 1 again: the batches of an unbroken run of one, clip by clip and to the last bit of their sums."""
    state: dict | None = None
    seen = []
    for world, steps in ((1, 2), (2, 3), (3, 2), (4, 4), (1, 1)):
        batches, state = ranks(world, state, steps)
        seen += batches
        assert state["position"] == len(seen) * BATCH
    assert seen == unbroken


WORK = """
import json, os, time
from test_train_elastic import CONFIG, VIEW, Dataset, Source, TrainingLoader

def work(folder):
    loader = TrainingLoader([Source(Dataset.open(folder + "/data"))], VIEW, CONFIG, seed=5)
    state = folder + "/state.json"
    if os.path.exists(state):
        with open(state) as file:
            loader.load_state_dict(json.load(file))
    for batch in loader:
        time.sleep(0.15)
        with open(state + ".part", "w") as file:
            json.dump(loader.state_dict(), file)
        with open(folder + "/seen.jsonl", "a") as file:
            file.write(json.dumps([loader.position, batch.ids.tolist()]) + chr(10))
        os.replace(state + ".part", state)
        if loader.position >= 6 * 12:
            return
"""


@pytest.mark.filterwarnings("ignore")
def test_killed_at_any_moment(data: str, tmp_path: Path, unbroken: list[list[list[float]]]) -> None:
    (tmp_path / "data").symlink_to(data)
    draws = np.random.default_rng(0)
    with killing(WORK) as kill:
        deaths = 0
        # a life is shorter than the work, at first: there are two deaths at least
        while kill(tmp_path, float(draws.uniform(0.3, 1.0)) + 0.05 * deaths):
            deaths += 1
            assert deaths < 60
    assert deaths >= 2
    seen = dict(json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines())
    assert [seen[BATCH * (step + 1)] for step in range(STEPS)] == [[clip[0] for clip in batch] for batch in unbroken]
