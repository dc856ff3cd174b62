"""Encoders for sight and sound: a backbone, a projection head, and the unit sphere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.video import r2plus1d_18, r3d_18


class Backbone(NamedTuple):
    """A network from pixels or log-mel to features of `width` numbers."""

    network: nn.Module
    width: int


def _spatial(inputs: int, outputs: int, size: int, stride: int = 2) -> list[nn.Module]:
    pad = (size - 1) // 2
    conv = nn.Conv3d(inputs, outputs, (1, size, size), (1, stride, stride), (0, pad, pad), bias=False)
    return [conv, nn.BatchNorm3d(outputs), nn.ReLU(inplace=True)]


def _temporal(width: int) -> list[nn.Module]:
    return [nn.Conv3d(width, width, (3, 1, 1), 1, (1, 0, 0), bias=False), nn.BatchNorm3d(width), nn.ReLU(inplace=True)]


def small_video() -> Backbone:
    """For a CPU, a thousandth of R3D-18's work: a strided stem, then factored spatial and temporal convolutions.

    Each clip is standardised first, so that its colour cast and brightness carry nothing.
    """
    widths = (32, 64, 128)
    layers: list[nn.Module] = [nn.InstanceNorm3d(3), *_spatial(3, widths[0], 7, 4)]
    for before, after in pairwise(widths):
        layers += _spatial(before, after, 3) + _temporal(after)
    return Backbone(nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten()), widths[-1])


def small_audio() -> Backbone:
    """For a CPU: four strided convolutions over the log-mel, standardised first, so that its volume carries nothing."""
    widths = (1, 16, 32, 64, 128)
    layers: list[nn.Module] = [nn.InstanceNorm2d(1)]
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return Backbone(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), widths[-1])


def _headless(network: nn.Module) -> Backbone:
    width = network.fc.in_features  # type: ignore[union-attr]
    network.fc = nn.Identity()
    return Backbone(network, int(width))  # type: ignore[arg-type]


def _resnet18_audio() -> Backbone:
    network = resnet18()
    network.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    return _headless(network)


VIDEO_BACKBONES: dict[str, Callable[[], Backbone]] = {
    "small": small_video,
    "r3d_18": lambda: _headless(r3d_18()),
    "r2plus1d_18": lambda: _headless(r2plus1d_18()),
}
AUDIO_BACKBONES: dict[str, Callable[[], Backbone]] = {"small": small_audio, "resnet18": _resnet18_audio}


@dataclass(frozen=True)
class EncoderConfig:
    """video, audio: names of backbones. width: of the embedding. hidden: of the projection head's middle layer."""

    video: str = "r3d_18"
    audio: str = "resnet18"
    width: int = 512
    hidden: int = 512

    def __post_init__(self) -> None:
        for kind, names in (("video", VIDEO_BACKBONES), ("audio", AUDIO_BACKBONES)):
            if getattr(self, kind) not in names:
                raise ValueError(f"encoders.{kind} is {getattr(self, kind)!r}; use one of {', '.join(names)}")
        if self.width < 1 or self.hidden < 1:
            raise ValueError(f"encoders.width is {self.width} and encoders.hidden {self.hidden}; give 1 or more")


class Encoder(nn.Module):
    """Backbone, two-layer projection head, L2 normalisation."""

    def __init__(self, backbone: Backbone, hidden: int, width: int) -> None:
        super().__init__()
        self.backbone = backbone.network
        self.feature_width = backbone.width
        self.head = nn.Sequential(nn.Linear(backbone.width, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, width))

    def features(self, x: Tensor) -> Tensor:
        """What downstream tasks use: (B, feature_width), before the head."""
        features: Tensor = self.backbone(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """x: video (B, 3, frames, size, size) or log-mel (B, 1, bands, steps). Returns unit vectors, (B, width), float32."""
        return torch.nn.functional.normalize(self.head(self.features(x)).float(), dim=1)


def build_encoders(config: EncoderConfig) -> tuple[Encoder, Encoder]:
    """Fresh encoders for video and audio, initialised from torch's global generator."""
    video = Encoder(VIDEO_BACKBONES[config.video](), config.hidden, config.width)
    audio = Encoder(AUDIO_BACKBONES[config.audio](), config.hidden, config.width)
    return video.to(memory_format=torch.channels_last_3d), audio.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
