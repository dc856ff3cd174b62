"""The training step, part by part, as ratios taken in one run: momentum update, active selection, memory of the rings.

    python infra/bench/trainer.py           # on a CPU: two minutes
    python infra/bench/trainer.py --full    # with more of R3D-18: ten minutes, 8 GB

The small recipe, then R3D-18 and ResNet-18 at M=128, N=38,400, K=3,840, of whose batch a few clips alone are encoded and their
time taken so many times. Active and random-queue steps take turns; printed are medians, and of ratios their range. Batches and
stored keys are random.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from contest import ratio
from torch import Tensor

from cmacc.train.config import PretrainConfig, recipe
from cmacc.train.contrast.objective import Memory, ObjectiveConfig, Queries, after_step, choose, contrast
from cmacc.train.contrast.rings import Entries
from cmacc.train.loading.reader import Batch
from cmacc.train.model import CrossModal
from cmacc.train.networks.compute import ComputeConfig, autocast, prepare
from cmacc.train.networks.momentum import momentum_update

ENCODERS = ("queries", "keys", "backward")
ROUNDS = 7


class Parts:
    """Seconds of each part of a step, by name. On CUDA by events, so that nothing waits inside the step."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = []

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = self._now()
        yield
        self._spans.append((name, began, self._now()))

    def seconds(self) -> dict[str, float]:
        if self._cuda:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for name, began, ended in self._spans:
            took = ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1000  # type: ignore[arg-type,operator]
            found[name] = found.get(name, 0.0) + took  # type: ignore[operator]
        return found


