"""A run's whole configuration: the dataclasses of its parts, recipes, and changes by dotted name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cmacc.shards import options
from cmacc.shards.options import flatten
from cmacc.train.contrast.objective import ObjectiveConfig
from cmacc.train.loading.loader import LoaderConfig
from cmacc.train.loading.views import ViewConfig
from cmacc.train.networks.compute import ComputeConfig
from cmacc.train.networks.encoders import EncoderConfig
from cmacc.train.optimiser import OptimiserConfig
from cmacc.train.running.alarm import AlarmConfig
from cmacc.train.running.checkpointer import CheckpointConfig
from cmacc.train.running.distributed import DistributedConfig
from cmacc.train.running.metrics import LogConfig


@dataclass(frozen=True)
class PretrainConfig:
    """steps: of the whole run. seed: of everything drawn. split, eval_split: names in the catalog ("" is a split too,
    of clips whose manifest named none). eval_clips: at most so many held-out clips are looked at. log_every: steps.
    eval_every: steps from one look at the held-out clips to the next; 0: not by steps. eval_minutes: the same by the clock; 0:
    not by it. The first and the last step are looked at in any case."""

    steps: int = 100_000
    seed: int = 0
    split: str = "train"
    eval_split: str = "eval"
    eval_clips: int = 1_000
    log_every: int = 10
    eval_every: int = 1_000
    eval_minutes: float = 0.0
    view: ViewConfig = field(default_factory=ViewConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    encoders: EncoderConfig = field(default_factory=EncoderConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    alarm: AlarmConfig = field(default_factory=AlarmConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "eval_clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        if self.eval_every < 0:
            raise ValueError(f"eval_every is {self.eval_every}; give a number of steps, or 0 for not by steps")
        if not 0 <= self.eval_minutes < math.inf:
            raise ValueError(f"eval_minutes is {self.eval_minutes}; give minutes above 0, or 0 for not by the clock")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed is {self.seed}; give 0 or more, below 2^63")
        self._refuse_impossible()

    def _refuse_impossible(self) -> None:
        """What each part takes, but not together."""
        objective, compute = self.objective, self.compute
        if objective.pool != "fifo" and not objective.uses_candidates:
            why = "objective.negatives=batch has no dictionary" if not objective.uses_keys else "nothing is picked from it"
            why = "objective.selector=fifo picks nothing" if objective.uses_keys and objective.selector == "fifo" else why
            raise ValueError(
                f"objective.pool is {objective.pool}, but {why}; leave the pool away, or use objective.selector=kmeans++"
            )
        if objective.keeps_pool and not objective.repeats and objective.candidates <= objective.dictionary:
            said = f"objective.repeats is false, and a pool of {objective.candidates} candidates fits into the dictionary"
            raise ValueError(f"{said}; give objective.candidates above {objective.dictionary}")
        if not objective.uses_keys and compute.batchnorm == "shuffled":
            said = "compute.batchnorm is shuffled, which is for key encoders, but objective.negatives=batch has none"
            raise ValueError(f"{said}; use compute.batchnorm=sync")
        if self.encoders.norm == "group" and compute.batchnorm != "rank":
            said = f"compute.batchnorm is {compute.batchnorm}, but encoders.norm=group has no BatchNorm"
            raise ValueError(f"{said}; leave compute.batchnorm away, or use encoders.norm=batch")
        if self.encoders.audio == "resnet18_1d" and self.encoders.bands != self.view.n_mels:
            said = f"encoders.bands is {self.encoders.bands}, but view.n_mels is {self.view.n_mels}"
            raise ValueError(f"{said}; give encoders.bands={self.view.n_mels}")
        if not objective.uses_keys and self.loader.batch < 2:
            raise ValueError(
                "loader.batch is 1, and objective.negatives=batch leaves it no negative; give loader.batch=2 or more"
            )


__all__ = [
    "RECIPES",
    "OptimiserConfig",
    "PretrainConfig",
    "change",
    "check_same_run",
    "flatten",
    "free_to_change",
    "from_json",
    "recipe",
    "to_json",
]

FREE_TO_CHANGE = frozenset(
    {
        "log_every",
        "eval_every",
        "eval_minutes",
        "loader.threads",
        "loader.ahead",
        "loader.patience_s",
        "compute.collect_every",
    }
)
FREE_GROUPS = ("alarm.", "checkpoint.", "distributed.", "log.")
"""What may differ between a run's start and its continuation: it does not change what is computed, unless an alarm goes off."""

