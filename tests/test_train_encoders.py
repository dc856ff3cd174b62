"""Encoders: the published networks to the last parameter, heads and norms as configured, and refusals that name a setting."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights
from torchvision.models.video import R2Plus1D_18_Weights, R3D_18_Weights, S3D_Weights, r2plus1d_18, r3d_18, s3d
from train_data import unit

from cmacc.train.networks.backbones import AUDIO_BACKBONES, VIDEO_BACKBONES, Backbone
from cmacc.train.networks.encoders import Encoder, EncoderConfig, build_encoders

BANDS = 16
SMALLEST = {"video": (2, 3, 8, 17, 17), "audio": (2, 1, BANDS, 20)}


def video_backbone(name: str) -> Backbone:
    with torch.device("meta"):
        return VIDEO_BACKBONES[name]()


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "published", "classifier"),
    [
        ("r3d_18", R3D_18_Weights.DEFAULT.meta["num_params"], 513 * 400),
        ("r2plus1d_18", R2Plus1D_18_Weights.DEFAULT.meta["num_params"], 513 * 400),
        ("s3d", S3D_Weights.DEFAULT.meta["num_params"], 1025 * 400),
        # PyTorchVideo's x3d_s; before the classifier a linear layer without bias.
        ("x3d_s", 3_794_322, 432 * 2048 + 2049 * 400),
    ],
)
def test_video_backbones_have_the_published_number_of_parameters(name: str, published: int, classifier: int) -> None:
    assert count(video_backbone(name).network) == published - classifier


def test_audio_resnets_have_the_published_number_of_parameters() -> None:
    pictures = ResNet18_Weights.DEFAULT.meta["num_params"] - 513 * 1000
    assert count(AUDIO_BACKBONES["resnet18"](80).network) == pictures - 2 * 64 * 49
    # Of 3x3 and 7x7 kernels one row each; 1x1 kernels and normalisation are as they were.
    network = AUDIO_BACKBONES["resnet18_1d"](80).network
    kernels = sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 3))
    assert count(network) == pictures - 2 * kernels - 64 * 3 * 49 + 64 * 80 * 7


RESNET = [(64, 16, 56, 56), (64, 16, 56, 56), (128, 8, 28, 28), (256, 4, 14, 14), (512, 2, 7, 7)]
"""Of 16 frames of 112x112 (arXiv 1711.11248, table 1)."""
X3D = [(24, 13, 80, 80), (24, 13, 40, 40), (48, 13, 20, 20), (96, 13, 10, 10), (192, 13, 5, 5), (432, 13, 5, 5)]
"""Of 13 frames of 160x160 (arXiv 2004.04730, table 1)."""


@pytest.mark.parametrize(
    ("name", "view", "expected"),
    [
        ("r3d_18", (16, 112, 112), RESNET),
        ("r2plus1d_18", (16, 112, 112), RESNET),
        ("x3d_s", (13, 160, 160), X3D),
    ],
)
def test_stages_have_the_published_shapes(name: str, view: tuple[int, ...], expected: list[tuple[int, ...]]) -> None:
    backbone, shapes = video_backbone(name), []
    for stage in backbone.stages:
        stage.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    features = backbone.network(torch.zeros(1, 3, *view, device="meta"))
    assert shapes == expected
    assert features.shape == (1, backbone.width)


def test_s3d_has_the_published_shapes() -> None:
    """Of 64 frames of 224x224 (arXiv 1712.04851, figure 2 with I3D's sizes): 7x7 in the end, an eighth of the frames."""
    network = video_backbone("s3d").network
    assert network.features(torch.zeros(1, 3, 64, 224, 224, device="meta")).shape == (1, 1024, 8, 7, 7)


@pytest.mark.parametrize(("name", "theirs"), [("r3d_18", r3d_18), ("r2plus1d_18", r2plus1d_18), ("s3d", s3d)])
def test_weights_of_torchvision_fit(name: str, theirs: type[nn.Module]) -> None:
    published = {k: v.shape for k, v in theirs().state_dict().items() if not k.startswith(("fc.", "classifier."))}
    assert {k: v.shape for k, v in video_backbone(name).network.state_dict().items()} == published


class Block1d(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm1d(outputs)
        self.conv2 = nn.Conv1d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm1d(outputs)
        down = [nn.Conv1d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm1d(outputs)]
        self.downsample = nn.Sequential(*(down if stride > 1 else []))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.downsample(x)).relu()


def test_the_one_dimensional_resnet_is_one() -> None:
    """A plain ResNet-18 of Conv1d and BatchNorm1d over bands as channels gives the same features, with the same weights."""
    torch.manual_seed(0)
    ours = AUDIO_BACKBONES["resnet18_1d"](BANDS).network
    widths = (64, 64, 128, 256, 512)
    plain = nn.Sequential(nn.Conv1d(BANDS, 64, 7, 2, 3, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.MaxPool1d(3, 2, 1))
    for before, after in pairwise(widths):
        plain += nn.Sequential(Block1d(before, after, 1 if before == after else 2), Block1d(after, after, 1))
    plain += nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten())
    with torch.no_grad():
        for mine, its in zip(ours.parameters(), plain.parameters(), strict=True):
            its.copy_(mine.reshape(its.shape))
    x = torch.randn(3, 1, BANDS, 50)
    assert torch.allclose(ours(x), plain(x[:, 0]), atol=1e-5)


HEADS = {
    "linear": EncoderConfig(width=8, head_layers=1, bands=BANDS),
    "two": EncoderConfig(width=8, hidden=12, bands=BANDS),
    "three, normed": EncoderConfig(width=8, hidden=12, head_layers=3, head_norm=True, bands=BANDS),
    "group": EncoderConfig(width=8, hidden=12, head_norm=True, norm="group", bands=BANDS),
}


def build(kind: str, name: str, config: EncoderConfig) -> Encoder:
    torch.manual_seed(0)
    return Encoder(VIDEO_BACKBONES[name]() if kind == "video" else AUDIO_BACKBONES[name](config.bands), config)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("kind", "name"), [*(("video", n) for n in VIDEO_BACKBONES), *(("audio", n) for n in AUDIO_BACKBONES)])
