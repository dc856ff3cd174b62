"""The `paper` recipe's training step on a GPU: bf16, compiled and channels last, beside plain float32; active beside random.

    python infra/bench/trainer_gpu.py           # with an NVIDIA GPU: under ten minutes; writes into infra/bench/results/
    python infra/bench/trainer_gpu.py --toy     # the same on a CPU with small encoders, to try this script

Batches are random and on the device already: this is the step, not the loader.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from trainer import Step, in_turn, report, scaled, two_steps

from cmacc.train.config import PretrainConfig, recipe
from cmacc.train.networks.compute import ComputeConfig
from cmacc.train.networks.flops import encoder_flops, peak_flops

FAST = ComputeConfig(precision="bf16", compile="on")
PLAIN = ComputeConfig(precision="float32", compile="off")
RESULTS = Path(__file__).parent / "results"


def machine(device: torch.device) -> dict[str, str]:
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "python": platform.python_version()}
    if device.type == "cpu":
        return {"device": platform.machine(), **versions}
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    cuda = {"driver": driver, "cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return {"device": torch.cuda.get_device_name(), **cuda, **versions}


def contiguous(step: Step) -> None:
    """Undo channels last, as a plain loop has it."""
    for module in step.model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.weight.data = module.weight.data.contiguous()
    step.batch = replace(step.batch, video=step.batch.video.contiguous())


def speed(config: PretrainConfig, compute: ComputeConfig, device: torch.device, steps: int) -> dict[str, float]:
    """Clips a second of whole steps, one after the other without a wait, their peak memory and FLOP utilisation."""
    torch.compiler.reset()
    gc.collect()
    step = Step(config, compute, device)
    if compute == PLAIN:
        contiguous(step)
    began = time.perf_counter()
    for _ in range(3):
        step()
    wait(device)
    warmed_s = time.perf_counter() - began
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rounds = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(steps):
            step()
        wait(device)
        rounds.append((time.perf_counter() - began) / steps)
    seconds, clips = statistics.median(rounds), config.loader.batch
    figures = {"clips_per_s": clips / seconds, "step_s": seconds, "warm_up_s": warmed_s}
    if device.type == "cuda":
        figures["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    done = encoder_flops(config.encoders, config.view, clips) / seconds
    figures["model_tflops"] = done / 1e12
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    if peak := peak_flops(name, compute.precision):
        figures["mfu"] = done / peak
    return figures


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="small encoders on a CPU, nothing written")
    parser.add_argument("--batch", type=int, help="clips a step, instead of the recipe's; pool and dictionary follow it")
    parser.add_argument("--out", type=Path, help="folder for the JSON file, instead of infra/bench/results")
    arguments = parser.parse_args()
    if not arguments.toy and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device; use --toy to try the script on a CPU")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    device = torch.device("cpu" if arguments.toy else "cuda")
    config = recipe("small-cpu" if arguments.toy else "paper")
    batch = arguments.batch or (4 if arguments.toy else config.loader.batch)
    config = scaled(replace(config, loader=replace(config.loader, batch=batch)))
    steps, rounds = (1, 2) if arguments.toy else (10, 15)

    found: dict[str, Any] = {"machine": machine(device), "command": " ".join(sys.argv), "batch": batch}
    found["objective"] = asdict(config.objective)
    for name, compute in (("float32, eager", PLAIN), ("bf16, compiled, channels last", FAST)):
        found[name] = speed(config, compute, device, steps)
        print(f"{name}\n    " + "  ".join(f"{fact} {value:.4g}" for fact, value in found[name].items()))
    ratio = found["bf16, compiled, channels last"]["clips_per_s"] / found["float32, eager"]["clips_per_s"]
    found["speedup"] = ratio
    print(f"    ratio {ratio:.2f}\n")
    torch.compiler.reset()
    gc.collect()
    found["parts"] = report("parts of a step", *in_turn(two_steps(config, FAST, device), rounds))
    if not arguments.toy or arguments.out:
        folder = arguments.out or RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"trainer-{found['machine']['device'].replace(' ', '-')}.json"
        path.write_text(json.dumps(found, indent=2) + "\n")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
