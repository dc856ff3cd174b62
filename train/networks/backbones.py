"""Backbones: networks from pixels or log-mel to features. torchvision's where it has them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.video import r2plus1d_18, r3d_18, s3d

_PICTURES = ("channels", "frames", "height", "width")
_SOUNDS = ("channels", "bands", "steps")
_SETTING = {"frames": "view.frames", "height": "view.size", "width": "view.size", "bands": "view.n_mels", "steps": "view.view_s"}


class Takes(NamedTuple):
    """Sizes of an input after its first dimension: `exactly` so many channels, and `least` of each dimension that follows.

    bands: where the bands of a log-mel are fixed, how many; else 0.
    """

    channels: int
    least: tuple[int, ...]
    bands: int = 0

    def wrong(self, shape: torch.Size) -> str | None:
        """What is wrong with an input of this shape, in a sentence."""
        names = _PICTURES if len(self.least) == 3 else _SOUNDS
        if len(shape) != len(names) + 1 or shape[1] != self.channels:
            return f"an input of shape {tuple(shape)} does not fit; give (B, {self.channels}, {', '.join(names[1:])})"
        for name, size, least in zip(names[1:], shape[2:], self.least, strict=True):
            if size < least:
                return f"an input with {name}={size} is too small for this encoder; raise {_SETTING[name]}: {least} or more"
        if self.bands and shape[2] != self.bands:
            return f"encoders.bands is {self.bands}, but the log-mel has {shape[2]}; set encoders.bands to view.n_mels"
        return None


class Backbone(NamedTuple):
    """A network to features of `width` numbers, what it takes, and its stages: modules called one after the other."""

    network: nn.Module
    width: int
    takes: Takes
    stages: tuple[nn.Module, ...]


class _Chain(nn.Sequential):
    """Layers one after the other, in code that torch.compile looks at: nn.Sequential's own it passes over."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


def _normed(conv: nn.Conv3d, relu: bool = True) -> list[nn.Module]:
    return [conv, nn.BatchNorm3d(conv.out_channels), *([nn.ReLU(inplace=True)] if relu else [])]


def _spatial(inputs: int, outputs: int, size: int, stride: int = 2) -> list[nn.Module]:
    pad = (size - 1) // 2
    return _normed(nn.Conv3d(inputs, outputs, (1, size, size), (1, stride, stride), (0, pad, pad), bias=False))


def _temporal(width: int) -> list[nn.Module]:
    return _normed(nn.Conv3d(width, width, (3, 1, 1), 1, (1, 0, 0), bias=False))


def small_video() -> Backbone:
    """For a CPU, a thousandth of R3D-18's work: a strided stem, then factored spatial and temporal convolutions.

    Each clip is standardised first, so that its colour cast and brightness carry nothing.
    """
    widths = (32, 64, 128)
    layers: list[nn.Module] = [nn.InstanceNorm3d(3), *_spatial(3, widths[0], 7, 4)]
    for before, after in pairwise(widths):
        layers += _spatial(before, after, 3) + _temporal(after)
    network = _Chain(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten())
    return Backbone(network, widths[-1], Takes(3, (1, 2, 2)), (network,))


