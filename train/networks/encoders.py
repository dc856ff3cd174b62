"""Encoders for sight and sound: a backbone, a projection head, and the unit sphere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from cmacc.train.networks.backbones import AUDIO_BACKBONES, VIDEO_BACKBONES, Backbone
from cmacc.train.networks.batchnorm import to_group_norm

Norm = Literal["batch", "group"]


@dataclass(frozen=True)
class EncoderConfig:
    """video, audio: names of backbones (see `backbones`). width: of the embedding.

    head_layers: linear layers of the projection head, with ReLU between them. hidden: width of those before the last.
    head_norm: a BatchNorm before each of its ReLUs. norm: "batch", or "group": every BatchNorm is a GroupNorm, so that the
    clips of a batch do not meet inside the encoder. bands: of the log-mel, which `resnet18_1d` takes as channels: `view.n_mels`.
    """

    video: str = "r3d_18"
    audio: str = "resnet18"
    width: int = 512
    hidden: int = 512
    head_layers: int = 2
    head_norm: bool = False
    norm: Norm = "batch"
    bands: int = 80

    def __post_init__(self) -> None:
        for kind, names in (("video", VIDEO_BACKBONES), ("audio", AUDIO_BACKBONES)):
            if getattr(self, kind) not in names:
                raise ValueError(f"encoders.{kind} is {getattr(self, kind)!r}; use one of {', '.join(names)}")
        if self.norm not in get_args(Norm):
            raise ValueError(f"encoders.norm is {self.norm!r}; use one of {', '.join(get_args(Norm))}")
        for name in ("width", "hidden", "head_layers", "bands"):
            if getattr(self, name) < 1:
                raise ValueError(f"encoders.{name} is {getattr(self, name)}; give 1 or more")


def projection_head(inputs: int, config: EncoderConfig) -> nn.Sequential:
    """`head_layers` linear layers from `inputs` numbers to `width`; one layer is the linear head of MoCo v1."""
    layers: list[nn.Module] = []
    for _ in range(config.head_layers - 1):
        layers.append(nn.Linear(inputs, config.hidden))
        if config.head_norm:
            layers.append(nn.BatchNorm1d(config.hidden))
        layers.append(nn.ReLU(inplace=True))
        inputs = config.hidden
    return nn.Sequential(*layers, nn.Linear(inputs, config.width))


class Encoder(nn.Module):
    """Backbone, projection head, L2 normalisation.

    stages: parts of the backbone, one after the other, which together hold most of what its forward pass remembers.
    """

    def __init__(self, backbone: Backbone, config: EncoderConfig) -> None:
        super().__init__()
        self.backbone = backbone.network
        self.feature_width, self.stages, self.takes = backbone.width, backbone.stages, backbone.takes
        self.head = projection_head(backbone.width, config)
        if config.norm == "group":
            to_group_norm(self)

    def features(self, x: Tensor) -> Tensor:
        """What downstream tasks use: (B, feature_width), before the head. Raises ValueError for a shape it cannot take."""
        if (wrong := self.takes.wrong(x.shape)) is not None:
            raise ValueError(wrong)
        features: Tensor = self.backbone(x)
        return features

    def project(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The embedding, unit vectors (B, width) float32, and the input of the head's last linear layer, (B, hidden)."""
        *hidden, last = self.head
        for layer in hidden:
            features = layer(features)
        return nn.functional.normalize(last(features).float(), dim=1), features

    def forward(self, x: Tensor) -> Tensor:
        """x: video (B, 3, frames, size, size) or log-mel (B, 1, bands, steps). Returns unit vectors, (B, width), float32."""
        return self.project(self.features(x))[0]


def build_encoders(config: EncoderConfig) -> tuple[Encoder, Encoder]:
    """Fresh encoders for video and audio, initialised from torch's global generator."""
    video = Encoder(VIDEO_BACKBONES[config.video](), config)
    audio = Encoder(AUDIO_BACKBONES[config.audio](config.bands), config)
    return video.to(memory_format=torch.channels_last_3d), audio.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
