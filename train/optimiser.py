"""The optimiser: its learning rate, a pure function of the step, and its state as tensors that are named by their parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cmacc.train.schedule import warmup_constant, warmup_cosine

PREFIX = "optimiser"


@dataclass(frozen=True)
class OptimiserConfig:
    """Adam. rate: peak learning rate. warmup: steps of linear rise. cosine: fall to 0 at the last step, else constant.
    weight_decay: decoupled. clip: largest norm of the whole gradient, 0: any."""

    rate: float = 1e-3
    warmup: int = 500
    cosine: bool = False
    weight_decay: float = 0.0
    clip: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise ValueError(f"optimiser.rate is {self.rate}; give a learning rate above 0")
        if self.warmup < 0:
            raise ValueError(f"optimiser.warmup is {self.warmup}; give 0 or more steps")
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optimiser.{name} is {getattr(self, name)}; give 0 or more")

    def at(self, step: int, steps: int) -> float:
        """Learning rate of a step, of a run of so many."""
        return self.rate * (warmup_cosine(step, self.warmup, steps) if self.cosine else warmup_constant(step, self.warmup))

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
        """Fused, so that a step can be left out on the device: see `TrainingStep`."""
        return torch.optim.AdamW(parameters, lr=self.rate, weight_decay=self.weight_decay, fused=True)


def optimiser_tensors(optimiser: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Its state, as `optimiser.<what>.<name of the parameter>`; none before the first step. Not a copy.

    named: all that it optimises, e.g. `model.named_parameters()`. Options of its groups (rates) are not part of it.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in named}
    found = {}
    for parameter, state in optimiser.state.items():
        for what, value in state.items():
            if isinstance(value, Tensor):
                found[f"{PREFIX}.{what}.{names[parameter]}"] = value
            elif value is not None:
                raise TypeError(f"the optimiser keeps {what} as {type(value).__name__}, which a checkpoint does not hold")
    return found


def load_optimiser(
    optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor], named: Iterable[tuple[str, nn.Parameter]]
) -> None:
    """Put back what `optimiser_tensors` gave, in place of all state; other names than `optimiser.…` are passed over.

    Moments get the layout in memory of their parameter: fused kernels ask for it. Raises ValueError for a parameter that is
    not optimised, or has another shape.
    """
    own = dict(named)
    places = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    index = {parameter: i for i, parameter in enumerate(places)}
    state: dict[int, dict[str, Any]] = {}
    for full, value in tensors.items():
        prefix, _, rest = full.partition(".")
        if prefix != PREFIX:
            continue
        what, _, name = rest.partition(".")
        parameter = own.get(name)
        if parameter is None or parameter not in index or (value.dim() and value.shape != parameter.shape):
            raise ValueError(f"{full} of shape {tuple(value.shape)} fits no parameter of this run; load what this model saved")
        copy = torch.empty_like(parameter, dtype=value.dtype) if value.dim() else torch.empty((), dtype=value.dtype)
        state.setdefault(index[parameter], {})[what] = copy.copy_(value)
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