def test_every_encoder_gives_unit_vectors_and_learns_everywhere(kind: str, name: str, head: str) -> None:
    config = HEADS[head]
    encoder = build(kind, name, config)
    x = torch.randn(4, *SMALLEST[kind][1:])
    features = encoder.features(x)
    assert features.shape == (4, encoder.feature_width)
    embedding, last_input = encoder.project(features)
    assert embedding.shape == (4, config.width)
    assert embedding.dtype == torch.float32
    assert torch.allclose(embedding.norm(dim=1), torch.ones(4))
    last = encoder.head[-1](last_input)
    assert torch.allclose(last / last.norm(dim=1, keepdim=True), embedding, atol=1e-6)
    assert last_input.shape[1] == (config.hidden if config.head_layers > 1 else encoder.feature_width)
    assert torch.allclose(encoder(x), embedding, atol=1e-5)
    (embedding * unit(4, config.width)).sum().backward()
    for parameter_name, p in encoder.named_parameters():
        assert p.grad is not None, parameter_name
        assert p.grad.isfinite().all(), parameter_name
        if not parameter_name.endswith(".bias"):  # the norm takes away what a bias before it gave
            assert p.grad.any(), parameter_name


@pytest.mark.parametrize(("kind", "name"), [*(("video", n) for n in VIDEO_BACKBONES), *(("audio", n) for n in AUDIO_BACKBONES)])
def test_gradients_are_those_of_double_precision(kind: str, name: str) -> None:
    """At the smallest sizes, where kernels reach beyond both ends. oneDNN, which only float32 goes through, is wrong for some."""
    encoder = build(kind, name, EncoderConfig(width=8, hidden=12, head_norm=True, norm="group", bands=BANDS)).train()
    least = [max(a, b) for a, b in zip(encoder.takes.least, SMALLEST[kind][2:] if kind == "audio" else (1, 1, 1), strict=True)]
    x, target = torch.randn(4, encoder.takes.channels, *least), unit(4, 8)
    (encoder(x) * target).sum().backward()
    found = [p.grad.double() for p in encoder.parameters() if p.grad is not None]
    encoder.double().zero_grad()
    (encoder(x.double()) * target).sum().backward()
    scale = max(p.grad.abs().max() for p in encoder.parameters() if p.grad is not None)
    for (parameter_name, p), mine in zip(encoder.named_parameters(), found, strict=True):
        assert p.grad is not None
        assert (mine - p.grad).abs().max() < 1e-4 * scale, parameter_name


def test_heads_are_as_configured() -> None:
    def kinds(**changes: object) -> list[str]:
        encoder = build("audio", "small", EncoderConfig(audio="small", **changes))  # type: ignore[arg-type]
        return [type(layer).__name__ for layer in encoder.head]

    assert kinds(head_layers=1, head_norm=True) == ["Linear"]
    assert kinds() == ["Linear", "ReLU", "Linear"]
    assert kinds(head_layers=3) == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert kinds(head_norm=True) == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert kinds(head_norm=True, norm="group") == ["Linear", "GroupNorm", "ReLU", "Linear"]


