"""BatchNorm over ranks equals BatchNorm of one process; shuffled rows come back; frozen statistics stay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import ranks_of
from torch import Tensor, nn

from cmacc.shards.order import rank_places
from cmacc.train.networks.batchnorm import SyncBatchNorm, frozen_statistics, shuffle, to_sync, unshuffle
from cmacc.train.networks.encoders import EncoderConfig, build_encoders

CONFIG = EncoderConfig("small", "small", width=8, hidden=8, head_norm=True)
ROWS = 7
"""Two ranks hold 4 and 3 of them, three ranks 3, 2 and 2."""


def sounds(offset: float = 0.0) -> Tensor:
    return torch.randn(ROWS, 1, 16, 20, generator=torch.Generator().manual_seed(0)) + offset


def work_as_rank(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        rank, world = dist.get_rank(), dist.get_world_size()
        torch.save({work.__name__: work(rank, world) for work in WORK}, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each function of WORK returns, by its name, in each of so many processes joined by gloo."""
    folder = tmp_path_factory.mktemp("ranks")
    with ranks_of("test_train_batchnorm") as run:
        assert run(request.param, "work_as_rank", str(folder)) == [0] * request.param
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def share(rank: int, ranks: list[dict[str, Any]], size: int = ROWS) -> slice:
    return rank_places(size, rank, len(ranks))


def learn(encoder: nn.Module, x: Tensor, places: slice = slice(None)) -> dict[str, Tensor]:
    """Two passes in training mode, gradients of a loss that weighs every output differently, then one in evaluation."""
    encoder.train()
    encoder(x.flip(1))
    x = x.clone().requires_grad_()
    y = encoder(x)
    weights = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(1))[places]
    (y * weights).sum().backward()
    assert x.grad is not None
    facts = {"output": y.detach(), "input gradient": x.grad}
    facts |= {f"gradient {name}": p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    facts |= {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    return facts | {"evaluation": encoder.eval()(x).detach()}


def learn_in_sync(rank: int, world: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    encoder = build_encoders(CONFIG)[1]
    to_sync(encoder)
    places = rank_places(ROWS, rank, world)
    return learn(encoder, sounds()[places], places)


def test_statistics_of_all_ranks_are_those_of_one_process(ranks: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    encoder = build_encoders(CONFIG)[1]
    for name, whole in learn(encoder, sounds()).items():
        each = [facts["learn_in_sync"][name] for facts in ranks]
        if name in ("output", "input gradient", "evaluation"):
            found = torch.empty_like(whole)
            for rank, rows in enumerate(each):
                found[share(rank, ranks)] = rows
        elif name.startswith("gradient"):
            found = torch.stack(each).sum(0)
        else:
            found = each[0]
            assert all(torch.equal(found, other) for other in each), name
        assert (found - whole).abs().max() <= 1e-4 * whole.abs().max() + 1e-6, name


def normalise_far_from_zero(rank: int, world: int) -> Tensor:
    return SyncBatchNorm(1)(sounds(1000.0)[rank_places(ROWS, rank, world)]).detach()


def test_a_large_mean_does_not_cancel(ranks: list[dict[str, Any]]) -> None:
    expected = nn.BatchNorm2d(1)(sounds(1000.0))
    for rank, facts in enumerate(ranks):
        assert torch.allclose(facts["normalise_far_from_zero"], expected[share(rank, ranks)], atol=1e-2)


def test_one_process_alone_has_the_ordinary_batchnorm() -> None:
    torch.manual_seed(0)
    plain = build_encoders(CONFIG)[1]
    synced = copy.deepcopy(plain)
    to_sync(synced)
    assert list(synced.state_dict()) == list(plain.state_dict())
    assert not any(type(m) in (nn.BatchNorm1d, nn.BatchNorm2d) for m in synced.modules())
    expected = learn(plain, sounds())
    for name, found in learn(synced, sounds()).items():
        assert torch.equal(found, expected[name]), name


def shuffle_and_back(rank: int, world: int) -> list[tuple[Tensor, Tensor]]:
    facts = []
    for size in (ROWS, world, 12):
        rows = torch.arange(size * 6.0).reshape(size, 2, 3)[rank_places(size, rank, world)]
        permutation = torch.randperm(size, generator=torch.Generator().manual_seed(size))
        there = shuffle(rows, permutation)
        facts.append((there, unshuffle(there, permutation)))
    with pytest.raises(ValueError, match=f"rank {rank} of {world} holds "):
        shuffle(torch.zeros(0, 3), torch.randperm(ROWS))
    return facts


def test_rows_change_places_and_come_back(ranks: list[dict[str, Any]]) -> None:
    for i, size in enumerate((ROWS, len(ranks), 12)):
        rows = torch.arange(size * 6.0).reshape(size, 2, 3)
        permutation = torch.randperm(size, generator=torch.Generator().manual_seed(size))
        for rank, facts in enumerate(ranks):
            there, back = facts["shuffle_and_back"][i]
            assert torch.equal(there, rows[permutation][share(rank, ranks, size)])
            assert torch.equal(back, rows[share(rank, ranks, size)])


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm])
def test_frozen_statistics_stay_and_nothing_else_does(kind: type[nn.Module]) -> None:
    layer = kind(1)
    layer(sounds())
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    homes = {name: buffer.data_ptr() for name, buffer in layer.named_buffers()}
    expected = copy.deepcopy(layer)(sounds(3.0))
    with frozen_statistics(layer):
        assert torch.equal(layer(sounds(3.0)), expected)
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    assert {name: buffer.data_ptr() for name, buffer in layer.named_buffers()} == homes
    assert list(layer.state_dict()) == list(kind(1).state_dict())
    layer(sounds(3.0))
    assert all((buffer != before[name]).all() for name, buffer in layer.named_buffers())
    evaluated = copy.deepcopy(layer).eval()(sounds())
    with frozen_statistics(layer.eval()):
        assert torch.equal(layer(sounds()), evaluated)


def test_frozen_statistics_end_with_an_error_too() -> None:
    encoder = build_encoders(CONFIG)[1]
    homes = {name: buffer.data_ptr() for name, buffer in encoder.named_buffers()}
    with pytest.raises(RuntimeError, match="on purpose"), frozen_statistics(encoder):
        encoder(sounds())
        raise RuntimeError("on purpose")
    assert {name: buffer.data_ptr() for name, buffer in encoder.named_buffers()} == homes


def frozen_over_ranks(rank: int, world: int) -> tuple[Tensor, dict[str, Tensor]]:
    layer = SyncBatchNorm(1)
    with frozen_statistics(layer):
        y = layer(sounds()[rank_places(ROWS, rank, world)])
    return y.detach(), dict(layer.state_dict())


def test_frozen_statistics_over_ranks(ranks: list[dict[str, Any]]) -> None:
    expected = nn.BatchNorm2d(1)(sounds())
    for rank, facts in enumerate(ranks):
        y, state = facts["frozen_over_ranks"]
        assert torch.allclose(y, expected[share(rank, ranks)], atol=1e-5)
        assert state["num_batches_tracked"] == 0
        assert state["running_mean"] == 0


WORK: list[Callable[[int, int], Any]] = [learn_in_sync, normalise_far_from_zero, shuffle_and_back, frozen_over_ranks]


def test_frozen_statistics_of_a_compiled_module_need_no_other_graph() -> None:
    layer = build_encoders(CONFIG)[1].backbone
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    layer.compile(backend=backend)
    layer(sounds())
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with frozen_statistics(layer):
        layer(sounds(3.0))
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    layer(sounds(3.0))
    assert not any(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers() if buffer.numel())
    assert len(graphs) == 1
