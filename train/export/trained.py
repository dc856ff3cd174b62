"""Trained encoders with the constants of their input, out of a checkpoint or an export."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from cmacc.shards.place import public_address
from cmacc.train.export.folder import read_export
from cmacc.train.loading.views import ViewConfig
from cmacc.train.networks.encoders import Encoder, EncoderConfig, build_encoders
from cmacc.train.running.checkpoint import CheckpointError, find_checkpoint, load, under

MODALITIES = ("video", "audio")


@dataclass(frozen=True)
class Trained:
    """Query encoders in evaluation mode, without gradient. step: of training they come from; origin: JSON, what is known of that
    training: its checkpoint, configuration, versions, clips seen."""

    video: Encoder
    audio: Encoder
    encoders: EncoderConfig
    view: ViewConfig
    step: int
    origin: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> Trained:
        return Trained(self.video.to(device), self.audio.to(device), self.encoders, self.view, self.step, self.origin)

    @property
    def hash(self) -> str:
        """Hex digest (64) of both encoders' weights and of all that their output depends on: the same for a checkpoint and its
        export, on any device."""
        return digest_of({"encoders": asdict(self.encoders), "view": asdict(self.view)}, self.state())

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors of both, by names that begin with `video.` or `audio.`."""
        return {
            f"{name}.{key}": tensor.detach()
            for name, encoder in (("video", self.video), ("audio", self.audio))
            for key, tensor in encoder.state_dict().items()
        }


def digest_of(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of settings and tensors: their names, types, shapes and values."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_trained(path: str | os.PathLike[str]) -> Trained:
    """Encoders from an export folder, a run's folder (its latest checkpoint), a folder of checkpoints or one checkpoint.

    All of them may be at an fsspec URL. Raises CheckpointError, or ValueError when an export is damaged or of a later format.
    """
    if (exported := read_export(path)) is not None:
        try:
            return _frozen(*exported)
        except (ValueError, RuntimeError) as error:
            raise exported.unusable(error) from error
    from cmacc.train.config import from_json  # DALI comes with it, which an export does without

    found = load(find_checkpoint(path))
    try:
        config = from_json(found.facts["config"])
        origin = {
            "checkpoint": public_address(found.address),
            "saved_at": found.description.get("saved_at"),
            "versions": found.description.get("versions", {}),
            "clips_seen": found.facts.get("loader", {}).get("position"),
            "config": found.facts["config"],
        }
        return _frozen(config.encoders, config.view, found.step, under("model", found.tensors), origin)
    except (KeyError, ValueError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{found.address} has no encoders that this version builds ({reason}); use the version that wrote it, "
            f"cmacc {found.description['versions'].get('cmacc')}"
        ) from error


def _frozen(
    encoders: EncoderConfig, view: ViewConfig, step: int, weights: dict[str, torch.Tensor], origin: dict[str, Any], *_: Any
) -> Trained:
    video, audio = build_encoders(encoders)
    for name, encoder in (("video", video), ("audio", audio)):
        encoder.load_state_dict(under(name, weights))
        encoder.eval().requires_grad_(False)
    return Trained(video, audio, encoders, view, step, origin)
