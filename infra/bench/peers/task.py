"""What every way of loading is given and must make: the views of a data set's clips, as batches of tensors.

What follows the loader's own interface, so that all ways are asked for the same frames, is `wanted` and `decode_stage` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchaudio
from torch import Tensor

from cmacc.train.loading.frames import decode_frames
from cmacc.train.loading.loader import LoaderConfig
from cmacc.train.loading.views import ClipShape, ViewConfig, training_views

MEAN, STD = 0.45 * 255, 0.225 * 255


@dataclass(frozen=True)
class Job:
    """data: folder of the data set. batch: clips. threads: that may work at the same time."""

    data: str
    view: ViewConfig
    batch: int = 32
    threads: int = 2


@dataclass(frozen=True)
class Wanted:
    """One view of a clip. frames: their numbers, ascending. crop: (top, left, height, width), pixels, even.

    sound_s: where its sound begins, and samples: how long it is. gain: factor on the sound.
    """

    frames: list[int]
    crop: tuple[int, int, int, int]
    size: int
    mirror: bool
    brightness: float
    contrast: float
    saturation: float
    sound_s: float
    samples: int
    gain: float


def wanted(config: ViewConfig, epoch: int, key: str, facts: dict[str, Any]) -> Wanted:
    """The view that the loader takes of the clip `key` in `epoch` with the seed 0. facts: of the clip's json member."""
    shape = ClipShape(key, int(facts["n_frames"]), float(facts["fps"]), int(facts["width"]), int(facts["height"]))
    view = training_views(config, 0, epoch, shape)[0]
    return Wanted(
        frames=np.minimum(config.frame_numbers(view.start_frame, shape.fps), shape.n_frames - 1).tolist(),
        crop=view.crop,
        size=config.size,
        mirror=view.mirror,
        brightness=view.brightness,
        contrast=view.contrast,
        saturation=view.saturation,
        sound_s=view.sound_s,
        samples=round(config.view_s * config.audio_rate),
        gain=view.gain,
    )


def decode_stage(video: bytes, view: Wanted) -> None:
    """The loader's own decoding of a view, to the output size."""
    decode_frames(video, np.array(view.frames), crop=view.crop, size=view.size, deblock=LoaderConfig.deblock)


def finish(frames: Tensor, view: Wanted) -> Tensor:
    """uint8 (F, 3, size, size) to float32 (3, F, size, size): flipped, its colours changed, normalised.

    Brightness, contrast and saturation are one matrix and the clamp moves behind the normalising: two passes over the picture,
    a third of the time that torchvision's functions take one after another.
    """
    grey = torch.tensor([0.299, 0.587, 0.114]).expand(3, 3)
    colours = view.saturation * torch.eye(3) + (1 - view.saturation) * grey
    colours = colours * (view.brightness * view.contrast / STD)
    bias = (view.brightness * (1 - view.contrast) * 127.5 - MEAN) / STD
    if view.mirror:
        frames = frames.flip(-1)
    picture = frames.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    done = torch.addmm(torch.full((3, 1), bias), colours, picture.reshape(3, -1))
    return done.clamp_(-MEAN / STD, (255 - MEAN) / STD).view(3, *picture.shape[1:])


class LogMel:
    """Sound to normalised log-mel with torchaudio: float32 (samples,) to (1, bands, steps)."""

    def __init__(self, config: ViewConfig) -> None:
        self.config = config
        self.mel = torchaudio.transforms.MelSpectrogram(
            config.audio_rate, n_fft=config.n_fft, win_length=config.window, hop_length=config.hop,
            f_min=config.mel_low_hz, f_max=config.mel_high_hz, n_mels=config.n_mels,
        )  # fmt: skip

    def __call__(self, sound: Tensor) -> Tensor:
        decibels = 10 * self.mel(sound).clamp_min_(1e-10).log10_()
        return ((decibels - self.config.mel_mean_db) / self.config.mel_std_db)[None]
