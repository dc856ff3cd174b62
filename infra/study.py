"""The same small run with different negatives, several seeds each: does choosing them help?

    python infra/study.py runs/demo/data --out runs/study

Every run is one process with one thread, so that two cores do two at once. Finished runs are not done again. Prints a table
of means over the seeds with each seed's value behind it, and writes it with all numbers to `OUT/study.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

VARIANTS: dict[str, dict[str, str]] = {
    "active picks + batch keys (the demo)": {},
    "random queue (FIFO) + batch keys": {"objective.queue": "fifo"},
    "batch negatives alone": {"objective.negatives": "batch"},
    "dictionary alone, active": {"objective.negatives": "dictionary"},
    "dictionary alone, active, m = .999": {"objective.negatives": "dictionary", "objective.momentum": "0.999"},
}
NUMBERS = ("R@1", "R@5", "class@1", "same_class_R@1", "same_class_R@5")


def one_run(data: str, folder: Path, options: dict[str, str]) -> dict[str, float]:
    """Train in a process of its own; returns the last held-out numbers."""
    result = folder / "numbers.json"
    if not result.exists():
        changes = [part for name, value in options.items() for part in ("--set", f"{name}={value}")]
        command = [str(Path(sys.executable).with_name("cmacc")), "pretrain", data, "--out", str(folder), *changes]
        environment = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"} | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-1000:]}")
        from cmacc.train.pretrain import final_numbers

        result.write_text(json.dumps(final_numbers(folder)))
    numbers: dict[str, float] = json.loads(result.read_text())
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an option of every run")
    given = parser.parse_args()
    common = dict(pair.split("=", 1) for pair in given.set)

    jobs = [(name, seed) for seed in given.seeds for name in VARIANTS]
    with ThreadPoolExecutor(given.parallel) as pool:
        futures = {
            (name, seed): pool.submit(
                one_run,
                given.data,
                given.out / f"{list(VARIANTS).index(name)}-seed{seed}",
                {"seed": str(seed), "loader.threads": "1", **VARIANTS[name], **common},
            )
            for name, seed in jobs
        }
        found = {}
        for (name, seed), future in futures.items():
            found[name, seed] = future.result()
            print(f"{name}, seed {seed}: R@5 {found[name, seed]['held_out/R@5']:.3f}", file=sys.stderr, flush=True)

    print(f"| negatives | {' | '.join(NUMBERS)} |")
    print("|---" * (len(NUMBERS) + 1) + "|")
    for name in VARIANTS:
        cells = []
        for number in NUMBERS:
            values = [found[name, seed][f"held_out/{number}"] for seed in given.seeds]
            cells.append(f"{sum(values) / len(values):.3f} ({', '.join(f'{v:.3f}' for v in values)})")
        print(f"| {name} | {' | '.join(cells)} |")
    first = next(iter(found.values()))
    chances = [f"{first[f'held_out/chance_{number}']:.3f}" for number in NUMBERS]
    print(f"| chance | {' | '.join(chances)} |")
    rows = [{"variant": name, "seed": seed, **numbers} for (name, seed), numbers in found.items()]
    (given.out / "study.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