OTHER_NAMES = {
    "train.batch": "loader.batch",
    "train.steps": "steps",
    "train.seed": "seed",
    "train.rate": "optimiser.rate",
    "train.lr": "optimiser.rate",
}
"""Taken for the name they stand for."""

USUAL_NAMES = {
    "batch_size": "loader.batch",
    "temperature": "objective.tau",
    "learning_rate": "optimiser.rate",
    "lr": "optimiser.rate",
    "queue": "objective.dictionary",
    "queue_size": "objective.dictionary",
    "pool_size": "objective.candidates",
    "workers": "loader.threads",
    "num_workers": "loader.threads",
    "epochs": "steps",
}
"""What others call an option: for the sentence that refuses the name."""


def paper() -> PretrainConfig:
    """The paper's settings (arXiv 2009.09805): M=128, K=30 M, N=300 M, tau=.7, m=.999, Adam 1e-3, 500 warm-up steps; R3D-18."""
    return PretrainConfig(encoders=EncoderConfig(video="r3d_18", audio="resnet18_1d"))


def paper_r2plus1d() -> PretrainConfig:
    """The same with R(2+1)D-18, the backbone the paper compares by."""
    return change(paper(), {"encoders.video": "r2plus1d_18"})


def small_cpu() -> PretrainConfig:
    """Two CPU cores and some minutes: small networks, small pictures, keys of the batch among the negatives."""
    return PretrainConfig(
        steps=400,
        eval_every=100,
        checkpoint=CheckpointConfig(steps=100),
        view=ViewConfig(frames=8, view_s=1.5, size=56, hop=320, n_fft=512, window=512, n_mels=48, jitter=0.4),
        loader=LoaderConfig(batch=32),
        encoders=EncoderConfig(video="small", audio="small", width=128, hidden=256),
        objective=ObjectiveConfig(
            negatives="batch+dictionary",
            dictionary=256,
            candidates=1_024,
            tau=0.1,
            momentum=0.99,
            share=1.0,
            share_start=50,
            share_ramp=100,
        ),
        optimiser=OptimiserConfig(rate=1e-3, warmup=50, cosine=True, weight_decay=1e-4),
        alarm=AlarmConfig(warmup=100),
    )


def demo() -> PretrainConfig:
    """What `make demo` runs on the sample world."""
    return small_cpu()


RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    "paper": paper,
    "paper-r2plus1d": paper_r2plus1d,
    "small-cpu": small_cpu,
    "demo": demo,
}


def recipe(name: str) -> PretrainConfig:
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is not known; use one of {', '.join(RECIPES)}")
    return RECIPES[name]()


def change(config: PretrainConfig, changes: Mapping[str, Any]) -> PretrainConfig:
    """`config` with values replaced by dotted name, e.g. `{"objective.tau": "0.1"}`; see `shards.options.change`."""
    return options.change(config, {OTHER_NAMES.get(name, name): value for name, value in changes.items()}, USUAL_NAMES)


def to_json(config: PretrainConfig) -> dict[str, Any]:
    return asdict(config)


def from_json(data: dict[str, Any]) -> PretrainConfig:
    """Raises ValueError with a sentence for an unknown field, a wrong type or a value its owner refuses."""
    return options.from_json(PretrainConfig, data, USUAL_NAMES)


def free_to_change(name: str) -> bool:
    return name in FREE_TO_CHANGE or name.startswith(FREE_GROUPS)


def check_same_run(saved: dict[str, Any], config: PretrainConfig, where: Path) -> None:
    """Raises ValueError when a continued run would compute something else than it began."""
    before, now = flatten(saved), flatten(json.loads(json.dumps(to_json(config))))
    changed = [n for n in sorted(before.keys() | now.keys()) if before.get(n) != now.get(n) and not free_to_change(n)]
    if changed:
        name = changed[0]
        raise ValueError(
            f"{where} was begun with {name}={before.get(name)!r}, not {now.get(name)!r}"
            f"{f' ({len(changed)} options differ)' if len(changed) > 1 else ''}; "
            "use another run folder, or the options it began with"
        )
