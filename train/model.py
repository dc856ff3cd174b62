"""The four encoders and their memory, as one module: one `state_dict` holds everything that learns or remembers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmacc.train.contrast.objective import Memory, ObjectiveConfig
from cmacc.train.networks.encoders import Encoder, EncoderConfig, build_encoders
from cmacc.train.networks.momentum import key_encoder, momentum_update


class CrossModal(nn.Module):
    """f_v, f_a: query encoders `video`, `audio`. h_v, h_a: key encoders `key_video`, `key_audio`. Memory: see `objective`."""

    def __init__(self, encoders: EncoderConfig, objective: ObjectiveConfig) -> None:
        super().__init__()
        self.objective = objective
        self.video, self.audio = build_encoders(encoders)
        self.key_video, self.key_audio = key_encoder(self.video), key_encoder(self.audio)
        self.memory = Memory(objective, encoders.width)

    def learned(self) -> dict[str, nn.Parameter]:
        """By the names of `state_dict`."""
        return {name: p for name, p in self.named_parameters() if name.startswith(("video.", "audio."))}

    def encoders(self) -> dict[str, Encoder]:
        return {name: getattr(self, name) for name in ("video", "audio", "key_video", "key_audio")}

    def statistics(self) -> list[Tensor]:
        """Running statistics of all BatchNorms: what a forward pass changes."""
        return [buffer for encoder in self.encoders().values() for buffer in encoder.buffers() if buffer.is_floating_point()]

    @torch.no_grad()
    def move_keys(self) -> None:
        """Step 4 of METHOD: theta_k <- m theta_k + (1 - m) theta_q."""
        if self.objective.uses_keys:
            momentum_update(self.key_video, self.video, self.objective.momentum)
            momentum_update(self.key_audio, self.audio, self.objective.momentum)


class Both(nn.Module):
    """Two encoders as one module with one forward pass, which is what DistributedDataParallel wraps."""

    def __init__(self, video: Encoder, audio: Encoder) -> None:
        super().__init__()
        self.video, self.audio = video, audio

    def forward(self, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Unit vectors (m, d) of pictures and sounds, then the inputs (m, h) of the two heads' last layers."""
        unit_video, last_video = self.video.project(self.video.features(video))
        unit_audio, last_audio = self.audio.project(self.audio.features(audio))
        return unit_video, unit_audio, last_video, last_audio
