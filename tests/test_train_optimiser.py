"""An optimiser that was put back takes the very next step, bit for bit, whatever the order of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmacc.train.optimiser import load_optimiser, optimiser_tensors
from cmacc.train.running.checkpoint import load
from cmacc.train.running.checkpointer import CheckpointConfig, Checkpointer

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
KINDS: dict[str, Make] = {
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "plain": lambda p: torch.optim.AdamW(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "no momentum": lambda p: torch.optim.SGD(p, lr=0.01),
}


class Net(nn.Module):
    """With a filter in channels_last, a parameter of no dimension, and one that never has a gradient."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.filter = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.head = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.filter(x).mean((2, 3))) * self.scale


def train(net: Net, optimiser: torch.optim.Optimizer, *steps: int) -> None:
    for step in steps:
        x = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        optimiser.zero_grad(set_to_none=True)
        net(x).square().sum().backward()
        optimiser.step()


def through_a_file(folder: Path, step: int, net: Net, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    saver = Checkpointer(folder, CheckpointConfig())
    tensors: dict[str, Any] = {f"model.{name}": tensor for name, tensor in net.state_dict().items()}
    saver.save(step, tensors | optimiser_tensors(optimiser, net.named_parameters()), {})
    return load(saver.wait() or "").tensors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after", [0, 1, 4])
def test_the_very_next_step(tmp_path: Path, kind: str, after: int) -> None:
    whole = Net(0)
    optimiser = KINDS[kind](list(whole.parameters()))
    train(whole, optimiser, *range(after))
    saved = through_a_file(tmp_path, after, whole, optimiser)
    train(whole, optimiser, *range(after, 8))

    again = Net(1)
    other = KINDS[kind](list(again.parameters())[::-1])  # in another order
    again.load_state_dict({name.removeprefix("model."): t for name, t in saved.items() if name.startswith("model.")})
    load_optimiser(other, saved, again.named_parameters())
    assert optimiser_tensors(other, again.named_parameters()).keys() == {n for n in saved if n.startswith("optimiser.")}
    train(again, other, *range(after, 8))
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_names_say_what_they_are_of() -> None:
    net = Net(0)
    optimiser = KINDS["fused"](list(net.parameters()))
    assert optimiser_tensors(optimiser, net.named_parameters()) == {}
    train(net, optimiser, 0)
    found = optimiser_tensors(optimiser, net.named_parameters())
    learning = ("filter.weight", "filter.bias", "head.weight", "head.bias", "scale")
    assert found.keys() == {f"optimiser.{what}.{name}" for what in ("exp_avg", "exp_avg_sq", "step") for name in learning}


def test_a_moment_is_laid_out_as_its_parameter(tmp_path: Path) -> None:
    """A fused kernel walks through memory: moments in another layout would be those of other weights."""
    net = Net(0)
    optimiser = KINDS["fused"](list(net.parameters()))
    train(net, optimiser, 0)
    saved = through_a_file(tmp_path, 1, net, optimiser)
    assert saved["optimiser.exp_avg.filter.weight"].is_contiguous(), "in a file there is one layout"
    load_optimiser(optimiser, saved, net.named_parameters())
    assert optimiser.state[net.filter.weight]["exp_avg"].stride() == net.filter.weight.stride()


def test_rates_are_those_of_the_run_that_loads() -> None:
    net = Net(0)
    optimiser = KINDS["fused"](list(net.parameters()))
    train(net, optimiser, 0)
    saved = {name: tensor.clone() for name, tensor in optimiser_tensors(optimiser, net.named_parameters()).items()}
    optimiser.param_groups[0].update(lr=0.5, weight_decay=0.25)
    load_optimiser(optimiser, saved, net.named_parameters())
    assert (optimiser.param_groups[0]["lr"], optimiser.param_groups[0]["weight_decay"]) == (0.5, 0.25)
    train(net, optimiser, 1)
    assert saved["optimiser.step.scale"] == 1, "what was loaded from is left as it was"


def test_nothing_of_before_is_left() -> None:
    """Put back to before the first step, as when a run is rolled back."""
    net = Net(0)
    optimiser = KINDS["fused"](list(net.parameters()))
    train(net, optimiser, 0)
    load_optimiser(optimiser, {"model.x": torch.zeros(3)}, net.named_parameters())
    assert optimiser_tensors(optimiser, net.named_parameters()) == {}


@pytest.mark.parametrize("bad", [
    {"optimiser.exp_avg.head.other": torch.zeros(2, 4)},
    {"optimiser.exp_avg.head.weight": torch.zeros(4, 2)},
    {"optimiser.exp_avg": torch.zeros(4, 2)},
])  # fmt: skip
def test_another_model_is_refused(bad: dict[str, Tensor]) -> None:
    net = Net(0)
    optimiser = KINDS["fused"](list(net.parameters()))
    (name,) = bad
    with pytest.raises(
        ValueError, match=rf"^{name} of shape \(\d, \d\) fits no parameter of this run; load what this model saved"
    ):
        load_optimiser(optimiser, bad, net.named_parameters())


def test_what_a_checkpoint_does_not_hold() -> None:
    net = Net(0)
    optimiser = torch.optim.LBFGS(list(net.parameters()))
    optimiser.state[net.scale]["func_evals"] = 3
    with pytest.raises(TypeError, match="the optimiser keeps func_evals as int, which a checkpoint does not hold"):
        optimiser_tensors(optimiser, net.named_parameters())
