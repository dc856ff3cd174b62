"""An export as files: weights of each encoder as safetensors, and one JSON with all that is needed to use them. No code is in it.

    video.safetensors, audio.safetensors   weights
    encoders.json                          written last: format, architecture, view, constants of the input, versions, origin,
                                           and size and sha256 of each file of weights

The first format had one file for both, `encoders.safetensors`; it is still read.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError

from cmacc.shards.options import from_json
from cmacc.shards.place import Place, place, public_address
from cmacc.train.loading.constants import FLOOR_DB, PICTURE_MEAN, PICTURE_STD
from cmacc.train.loading.views import ViewConfig
from cmacc.train.networks.encoders import EncoderConfig

if TYPE_CHECKING:
    from cmacc.train.export.trained import Trained

FORMAT = 2
DESCRIPTION = "encoders.json"
WEIGHTS = {"video": "video.safetensors", "audio": "audio.safetensors"}
_FIRST_WEIGHTS = "encoders.safetensors"
_PACKAGES = ("cmacc", "torch", "torchvision", "torchaudio", "av", "safetensors")
_INPUT = {"picture_mean": PICTURE_MEAN, "picture_std": PICTURE_STD, "picture_range": 255, "mel_floor_db": FLOOR_DB}
_WORDS = {
    "video": "RGB, (B, 3, frames, size, size): the largest square in the middle, scaled bilinearly with averaging, then "
    "(picture 0..255 - picture_mean) / picture_std; frames at `frames` instants evenly spaced over view_s seconds",
    "audio": "(B, 1, n_mels, steps): mono of -1..1 at audio_rate Hz, Hann window in the middle of n_fft, frames centred and "
    "edges reflected, power, HTK mel triangles of height 1, 10 log10 with floor mel_floor_db, (dB - mel_mean_db) / mel_std_db",
}


class Exported(NamedTuple):
    """What an export holds. weights: by names that begin with `video.` or `audio.`; url: where it lies."""

    encoders: EncoderConfig
    view: ViewConfig
    step: int
    weights: dict[str, torch.Tensor]
    origin: dict[str, Any]
    url: str

    def unusable(self, error: Exception) -> ValueError:
        return _unusable(self.url, error)


def write_export(trained: Trained, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Write weights and JSON into a folder or an fsspec URL, each whole or not at all, the JSON last; returns what it says.

    An export that was there is replaced. Raises OSError, DatasetError for an address that is not known.
    """
    there, files = place(folder), {}
    for name, file in WEIGHTS.items():
        state = {k.removeprefix(f"{name}."): t.cpu().contiguous() for k, t in trained.state().items() if k.startswith(f"{name}.")}
        data = safetensors.torch.save(state)
        there.publish(file, data)
        files[file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content = {
        "format": FORMAT,
        "hash": trained.hash,
        "step": trained.step,
        "encoders": asdict(trained.encoders),
        "view": asdict(trained.view),
        "input": {**_INPUT, **_WORDS},
        "features": {"video": trained.video.feature_width, "audio": trained.audio.feature_width},
        "files": files,
        "versions": _versions(),
        "origin": trained.origin,
    }
    there.publish(DESCRIPTION, json.dumps(content, indent=2).encode() + b"\n")
    there.remove(_FIRST_WEIGHTS)
    return content


def read_export(folder: str | os.PathLike[str]) -> Exported | None:
    """What lies there, checked, or None where there is no export.

    Raises ValueError with a sentence for one that is damaged, or of a later format.
    """
    try:
        there = place(folder)
        raw = there.read(DESCRIPTION)
    except Exception:  # each kind of bucket has errors of its own; whoever looks for a checkpoint there next tells of them
        return None
    try:
        content = json.loads(raw)
        form = content.get("format", 1)
        if isinstance(form, int) and form > FORMAT:
            raise _Later(form, str(content.get("versions", {}).get("cmacc", "a later one")))
        encoders = from_json(EncoderConfig, content["encoders"])
        view = from_json(ViewConfig, content["view"])
        weights = _weights(there, content["files"]) if form != 1 else safetensors.torch.load(there.read(_FIRST_WEIGHTS))
        return Exported(encoders, view, int(content["step"]), weights, dict(content.get("origin", {})), there.url)
    except _Later as later:
        said = f"{public_address(there.url)} is an export of format {later.args[0]}, made by cmacc {later.args[1]}"
        raise ValueError(
            f"{said}; this version reads {FORMAT} and before: install that one, or export again with this one"
        ) from None
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise _unusable(there.url, error) from error


class _Later(Exception):
    """Format and version of an export that this version is too old for."""


def _weights(there: Place, files: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, file in WEIGHTS.items():
        data, stated = there.read(file), files[file]["sha256"]
        if hashlib.sha256(data).hexdigest() != stated:
            raise ValueError(f"{file} is not the one that {DESCRIPTION} is of")
        found |= {f"{name}.{key}": tensor for key, tensor in safetensors.torch.load(data).items()}
    return found


def _unusable(url: str, error: Exception) -> ValueError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ValueError(f"{public_address(url)} is not an export this version can load ({reason}); run `cmacc export` again")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
