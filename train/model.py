"""The four encoders and their memory, as one module: one `state_dict` holds everything that learns or remembers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmacc.train.encoders import EncoderConfig, build_encoders
from cmacc.train.loader import Batch
from cmacc.train.momentum import key_encoder, momentum_update
from cmacc.train.objective import Contrast, Memory, ObjectiveConfig, after_step, contrast
from cmacc.train.rings import Entries


class CrossModal(nn.Module):
    """f_v, f_a: query encoders `video`, `audio`. h_v, h_a: key encoders `key_video`, `key_audio`. Memory: see `objective`."""

    def __init__(self, encoders: EncoderConfig, objective: ObjectiveConfig) -> None:
        super().__init__()
        self.objective = objective
        self.video, self.audio = build_encoders(encoders)
        self.key_video, self.key_audio = key_encoder(self.video), key_encoder(self.audio)
        self.memory = Memory(objective, encoders.width)

    def learned(self) -> list[nn.Parameter]:
        return [*self.video.parameters(), *self.audio.parameters()]

    def forward(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Contrast, Tensor, Tensor, Entries, Entries]:
        """Steps 1 to 3 of METHOD: queries (M, d) with gradient, keys without, selection, loss."""
        q_video, q_audio = self.video(batch.video), self.audio(batch.audio)
        if self.objective.uses_keys:
            with torch.no_grad():
                keys = self.key_video(batch.video), self.key_audio(batch.audio)
        else:
            keys = q_video, q_audio
        born = torch.full_like(batch.ids, step)
        k_video, k_audio = (Entries(k, batch.ids, batch.sources, batch.labels, born) for k in keys)
        result = contrast(q_video, q_audio, k_video, k_audio, self.memory, self.objective, step, generator)
        return result, q_video, q_audio, k_video, k_audio

    @torch.no_grad()
    def after_step(self, result: Contrast, k_video: Entries, k_audio: Entries) -> None:
        """Steps 4 and 5 of METHOD: move the key encoders, let the batch's keys into dictionaries and pools."""
        if self.objective.uses_keys:
            momentum_update(self.key_video, self.video, self.objective.momentum)
            momentum_update(self.key_audio, self.audio, self.objective.momentum)
            after_step(self.memory, result, k_video, k_audio)
