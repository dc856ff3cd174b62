"""Compute settings: the same numbers in less memory, by a compiler, or in bf16; collections in step; batches on the device."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from train_data import unit

from cmacc.train.loading.reader import Batch
from cmacc.train.networks import compute
from cmacc.train.networks.backbones import AUDIO_BACKBONES, VIDEO_BACKBONES
from cmacc.train.networks.batchnorm import SyncBatchNorm
from cmacc.train.networks.compute import Collector, ComputeConfig, OnDevice, autocast, prepare
from cmacc.train.networks.encoders import Encoder, EncoderConfig

CPU = torch.device("cpu")
PLAIN = ComputeConfig()
ENCODERS = [("video", "small"), ("video", "r3d_18"), ("video", "s3d"), ("video", "x3d_small"), ("audio", "resnet18_1d")]


def build(kind: str, name: str, norm: str = "batch") -> tuple[Encoder, Tensor]:
    torch.manual_seed(0)
    config = EncoderConfig(width=8, hidden=8, bands=16, norm=norm)  # type: ignore[arg-type]
    backbone = VIDEO_BACKBONES[name]() if kind == "video" else AUDIO_BACKBONES[name](16)
    return Encoder(backbone, config), torch.randn(4, *((3, 8, 24, 24) if kind == "video" else (1, 16, 30)))


def learn(encoder: Encoder, x: Tensor) -> dict[str, Tensor]:
    """Embeddings and gradients, and the running statistics after them."""
    embedding = encoder(x)
    (embedding * unit(4, 8)).sum().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    return {"embedding": embedding.detach(), **gradients, **{name: b.clone() for name, b in encoder.named_buffers()}}


@pytest.mark.parametrize(("kind", "name"), ENCODERS)
def test_recomputation_changes_no_bit(kind: str, name: str) -> None:
    """Neither embeddings nor gradients, nor running statistics, which a second pass would move twice."""
    plain, x = build(kind, name)
    again = copy.deepcopy(plain)
    prepare(again, ComputeConfig(checkpointing=True), CPU)
    assert list(again.state_dict()) == list(plain.state_dict())
    expected = learn(plain, x)
    for fact, found in learn(again, x).items():
        assert torch.equal(found, expected[fact]), fact
    with torch.no_grad():
        assert torch.equal(again(x), plain(x))


def test_a_copy_recomputes_with_weights_of_its_own() -> None:
    encoder, x = build("video", "small")
    prepare(encoder, ComputeConfig(checkpointing=True), CPU)
    other = copy.deepcopy(encoder)
    before = encoder(x)
    learn(other, x)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    assert torch.equal(encoder(x), before)
    assert not torch.equal(other(x), before)
    assert all(p.grad is None for p in encoder.parameters())


def saved_bytes(encoder: Encoder, x: Tensor) -> int:
    """Of activations that wait for the backward pass."""
    waiting: dict[int, int] = {}
    weights = {t.data_ptr() for t in encoder.state_dict().values()}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in weights:
            waiting[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        encoder(x)
    return sum(waiting.values())


def test_recomputation_remembers_less() -> None:
    encoder, x = build("video", "r3d_18")
    before = saved_bytes(encoder, x)
    prepare(encoder, ComputeConfig(checkpointing=True), CPU)
    assert saved_bytes(encoder, x) < before / 4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "name"), [("video", "small"), ("video", "x3d_small"), ("audio", "resnet18_1d")])
def test_compiled_encoders_compute_the_same(kind: str, name: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "COMPILER", "aot_eager")
    torch.compiler.reset()
    plain, x = build(kind, name)
    compiled = copy.deepcopy(plain)
    prepare(compiled, ComputeConfig(compile="on", checkpointing=checkpointing), CPU)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    expected = learn(plain, x)
    torch._dynamo.utils.counters.clear()
    for fact, found in learn(compiled, x).items():
        assert torch.allclose(found.double(), expected[fact].double(), atol=1e-4), fact
    stats = torch._dynamo.utils.counters["stats"]
    assert stats["unique_graphs"] >= 1
    assert compiled.features(x).shape == plain.features(x).shape


def test_by_default_a_cpu_computes_as_ever() -> None:
    """float32, not compiled: the bits of a run without settings."""
    plain, x = build("video", "small")
    prepared = copy.deepcopy(plain)
    prepare(prepared, PLAIN, CPU)
    assert prepared.backbone._compiled_call_impl is None
    expected = learn(plain, x)
    with autocast(PLAIN, CPU):
        found = learn(prepared, x)
    assert all(torch.equal(found[fact], expected[fact]) for fact in expected)
    cuda = torch.device("cuda")
    assert PLAIN.bf16(cuda)
    assert PLAIN.compiles(cuda)
    assert not ComputeConfig(precision="float32").bf16(cuda)
    assert not ComputeConfig(compile="off").compiles(cuda)


def test_bf16_rounds_and_gives_float32_embeddings() -> None:
    encoder, x = build("video", "small")
    config = ComputeConfig(precision="bf16")
    seen = []
    encoder.backbone[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with autocast(config, CPU):
        found = encoder(x)
    assert seen == [torch.bfloat16]
    assert found.dtype == torch.float32
    assert torch.allclose(found.norm(dim=1), torch.ones(4))
    expected = encoder(x)
    assert 0 < (found - expected).abs().max() < 0.1
    (found * unit(4, 8)).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in encoder.parameters())


def test_bf16_with_recomputation_gives_the_gradients_of_bf16() -> None:
    plain, x = build("audio", "resnet18_1d", norm="group")
    again = copy.deepcopy(plain)
    config = ComputeConfig(precision="bf16", checkpointing=True)
    prepare(again, config, CPU)
    with autocast(config, CPU):
        expected = learn(plain, x)
        found = learn(again, x)
    assert all(torch.equal(found[fact], expected[fact]) for fact in expected)


@pytest.mark.parametrize(("batchnorm", "world", "synced"), [("sync", 2, True), ("sync", 1, False), ("rank", 2, False)])
def test_statistics_over_ranks_only_where_there_are_ranks(batchnorm: str, world: int, synced: bool) -> None:
    encoder, _ = build("video", "small")
    names = list(encoder.state_dict())
    prepare(encoder, ComputeConfig(batchnorm=batchnorm), CPU, world)  # type: ignore[arg-type]
    assert any(isinstance(m, SyncBatchNorm) for m in encoder.modules()) == synced
    assert list(encoder.state_dict()) == names


class Ring(nn.Module):
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        super().__init__()
        self.me = [self]


def ring() -> weakref.ref[Ring]:
    return weakref.ref(Ring())


def test_garbage_is_collected_at_its_steps_and_only_then() -> None:
    with Collector(3) as collector:
        assert not gc.isenabled()
        gone = ring()
        collector.at(1)
        collector.at(2)
        assert gone() is not None
        collector.at(3)
        assert gone() is None
    assert gc.isenabled()


def test_garbage_is_left_to_python_when_asked() -> None:
    gc.collect()
    with Collector(0) as collector:
        assert gc.isenabled()
        gc.disable()
        try:
            gone = ring()
            collector.at(0)
            assert gone() is not None
        finally:
            gc.enable()


def test_a_collector_leaves_things_as_they_were_also_after_an_error() -> None:
    gc.disable()
    try:
        with pytest.raises(RuntimeError), Collector(2):
            raise RuntimeError
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_batches_come_to_the_device_in_order_and_none_is_taken_ahead() -> None:
    taken = []

    def batches() -> Iterator[Batch]:
        for i in range(3):
            taken.append(i)
            ids = torch.full((2,), i)
            yield Batch(torch.full((2, 3, 2, 4, 4), float(i)), torch.zeros(2, 1, 4, 4), ids, ids, ids)

    for i, batch in enumerate(OnDevice(batches(), CPU)):
        assert taken == list(range(i + 1))
        assert (batch.video == i).all()
        assert batch.video.is_contiguous(memory_format=torch.channels_last_3d)
        assert batch.second_video is None
    assert taken == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": "fp16"}, "compute.precision is 'fp16'; use one of auto, float32, bf16"),
        ({"compile": True}, "compute.compile is True; use one of auto, on, off"),
        ({"batchnorm": "global"}, "compute.batchnorm is 'global'; use one of rank, sync, shuffled"),
        ({"micro_batch": -1}, "compute.micro_batch is -1; give a number of clips, 0 for all at once"),
        ({"collect_every": -1}, "compute.collect_every is -1; give a number of steps, 0 to leave it to Python"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        ComputeConfig(**changes)  # type: ignore[arg-type]
    assert str(caught.value) == said
