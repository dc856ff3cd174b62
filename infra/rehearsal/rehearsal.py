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

from hosts import Host, make_hosts
from processes import Processes, ended_by_signals, processor_s

HOSTS = ("desk", "postgres", "s3", "prefect", "site", "worker-1", "worker-2", "node-1", "node-2")
CLIPS, EVAL_CLIPS, CLIP_S, CLIPS_PER_FILE = 96, 24, 2.0, 4
_SETTLE_S = 90.0


def tell(text: str) -> None:
    print(text, flush=True)


def rehearse(seed: int, folder: Path, hosts: dict[str, Host]) -> list[str]:
    """All of it; what differs in the end, a sentence each."""
    import table
    from evidence import differences, unfinished
    from schedule import change_of_ranks, schedule
    from services import Services
    from story import BUCKET, STEPS, Play

    from cmacc.ingest.world import WorldConfig, render_world

    config = WorldConfig(clips=CLIPS, eval_clips=EVAL_CLIPS, clip_s=CLIP_S, clips_per_file=CLIPS_PER_FILE, seed=seed)
    world = render_world(folder / "world", config, workers=2)
    tell(f"{world.clips} clips in {world.files} files of a sample world")
    with Processes(folder / "logs") as processes:
        services = Services(hosts, processes, folder)
        os.environ["PGPASSWORD"] = services.environment["PGPASSWORD"]  # for what is read here
        services.start(["undisturbed", "disturbed"], [BUCKET])
        url_template = services.start_site(world.root)
        for worker in ("worker-1", "worker-2"):
            services.start_worker(worker)
        tell("PostgreSQL, S3, the Prefect server, two workers and the site are up")
        lists = [f"train={world.train_manifest}", f"eval={world.eval_manifest}"]
        calm, rough = (Play(services, name, lists, url_template) for name in ("undisturbed", "disturbed"))
        kills = schedule(seed, CLIPS + EVAL_CLIPS, STEPS)
        two = {"node-1": 1, "node-2": 1}
        for play, befalls in ((calm, []), (rough, kills)):
            play.ingest([kill for kill in befalls if kill.phase == "ingest"])
            play.reshard()
            play.pretrain("pretrain", two, [kill for kill in befalls if kill.phase == "pretrain"])
            tell(f"{play.name}: " + ", ".join(f"{what} {seconds:.0f} s" for what, seconds in play.seconds.items()))

        changed = change_of_ranks(seed, STEPS)
        calm.pretrain("elastic", two, until=changed)
        calm.pretrain("elastic", {"node-1": 3})

        a, b = calm.evidence("pretrain"), rough.evidence("pretrain")
        found = [
            sentence
            for what in ("clips", "shards", "curve", "weights")
            for sentence in differences(getattr(a, what), getattr(b, what), what)
        ]
        wanted, elastic = calm.batches("pretrain"), calm.batches("elastic")
        found += differences(wanted, elastic, "batches after a change of ranks")
        left = _settled(services.prefect_url, unfinished)
        found += [f"flow run {name} was left" for name in left]
        addresses = {name: host.address for name, host in hosts.items()}
        tell("")
        tell(table.kills(rough.struck, addresses, {"ingest": CLIPS + EVAL_CLIPS, "pretrain": STEPS}, found))
        tell("")
        tell(
            f"the same in both: {len(a.clips)} members of {CLIPS + EVAL_CLIPS} clips, {len(a.shards)} shards, "
            f"{len(a.curve)} records of {STEPS} steps, all weights; "
            f"2 ranks to step {changed}, then 3: the same {len(wanted)} global batches; no flow run is left unfinished"
            if not found
            else "\n".join(["different:", *found])
        )
    return found


def _settled(url: str, unfinished: object) -> list[str]:
    assert callable(unfinished)
    deadline = time.monotonic() + _SETTLE_S
    while (left := unfinished(url)) and time.monotonic() < deadline:
        time.sleep(2)
    return list(left)


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
        hosts, said = make_hosts(HOSTS, given.loopback)
        tell(f"seed {given.seed}; {said}")
        try:
            found = rehearse(given.seed, folder, hosts)
        except KeyboardInterrupt:
            tell("stopped")
            return 130
        except RuntimeError as error:
            tell(f"the rehearsal did not come through: {error}\nlogs are in {folder / 'logs'}")
            return 1
    tell(f"{time.monotonic() - began:.0f} s, {processor_s():.0f} s of processor time")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
