"""Small data sets and settings for the tests of the train room."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from media import make_clip, tiny_profile

from cmacc.shards.clip import Clip
from cmacc.shards.dataset import Dataset
from cmacc.shards.profile import Profile
from cmacc.shards.writer import DatasetWriter
from cmacc.train.config import OptimiserConfig, PretrainConfig
from cmacc.train.contrast.objective import ObjectiveConfig
from cmacc.train.loading.loader import LoaderConfig
from cmacc.train.loading.views import ViewConfig
from cmacc.train.networks.encoders import EncoderConfig
from cmacc.train.running.checkpointer import CheckpointConfig

# Two cores are shared with others; and sums taken by other numbers of threads differ in their last bits.
torch.set_num_threads(1)

VIEW = ViewConfig(frames=4, view_s=0.5, size=24, audio_rate=8000, n_fft=256, window=256, hop=128, n_mels=16, mel_high_hz=4000.0)
LOADER = LoaderConfig(batch=4, device="cpu", threads=2, ahead=1, streams=2, window=8)
TINY = PretrainConfig(
    steps=12,
    log_every=1,
    eval_every=6,
    checkpoint=CheckpointConfig(steps=3, minutes=0),
    view=VIEW,
    loader=LOADER,
    encoders=EncoderConfig(video="small", audio="small", width=16, hidden=16),
    objective=ObjectiveConfig(dictionary=10, candidates=32, tau=0.2, momentum=0.9, share=1.0),
    optimiser=OptimiserConfig(rate=1e-3, warmup=3, cosine=True, weight_decay=1e-4),
)
TRAIN_CLIPS, EVAL_CLIPS = 16, 6


def clips() -> list[Clip]:
    """16 clips of split train, then 6 of eval, of 8 sources and of 3; 3 labels."""
    splits = ["train"] * TRAIN_CLIPS + ["eval"] * EVAL_CLIPS
    return [make_clip(i, labels=(f"label {i % 3}",), split=split, seconds=1.0 + i % 3 / 2) for i, split in enumerate(splits)]


def write_dataset(path: Path, these: Iterable[Clip], profile: Profile | None = None, per_shard: int = 8) -> Dataset:
    with DatasetWriter(path, profile or tiny_profile()) as writer:
        for i, clip in enumerate(these):
            if i and i % per_shard == 0:
                writer.cut()
            writer.add(clip)
    return Dataset.open(path)


def with_members(clip: Clip, **members: bytes) -> Clip:
    """`clip` with other bytes in some members, e.g. `flac=b"..."`."""
    return dataclasses.replace(clip, members={**clip.members, **members})


def damaged(sound: bytes) -> bytes:
    """With noise near its end, which FFmpeg decodes without a word and DALI does not."""
    return sound[:-40] + np.random.default_rng(0).bytes(20) + sound[-20:]


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random unit vectors along the last axis, float32."""
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)
