"""A small cloud on one machine, and what becomes of the work when parts of it are killed: the same as without.

    python infra/rehearsal/rehearsal.py --seed 0        # `make rehearsal`
    python infra/rehearsal/rehearsal.py --loopback      # without network namespaces, though they be permitted

Two workers ingest a sample world (flow runs of a Prefect server on PostgreSQL, the ledger in PostgreSQL too). It is copied to a
bucket, re-sharded there, and torchrun on two hosts pretrains from there: first undisturbed, then while a worker, a node, the S3
endpoint and the Prefect server are killed at seeded moments. Then what both have made is compared, byte by byte. Exit status 1
when anything differs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evidence import differences, unfinished
from hosts import Host, make_hosts
from processes import Processes, ended_by_signals, processor_s
from schedule import change_of_ranks, schedule

HOSTS = ("desk", "postgres", "s3", "prefect", "site", "worker-1", "worker-2", "node-1", "node-2")
WORLD = {"clips": 96, "eval_clips": 24, "clip_s": 2.0, "clips_per_file": 4}
WORKERS, NODES = ("worker-1", "worker-2"), {"node-1": 1, "node-2": 1}
_SETTLE_S = 90.0


def tell(text: str) -> None:
    print(text, flush=True)


def rehearse(seed: int, folder: Path, hosts: dict[str, Host]) -> list[str]:
    """All of it, told as it goes; what differs in the end, a sentence each."""
    import table  # these load what is large, and what may start threads
    from services import Services
    from story import BUCKET, STEPS, Play

    from cmacc.ingest.world import WorldConfig, render_world

    world = render_world(folder / "world", WorldConfig(**WORLD, seed=seed), workers=2)  # type: ignore[arg-type]
    whole = {"ingest": world.clips, "pretrain": STEPS}
    tell(f"{world.clips} clips in {world.files} files of a sample world")
    with Processes(folder / "logs") as processes:
        services = Services(hosts, processes, folder)
        os.environ["PGPASSWORD"] = services.environment["PGPASSWORD"]  # for the ledger that is read here
        services.start(["undisturbed", "disturbed"], [BUCKET])
        template = services.start_site(world.root)
        for worker in WORKERS:
            services.start_worker(worker)
        tell("PostgreSQL, S3, the Prefect server, two workers and the site are up")
        lists = [f"train={world.train_manifest}", f"eval={world.eval_manifest}"]
        calm, rough = (Play(services, name, lists, template) for name in ("undisturbed", "disturbed"))
        for play, kills in ((calm, []), (rough, schedule(seed, world.clips, STEPS))):
            play.ingest([kill for kill in kills if kill.phase == "ingest"])
            play.reshard()
            play.pretrain("pretrain", NODES, [kill for kill in kills if kill.phase == "pretrain"])
            tell(f"{play.name}: through")
        changed = change_of_ranks(seed, STEPS)
        calm.pretrain("elastic", NODES, until=changed)
        calm.pretrain("elastic", {"node-1": 3})
        tell(f"2 ranks killed after step {changed}, 3 went on: through")
        found = compare(calm, rough) + [f"flow run {name} was left" for name in _settled(services.prefect_url)]
        tell("\n" + table.kills(rough.struck, {name: host.address for name, host in hosts.items()}, whole, found))
        tell("\n" + table.costs({play.name: play.costs for play in (calm, rough)}))
        counts = calm.evidence("pretrain")
        same = (
            f"the same in both: {world.clips} clips ({len(counts.clips)} members), {len(counts.shards)} shards, the numbers of "
        )
        same += f"{STEPS} steps, all weights; with another number of ranks the same batches; no flow run is left unfinished"
        tell("\n" + ("\n".join(["different:", *found]) if found else same))
    return found


def compare(calm: Any, rough: Any) -> list[str]:
    """What two plays differ in, and what a change of ranks has done to the global batches."""
    a, b = calm.evidence("pretrain"), rough.evidence("pretrain")
    found = []
    for what in ("clips", "shards", "curve", "weights"):
        found += differences(getattr(a, what), getattr(b, what), what)
    return found + differences(calm.batches("pretrain"), calm.batches("elastic"), "after a change of ranks")


def _settled(url: str) -> list[str]:
    """Flow runs that come to no end, though they be waited for."""
    deadline = time.monotonic() + _SETTLE_S
    while (left := unfinished(url)) and time.monotonic() < deadline:
        time.sleep(2)
    return left


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of what is killed when, and of the world")
    parser.add_argument("--out", type=Path, default=Path("runs/rehearsal"), help="for data and logs; made anew")
    parser.add_argument("--loopback", action="store_true", help="ports of 127.0.0.1 in place of network namespaces")
    given = parser.parse_args(arguments)
    began, folder = time.monotonic(), given.out.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with ended_by_signals():
        hosts, said = make_hosts(HOSTS, given.loopback)  # before any thread is there
        tell(f"seed {given.seed}; {said}")
        try:
            found = rehearse(given.seed, folder, hosts)
        except RuntimeError as error:
            tell(f"the rehearsal did not come through: {error}\nlogs are in {folder / 'logs'}")
            return 1
    tell(f"{time.monotonic() - began:.0f} s, {processor_s():.0f} s of processor time")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