@pytest.mark.parametrize(
    ("kind", "name"), [("video", "small"), ("video", "x3d_small"), ("audio", "small"), ("audio", "resnet18_1d")]
)
def test_group_norm_couples_no_clips(kind: str, name: str) -> None:
    x = torch.randn(6, *SMALLEST[kind][1:], generator=torch.Generator().manual_seed(1))
    apart = {}
    for norm in ("batch", "group"):
        encoder = build(kind, name, EncoderConfig(width=8, hidden=32, head_norm=True, norm=norm, bands=BANDS))  # type: ignore[arg-type]
        apart[norm] = (encoder(x)[:3] - encoder(x[:3])).abs().max().item()
        assert any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in encoder.modules()) == (norm == "batch")
    assert apart["group"] < 1e-5
    assert apart["batch"] > 1e-3


def test_groups_have_sixteen_channels_or_more() -> None:
    """One value alone in its group would be normalised to nothing; 45 and 921 are R(2+1)D's."""
    for name in VIDEO_BACKBONES:
        with torch.device("meta"):
            encoder = Encoder(VIDEO_BACKBONES[name](), EncoderConfig(norm="group"))
        groups = [(m.num_groups, m.num_channels) for m in encoder.modules() if isinstance(m, nn.GroupNorm)]
        assert groups
        for number, channels in groups:
            assert channels % number == 0
            assert channels // number >= 16
            assert number <= 32


def test_names_of_weights_stay() -> None:
    """Checkpoints and exports are read by them."""
    video, audio = build_encoders(EncoderConfig("small", "small", 8, 8))
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    head = [f"head.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]

    def backbone(convs: list[int]) -> list[str]:
        return [n for i in convs for n in (f"backbone.{i}.weight", *(f"backbone.{i + 1}.{kind}" for kind in norm))]

    assert list(video.state_dict()) == backbone([1, 4, 7, 10, 13]) + head
    assert list(audio.state_dict()) == backbone([1, 4, 7, 10]) + head
    with torch.device("meta"):
        video, audio = build_encoders(EncoderConfig())
    assert {"backbone.stem.0.weight", "backbone.layer4.1.conv2.1.running_var", "head.2.bias"} <= set(video.state_dict())
    assert {"backbone.conv1.weight", "backbone.layer4.1.bn2.running_var", "head.2.bias"} <= set(audio.state_dict())


def test_weights_lie_channels_last() -> None:
    video, audio = build_encoders(EncoderConfig("small", "small", 8, 8))
    assert video.backbone[1].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert audio.backbone[4].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("kind", "name"), [*(("video", n) for n in VIDEO_BACKBONES), *(("audio", n) for n in AUDIO_BACKBONES)])
def test_the_smallest_input_works_and_a_smaller_one_is_refused(kind: str, name: str) -> None:
    encoder = build(kind, name, EncoderConfig(width=8, hidden=8, bands=1))
    least = encoder.takes.least
    assert encoder(torch.randn(2, encoder.takes.channels, *least)).isfinite().all()
    for i, size in enumerate(least):
        smaller = [*least]
        smaller[i] = size - 1
        with pytest.raises(ValueError, match=r"is too small for this encoder; raise view\.\w+"):
            encoder(torch.randn(2, encoder.takes.channels, *smaller))


def test_inputs_of_a_wrong_shape_are_refused() -> None:
    video, audio = build_encoders(EncoderConfig("small", "resnet18_1d", 8, 8, bands=BANDS))
    with pytest.raises(ValueError, match=r"shape \(2, 1, 16, 20\) does not fit; give \(B, 3, frames, height, width\)"):
        video(torch.randn(2, 1, 16, 20))
    with pytest.raises(ValueError, match=r"give \(B, 1, bands, steps\)"):
        audio(torch.randn(2, 3, 16, 20))
    with pytest.raises(ValueError, match=r"encoders.bands is 16, but the log-mel has 12; set encoders.bands to view.n_mels"):
        audio(torch.randn(2, 1, 12, 20))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"video": "r3d"}, "encoders.video is 'r3d'; use one of small, r3d_18, r2plus1d_18, s3d, x3d_s, x3d_small"),
        ({"audio": "vgg"}, "encoders.audio is 'vgg'; use one of small, resnet18, resnet18_1d"),
        ({"norm": "layer"}, "encoders.norm is 'layer'; use one of batch, group"),
        ({"head_layers": 0}, "encoders.head_layers is 0; give 1 or more"),
        ({"width": 0}, "encoders.width is 0; give 1 or more"),
        ({"bands": 0}, "encoders.bands is 0; give 1 or more"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        EncoderConfig(**changes)  # type: ignore[arg-type]
    assert str(caught.value) == said
