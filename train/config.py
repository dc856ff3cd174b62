"""A run's whole configuration: the dataclasses of its parts, recipes, and changes by dotted name."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cmacc.shards import options
from cmacc.shards.options import change, flatten
from cmacc.train.encoders import EncoderConfig
from cmacc.train.loader import LoaderConfig
from cmacc.train.objective import ObjectiveConfig
from cmacc.train.views import ViewConfig


@dataclass(frozen=True)
class OptimiserConfig:
    """Adam. rate: peak learning rate. warmup: steps of linear rise. cosine: fall to 0 at the last step, else constant.
    weight_decay: decoupled."""

    rate: float = 1e-3
    warmup: int = 500
    cosine: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise ValueError(f"optimiser.rate is {self.rate}; give a learning rate above 0")
        if self.warmup < 0:
            raise ValueError(f"optimiser.warmup is {self.warmup}; give 0 or more steps")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"optimiser.weight_decay is {self.weight_decay}; give 0 or more")


@dataclass(frozen=True)
class PretrainConfig:
    """steps: of the whole run. seed: of everything drawn. split, eval_split: names in the catalog ("" is a split too,
    of clips whose manifest named none). eval_clips: at most so many held-out clips are retrieved among.
    log_every, eval_every, checkpoint_every: steps."""

    steps: int = 100_000
    seed: int = 0
    split: str = "train"
    eval_split: str = "eval"
    eval_clips: int = 1_000
    log_every: int = 10
    eval_every: int = 1_000
    checkpoint_every: int = 1_000
    view: ViewConfig = field(default_factory=ViewConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    encoders: EncoderConfig = field(default_factory=EncoderConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "eval_every", "checkpoint_every", "eval_clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; give 0 or more")


__all__ = [
    "RECIPES",
    "OptimiserConfig",
    "PretrainConfig",
    "change",
    "check_same_run",
    "flatten",
    "from_json",
    "recipe",
    "to_json",
]

FREE_TO_CHANGE = frozenset({"log_every", "eval_every", "checkpoint_every", "loader.threads", "loader.ahead"})
"""What may differ between a run's start and its continuation: it does not change what is computed."""

RECIPES = {
    # METHOD.md, "Settings of the paper": M=128, K=30 M, N=300 M, tau=.7, m=.999, Adam 1e-3 after 500 warm-up steps.
    "paper": PretrainConfig(),
    # For two CPU cores and some minutes; what `make demo` runs.
    "small": PretrainConfig(
        steps=400,
        eval_every=100,
        checkpoint_every=100,
        view=ViewConfig(frames=8, view_s=1.5, size=56, hop=320, n_fft=512, n_mels=48, jitter=0.4),
        loader=LoaderConfig(batch=32),
        encoders=EncoderConfig(video="small", audio="small", width=128, hidden=256),
        objective=ObjectiveConfig(
            negatives="batch+dictionary",
            dictionary=256,
            pool=1_024,
            tau=0.1,
            momentum=0.99,
            share=1.0,
            share_start=50,
            share_ramp=100,
        ),
        optimiser=OptimiserConfig(rate=1e-3, warmup=50, cosine=True, weight_decay=1e-4),
    ),
}


def recipe(name: str) -> PretrainConfig:
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is not known; use one of {', '.join(RECIPES)}")
    return RECIPES[name]


def to_json(config: PretrainConfig) -> dict[str, Any]:
    return asdict(config)


def from_json(data: dict[str, Any]) -> PretrainConfig:
    """Raises ValueError with a sentence for an unknown field, a wrong type or a value its owner refuses."""
    return options.from_json(PretrainConfig, data)


def check_same_run(saved: dict[str, Any], config: PretrainConfig, where: Path) -> None:
    """Raises ValueError when a continued run would compute something else than it began."""
    before, now = flatten(saved), flatten(json.loads(json.dumps(to_json(config))))
    changed = [n for n in sorted(before.keys() | now.keys()) if before.get(n) != now.get(n) and n not in FREE_TO_CHANGE]
    if changed:
        name = changed[0]
        raise ValueError(
            f"{where} was begun with {name}={before.get(name)!r}, not {now.get(name)!r}"
            f"{f' ({len(changed)} options differ)' if len(changed) > 1 else ''}; "
            "use another run folder, or the options it began with"
        )