def small_audio(bands: int = 0) -> Backbone:
    """For a CPU: four strided convolutions over the log-mel, standardised first, so that its volume carries nothing."""
    widths = (1, 16, 32, 64, 128)
    layers: list[nn.Module] = [nn.InstanceNorm2d(1)]
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    network = _Chain(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Backbone(network, widths[-1], Takes(1, (1, 2)), (network,))


def _resnet(network: nn.Module, takes: Takes) -> Backbone:
    """torchvision's, for pictures or video, without its classifier."""
    width = int(network.fc.in_features)  # type: ignore[union-attr, arg-type]
    network.fc = nn.Identity()
    stages = [getattr(network, name) for name in ("stem", "layer1", "layer2", "layer3", "layer4") if hasattr(network, name)]
    return Backbone(network, width, takes, tuple(stages))


def _resnet18_audio(bands: int = 0) -> Backbone:
    network = resnet18()
    network.conv1 = _like(network.conv1, inputs=1)
    return _resnet(network, Takes(1, (1, 1)))


class _BandsAsChannels(nn.Module):
    """(B, 1, bands, steps) to (B, bands, 1, steps)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def _resnet18_1d(bands: int) -> Backbone:
    """ResNet-18 with 1-D kernels along time and the bands as channels: torchvision's, with kernels of a single row."""
    network = resnet18()
    for module in tuple(network.modules()):
        for name, child in tuple(module.named_children()):
            if isinstance(child, nn.Conv2d):
                setattr(module, name, _like(child, one_row=True))
    network.conv1 = nn.Sequential(_BandsAsChannels(), _like(network.conv1, inputs=bands, one_row=True))
    return _resnet(network, Takes(1, (1, 1), bands))


def _like(conv: nn.Conv2d, *, inputs: int = 0, one_row: bool = False) -> nn.Conv2d:
    """A convolution as `conv`, with other inputs or a kernel of one row, initialised as torchvision's ResNet does it."""
    size, stride, pad = conv.kernel_size[1], conv.stride[1], conv.kernel_size[1] // 2
    rows = (1, 1, 0) if one_row else (size, stride, pad)
    kernel, strides, pads = zip(rows, (size, stride, pad), strict=True)
    new = nn.Conv2d(inputs or conv.in_channels, conv.out_channels, kernel, strides, pads, bias=False)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    return new


def _s3d() -> Backbone:
    """S3D (arXiv 1712.04851), averaged over whatever is left of the clip: torchvision's own averages 2x7x7."""
    # torchvision's running statistics move by a thousandth a step, as its converted weights had it: far too slow for short runs.
    network = s3d(norm_layer=partial(nn.BatchNorm3d, eps=1e-3))
    network.avgpool = nn.AdaptiveAvgPool3d(1)
    network.classifier = nn.Identity()
    stages = tuple(stage for stage in network.features if not isinstance(stage, nn.MaxPool3d))
    # Its temporal kernel of 7 by strides of 2: for 5 to 7 frames oneDNN's gradient of the weights is wrong (torch 2.11, x86).
    return Backbone(network, 1024, Takes(3, (8, 17, 17)), stages)


class _Squeeze(nn.Module):
    """Squeeze and excitation (arXiv 1709.01507) of a sixteenth of the width, in eights: every channel by a factor of its clip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 8 * math.ceil(width / 128)
        self.factors = nn.Sequential(
            nn.AdaptiveAvgPool3d(1), nn.Conv3d(width, inner, 1), nn.ReLU(inplace=True), nn.Conv3d(inner, width, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors(x)


class _Bottleneck(nn.Module):
    """X3D's block: 1x1x1 to 2.25 times the width, 3x3x3 inside each channel, 1x1x1 back."""

    def __init__(self, inputs: int, outputs: int, stride: int, squeeze: bool) -> None:
        super().__init__()
        inner, strides = int(2.25 * outputs), (1, stride, stride)
        self.branch = nn.Sequential(
            *_normed(nn.Conv3d(inputs, inner, 1, bias=False)),
            *_normed(nn.Conv3d(inner, inner, 3, strides, 1, groups=inner, bias=False), relu=False),
            *([_Squeeze(inner)] if squeeze else []),
            nn.SiLU(inplace=True),
            *_normed(nn.Conv3d(inner, outputs, 1, bias=False), relu=False),
        )
        changes = stride > 1 or inputs != outputs
        self.shortcut = nn.Sequential(
            *(_normed(nn.Conv3d(inputs, outputs, 1, strides, bias=False), relu=False) if changes else [])
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.branch(x) + self.shortcut(x))
        return y


def x3d(depths: tuple[int, int, int, int] = (3, 5, 11, 7)) -> Backbone:
    """X3D (arXiv 2004.04730, table 1), whose time is never strided. depths: blocks of each stage, by default those of X3D-S.

    For lack of the last two linear layers, which the projection head replaces, the features are its 432 after pooling.
    """
    widths = (24, 24, 48, 96, 192)
    stem = nn.Conv3d(3, widths[0], (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False)
    stages: list[nn.Module] = [
        nn.Sequential(stem, *_normed(nn.Conv3d(widths[0], widths[0], (5, 1, 1), 1, (2, 0, 0), groups=widths[0], bias=False)))
    ]
    for (before, after), depth in zip(pairwise(widths), depths, strict=True):
        blocks = [_Bottleneck(after if i else before, after, 1 if i else 2, i % 2 == 0) for i in range(depth)]
        stages.append(nn.Sequential(*blocks))
    last = int(2.25 * widths[-1])
    stages.append(nn.Sequential(*_normed(nn.Conv3d(widths[-1], last, 1, bias=False))))
    return Backbone(_Chain(*stages, nn.AdaptiveAvgPool3d(1), nn.Flatten()), last, Takes(3, (1, 1, 1)), tuple(stages))


def x3d_small() -> Backbone:
    """For a CPU: X3D's stages, of one and two blocks."""
    return x3d((1, 2, 2, 1))


AUDIO_BACKBONES: dict[str, Callable[[int], Backbone]] = {
    "small": small_audio,
    "resnet18": _resnet18_audio,
    "resnet18_1d": _resnet18_1d,
}
VIDEO_BACKBONES: dict[str, Callable[[], Backbone]] = {
    "small": small_video,
    "r3d_18": lambda: _resnet(r3d_18(), Takes(3, (1, 1, 1))),
    "r2plus1d_18": lambda: _resnet(r2plus1d_18(), Takes(3, (1, 1, 1))),
    "s3d": _s3d,
    "x3d_s": x3d,
    "x3d_small": x3d_small,
}
