"""Trained encoders with the constants of their input: out of a checkpoint, into an export, and back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import cmacc
from cmacc.train.checkpoint import find_checkpoint, load_checkpoint
from cmacc.train.config import from_json
from cmacc.train.encoders import Encoder, EncoderConfig, build_encoders
from cmacc.train.graph import FLOOR_DB, PICTURE_MEAN, PICTURE_STD
from cmacc.train.views import ViewConfig

DESCRIPTION = "encoders.json"
WEIGHTS = "encoders.safetensors"


@dataclass(frozen=True)
class Trained:
    """Query encoders in evaluation mode, without gradient. step: of training they come from."""

    video: Encoder
    audio: Encoder
    encoders: EncoderConfig
    view: ViewConfig
    step: int

    def to(self, device: torch.device) -> Trained:
        return Trained(self.video.to(device), self.audio.to(device), self.encoders, self.view, self.step)


def _frozen(encoders: EncoderConfig, weights: dict[str, torch.Tensor], view: ViewConfig, step: int) -> Trained:
    video, audio = build_encoders(encoders)
    for name, encoder in (("video", video), ("audio", audio)):
        encoder.load_state_dict({k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")})
        encoder.eval().requires_grad_(False)
    return Trained(video, audio, encoders, view, step)


def load_trained(path: Path) -> Trained:
    """Encoders from an export folder, a run's folder (its latest checkpoint) or a checkpoint file.

    Raises CheckpointError, or ValueError when an export is damaged.
    """
    if (path / DESCRIPTION).exists():
        return _load_export(path)
    state = load_checkpoint(find_checkpoint(path))
    config = from_json(json.loads(state["config"]))
    return _frozen(config.encoders, state["model"], config.view, int(state["step"]))


def export(trained: Trained, folder: Path) -> Path:
    """Write `encoders.safetensors` and `encoders.json` (architecture, view, input constants) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        f"{name}.{key}": tensor.detach().contiguous()
        for name, encoder in (("video", trained.video), ("audio", trained.audio))
        for key, tensor in encoder.state_dict().items()
    }
    description = {
        "cmacc": cmacc.__version__,
        "step": trained.step,
        "encoders": asdict(trained.encoders),
        "view": asdict(trained.view),
        "input": {"picture_mean": PICTURE_MEAN, "picture_std": PICTURE_STD, "picture_range": 255, "mel_floor_db": FLOOR_DB},
    }
    aside = folder / f".{WEIGHTS}.part"
    save_file(weights, aside)
    aside.rename(folder / WEIGHTS)
    aside = folder / f".{DESCRIPTION}.part"
    aside.write_text(json.dumps(description, indent=2) + "\n")
    aside.rename(folder / DESCRIPTION)
    return folder


def _load_export(folder: Path) -> Trained:
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        encoders = TypeAdapter(EncoderConfig).validate_python(description["encoders"])
        view = TypeAdapter(ViewConfig).validate_python(description["view"])
        return _frozen(encoders, load_file(folder / WEIGHTS), view, int(description["step"]))
    except (KeyError, TypeError, ValueError, RuntimeError, OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder} is not an export this version can load ({reason}); run `cmacc export` again") from error
