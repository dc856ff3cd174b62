"""Frozen features of labelled files, each computed once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmacc.train.evaluation.examples import Examples
from cmacc.train.evaluation.kept import Kept
from cmacc.train.evaluation.labelled import Labelled
from cmacc.train.export.trained import digest_of
from cmacc.train.loading.graph import FLOOR_DB, PICTURE_MEAN, PICTURE_STD
from cmacc.train.networks.encoders import Encoder

Features = NDArray[np.float32]
Progress = Callable[[int], None]
INPUT = [PICTURE_MEAN, PICTURE_STD, FLOOR_DB]
"""Of an encoder, beside its view: on this, too, features depend."""


@dataclass(frozen=True)
class Describer:
    """From views of some files, as `Examples.central` gives them, to their features (b, width). key: what it depends on."""

    name: str
    key: str
    width: int
    of: Callable[[Tensor], Tensor]


def of_encoder(name: str, encoder: Encoder, batch: int, device: torch.device) -> Describer:
    """The mean over views of the encoder's features, computed `batch` views at a time."""
    encoder = encoder.to(device).eval()

    @torch.inference_mode()
    def of(views: Tensor) -> Tensor:
        each = views.flatten(0, 1)
        layout = torch.channels_last_3d if each.ndim == 5 else torch.preserve_format
        parts = [encoder.features(part.to(device, memory_format=layout, non_blocking=True)) for part in each.split(batch)]
        return torch.cat(parts).float().unflatten(0, views.shape[:2]).mean(1)

    return Describer(name, fingerprint(encoder), encoder.feature_width, of)


def fingerprint(module: torch.nn.Module) -> str:
    """A hash of its weights and buffers, whatever the device."""
    return digest_of({}, module.state_dict())


def extract(
    examples: Examples,
    describers: Sequence[Describer],
    views: int,
    crops: int,
    cache: Path | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Features]:
    """Features of all files by each describer, (n, width), in one pass over the files that are not in the cache yet.

    Rows of files that do not decode are NaN; they are tried again each time, so `examples.left_out` always has them.
    Raises ValueError when a describer gives what is no number.
    """
    labelled = examples.labelled
    crops = 1 if labelled.kind == "audio" else crops
    about = {"view": asdict(examples.view), "views": views, "crops": crops, "input": INPUT}
    kept = {d.name: KeptOfFiles(cache, labelled, d.width, {"describer": d.key, "name": d.name, **about}) for d in describers}
    missing = np.flatnonzero(np.any([each.missing() for each in kept.values()], axis=0))
    for each in kept.values():
        examples.facts |= each.facts()
    done = len(labelled.files) - len(missing)
    for rows, made in examples.central(missing.tolist(), views, crops) if len(missing) else ():
        for describer in describers:
            if not kept[describer.name].missing()[rows].any():
                continue
            features = describer.of(made).cpu().numpy()
            if not np.isfinite(features).all():
                said = f"features of {labelled.file_name(int(rows[0]))} by the {describer.name} encoder are no finite numbers"
                raise ValueError(f"{said}; evaluate an earlier checkpoint, or train it anew with a lower optimiser.rate")
            kept[describer.name].add(rows, features, examples.facts)
        if on_progress:
            on_progress(done + int(np.searchsorted(missing, rows[-1], side="right")))
    return {name: each.features() for name, each in kept.items()}


class KeptOfFiles(Kept):
    """Features of a data set's files, with the facts of each. about: all that they depend on but for the files."""

    def __init__(self, cache: Path | None, labelled: Labelled, width: int, about: Mapping[str, Any]) -> None:
        about = {"files": files_fingerprint(labelled), **about}
        super().__init__(cache, len(labelled.files), width + 2, labelled.name, about)

    def facts(self) -> dict[int, tuple[float, float]]:
        there = np.flatnonzero(~self.missing())
        return {int(row): (float(self._made[row, -2]), float(self._made[row, -1])) for row in there}

    def add(self, rows: NDArray[np.int64], features: Features, facts: Mapping[int, tuple[float, float]]) -> None:
        self.put(rows, np.column_stack([features, np.array([facts[row] for row in rows.tolist()], np.float32)]))

    def features(self) -> Features:
        """(n, width), written too."""
        return self.close()[:, :-2]


def files_fingerprint(labelled: Labelled) -> str:
    """Of names, sizes and times of all files."""
    digest = hashlib.sha256()
    for row, path in enumerate(labelled.files):
        about = path.stat() if path.exists() else os.stat_result([0] * 10)
        digest.update(f"{labelled.file_name(row)}\0{about.st_size}\0{about.st_mtime_ns}\0".encode())
    return digest.hexdigest()