class Step:
    """A trainer's step on a random batch, with full pools and dictionaries. What the trainer calls, it calls: mend it here."""

    def __init__(self, config: PretrainConfig, compute: ComputeConfig, device: torch.device, clips: int | None = None) -> None:
        """clips: how many of the batch are encoded, where a machine has no room for all; their keys and queries are repeated."""
        torch.manual_seed(0)
        self.config, self.compute, self.device = config, compute, device
        self.model = CrossModal(config.encoders, config.objective).to(device).train()
        for encoder in (self.model.video, self.model.audio, self.model.key_video, self.model.key_audio):
            prepare(encoder, compute, device)
        self.optimiser = config.optimiser.build(self.model.learned().values())
        fill(self.model.memory, config, device)
        self.batch = random_batch(config, clips or config.loader.batch).to(device)
        self.steps = 0

    def __call__(self) -> dict[str, float]:
        """One step; seconds of its parts."""
        model, config, batch, parts = self.model, self.config, self.batch, Parts(self.device)
        self.steps += 1
        size = config.loader.batch
        generator = torch.Generator(self.device).manual_seed(self.steps)
        with autocast(self.compute, self.device):
            with parts.part("queries"):
                queries = model.video(batch.video), model.audio(batch.audio)
            with parts.part("keys"), torch.no_grad():
                keys = model.key_video(batch.video), model.key_audio(batch.audio)
        repeats = -(-size // len(batch.ids))
        asked = Queries(*(q.repeat(repeats, 1)[:size].detach().requires_grad_() for q in queries))
        ids = torch.arange(size, device=self.device)
        k_video, k_audio = (Entries(k.repeat(repeats, 1)[:size], ids, ids, -torch.ones_like(ids), ids) for k in keys)
        with parts.part("selection"):
            choice = choose(asked, k_video, k_audio, model.memory, config.objective, self.steps, generator)
        with parts.part("loss"):
            result = contrast(asked, k_video, k_audio, model.memory, config.objective, choice)
            gradients = torch.autograd.grad(result.loss, [asked.video, asked.audio])
        with parts.part("backward"):
            self.optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(queries, [gradient[: len(batch.ids)] for gradient in gradients])
        with parts.part("optimiser"):
            self.optimiser.step()
        with parts.part("momentum"):
            momentum_update(model.key_video, model.video, config.objective.momentum)
            momentum_update(model.key_audio, model.audio, config.objective.momentum)
        with parts.part("rings"):
            after_step(model.memory, choice, k_video, k_audio)
        return parts.seconds()


def unit(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def random_batch(config: PretrainConfig, clips: int) -> Batch:
    view, ids = config.view, torch.arange(clips)
    pictures = torch.randn(clips, 3, view.frames, view.size, view.size)
    return Batch(pictures, torch.randn(clips, 1, view.n_mels, view.mel_steps), ids, ids, ids)


def fill(memory: Memory, config: PretrainConfig, device: torch.device) -> None:
    """Random keys of other clips, a source each, into every slot of dictionaries and pools."""
    for ring in memory.children():
        # By far more than one batch's worth, and clips that no batch has.
        ids = torch.arange(ring.size, device=device) + 10_000_000  # type: ignore[operator]
        for at in range(0, len(ids), 4096):
            some = ids[at : at + 4096]
            ring.enqueue(Entries(unit(len(some), config.encoders.width).to(device), some, some, some % 10, some * 0))  # type: ignore[operator]


def two_steps(
    config: PretrainConfig, compute: ComputeConfig, device: torch.device, clips: int | None = None
) -> tuple[Step, Step]:
    """The active one, and the random queue's."""
    active = replace(config.objective, selector="kmeans++", share=1.0, share_start=0, share_ramp=0)
    objectives: tuple[ObjectiveConfig, ...] = (active, replace(active, selector="fifo"))
    first, second = (Step(replace(config, objective=objective), compute, device, clips) for objective in objectives)
    return first, second


def in_turn(steps: tuple[Step, Step], rounds: int) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    for step in steps:
        step()
    taken = [(steps[0](), steps[1]()) for _ in range(rounds)]
    return [a for a, _ in taken], [b for _, b in taken]


def whole(parts: dict[str, float], encoded: float = 1.0) -> float:
    """Seconds of a step of which only the share `encoded` of its clips went through the encoders."""
    return sum(seconds / encoded if name in ENCODERS else seconds for name, seconds in parts.items())


def report(title: str, active: list[dict[str, float]], random: list[dict[str, float]], encoded: float = 1.0) -> dict[str, float]:
    """Print what two columns of steps say, and return it as figures."""
    print(title)
    middle = {name: statistics.median(step[name] for step in active) for name in active[0]}
    total = whole(middle, encoded)
    for name, seconds in middle.items():
        seconds = seconds / encoded if name in ENCODERS else seconds
        print(f"    {name:<20} {1000 * seconds:10.2f} ms   {seconds / total:7.2%}")
    steps = ratio([whole(s, encoded) for s in active], [whole(s, encoded) for s in random])
    encoders = [sum(s[name] for name in ENCODERS) / encoded for s in active]
    selection = ratio([a["selection"] for a in active], encoders)
    momentum = ratio([s["momentum"] for s in active], [whole(s, encoded) for s in active])
    print(f"    active step / random-queue step      {steps}")
    print(f"    selection / encoders                 {selection}")
    print(f"    momentum update / step               {momentum.median:.4f} ({momentum.least:.4f} to {momentum.most:.4f})\n")
    figures = {"step_s": total, "active_over_random": steps.median, "selection_over_encoders": selection.median}
    return figures | {"momentum_share": momentum.median} | {f"part_s/{name}": seconds for name, seconds in middle.items()}


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def bench_rings(config: PretrainConfig, batch: int) -> None:
    """Megabytes of pools and dictionaries beside what their sizes say, and the most that choosing and storing adds to them."""
    objective, width = config.objective, config.encoders.width
    config = replace(config, loader=replace(config.loader, batch=batch))
    expected = 2 * (objective.dictionary + objective.candidates) * (4 * width + 4 * 8) / 1e6
    before = resident()
    memory = Memory(objective, width)
    fill(memory, config, torch.device("cpu"))
    held = sum(t.nbytes for t in memory.state_dict().values()) / 1e6
    grown = resident() - before
    ids = torch.arange(batch)
    asked = Queries(unit(batch, width).requires_grad_(), unit(batch, width).requires_grad_())
    k_video, k_audio = (Entries(unit(batch, width), ids, ids, ids, ids) for _ in range(2))
    choice = choose(asked, k_video, k_audio, memory, objective, 0, torch.Generator())
    contrast(asked, k_video, k_audio, memory, objective, choice).loss.backward()
    after_step(memory, choice, k_video, k_audio)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000 - before
    print(f"pools and dictionaries: N={objective.candidates}, K={objective.dictionary}, d={width}, M={batch}")
    print(f"    of their sizes {expected:.1f} MB, held {held:.1f} MB: ratio {held / expected:.3f}")
    print(f"    resident after filling {grown:.1f} MB, at most in a step, gradient embeddings and all, {most:.1f} MB\n")


def scaled(config: PretrainConfig) -> PretrainConfig:
    """With the pool and the dictionary of the paper, in batches: N = 300 M, K = 30 M."""
    batch = config.loader.batch
    return replace(config, objective=replace(config.objective, candidates=300 * batch, dictionary=30 * batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="encode four clips instead of one, three times")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    torch.set_num_threads(2)
    cpu, plain = torch.device("cpu"), ComputeConfig(precision="float32", compile="off")
    small, paper = recipe("small-cpu"), recipe("paper")

    bench_rings(paper, paper.loader.batch)
    sizes = f"M={small.loader.batch}, N={300 * small.loader.batch}, K={30 * small.loader.batch}"
    report(f"a step of the small recipe, {sizes}", *in_turn(two_steps(scaled(small), plain, cpu), ROUNDS))
    clips, rounds = (4, 3) if arguments.full else (1, 1)
    encoded = clips / paper.loader.batch
    title = f"a step of R3D-18 and ResNet-18, M=128, N=38,400, K=3,840 (encoders timed on {clips} clips of the batch)"
    report(title, *in_turn(two_steps(paper, plain, cpu, clips), rounds), encoded)


if __name__ == "__main__":
    main()
