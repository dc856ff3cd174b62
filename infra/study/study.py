"""Does active selection help? Every run of the study, its tables and its pictures.

    python infra/study/study.py --out runs/study            # what is missing, in sittings of any length
    python infra/study/study.py --tables                    # tables and pictures from the raw results, nothing is trained

A run is one process with one thread, so that two cores do two at once. Each finished run is one file in `infra/study/results`;
what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def result_path(stage: str, name: str) -> Path:
    return RESULTS / stage / f"{name}.json"


def one_run(run: Any, out: str) -> str:
    """Train, score, and write the result aside, then rename. Returns a line for the terminal."""
    import torch

    torch.set_num_threads(1)
    from clips import open_clips
    from run import train
    from sounds import score_sounds

    import cmacc

    clips = open_clips(Path(out) / "decoded" / run.data)
    result, model = train(clips, run.setting, run.seed)
    if run.data == "real":
        result["esc10"] = score_sounds(model)
    facts = {
        "data": run.data, "arm": run.arm, "seed": run.seed, "setting": asdict(run.setting), **result,
        "versions": {"cmacc": cmacc.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip
    path = result_path(run.stage, run.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.part")
    aside.write_text(json.dumps(facts, separators=(",", ":")) + "\n")
    aside.rename(path)
    last = result["scores"][-1]
    return (
        f"{run.name}: R@5 {last['R@5']:.3f}, class@1 {last.get('class@1', 0):.3f}, probe {result['probe']['both']:.3f}, "
        f"loss {result['end']['loss']:.2f} of {result['end']['chance']:.2f}, {result['seconds']['processor']:.0f} s"
    )


def do(runs: list[Any], out: Path, processes: int) -> None:
    """All of `runs` that have no result yet, in order, so many at once."""
    from data import clips_of

    left = [run for run in runs if not result_path(run.stage, run.name).exists()]
    print(f"{len(runs) - len(left)} of {len(runs)} runs are there, {len(left)} to go", flush=True)
    for name in dict.fromkeys(run.data for run in left):
        clips_of(name, out, lambda text: print(text, flush=True))
    done, began = 0, time.monotonic()
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting: set[Future[str]] = set()
        queue = list(left)
        while queue or waiting:
            while queue and len(waiting) < processes:
                waiting.add(pool.submit(one_run, queue.pop(0), str(out)))
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                done += 1
                hours = (time.monotonic() - began) / done * (len(left) - done) / 3600
                try:
                    print(f"[{done}/{len(left)}, {hours:.1f} h left] {future.result()}", flush=True)
                except Exception:
                    traceback.print_exc()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="for worlds, data sets and decoded clips")
    parser.add_argument("--stage", choices=("development", "report"), default="report")
    parser.add_argument("--only", default="", metavar="TEXT", help="runs whose name has this in it")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--list", action="store_true", help="print the runs' names")
    parser.add_argument("--tables", action="store_true", help="tables and pictures alone")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(Path(__file__).parent))
    from arms import runs

    chosen = [run for run in runs(given.stage) if given.only in run.name]
    if given.list:
        for run in chosen:
            print("done   " if result_path(run.stage, run.name).exists() else "missing", run.name)
        return
    if not given.tables:
        do(chosen, given.out, given.processes)
    from report import write_report

    write_report(RESULTS, Path(__file__).parent)


if __name__ == "__main__":
    main()
