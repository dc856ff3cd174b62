"""Trained encoders in one line, anywhere: no DALI, no data set, no run."""

from __future__ import annotations

import os
from typing import Literal, overload

from torch import Tensor, nn

from cmacc.train.export.prepare import Prepare
from cmacc.train.export.trained import MODALITIES, load_trained
from cmacc.train.networks.encoders import Encoder


class Encoders(nn.Module):
    """The encoders of picture (`video`) and sound (`audio`). Called with inputs of both it gives both embeddings."""

    def __init__(self, video: Encoder, audio: Encoder) -> None:
        super().__init__()
        self.video, self.audio = video, audio

    def forward(self, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, width) of each, float32."""
        return self.video(video), self.audio(audio)


@overload
def load_encoder(path: str | os.PathLike[str]) -> tuple[Encoders, Prepare]: ...
@overload
def load_encoder(path: str | os.PathLike[str], modality: Literal["video", "audio"]) -> tuple[Encoder, Prepare]: ...
def load_encoder(path: str | os.PathLike[str], modality: str | None = None) -> tuple[Encoders | Encoder, Prepare]:
    """Encoders from a folder that `cmacc export` wrote (or its fsspec URL), and what makes their input from media.

    They are in evaluation mode, without gradient (`.requires_grad_()` brings it back). An encoder gives unit vectors (B, width);
    its `features` are what stands before the head, (B, feature_width), for other tasks. modality: only that encoder. A run's
    folder or a checkpoint will do, too, where DALI is installed. Raises ValueError, or CheckpointError, with one sentence.

        encoders, prepare = load_encoder("exports/first")
        encoders.audio(prepare.audio("dog.ogg")) @ encoders.video(prepare.video("dog.mp4")).T
    """
    if modality is not None and modality not in MODALITIES:
        raise ValueError(f"modality is {modality!r}; give 'video' or 'audio', or leave it away for both")
    trained = load_trained(path)
    prepare = Prepare(trained.view)
    if modality is None:
        return Encoders(trained.video, trained.audio).eval(), prepare
    return (trained.video if modality == "video" else trained.audio), prepare
