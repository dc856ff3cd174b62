"""Frozen features of labelled files, kept in a Zarr group so that each is computed once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor
from zarr.codecs import Crc32cCodec, ZstdCodec

from cmacc.train.evaluation.examples import Examples
from cmacc.train.evaluation.labelled import Labelled
from cmacc.train.export.trained import digest_of
from cmacc.train.loading.graph import FLOOR_DB, PICTURE_MEAN, PICTURE_STD
from cmacc.train.networks.encoders import Encoder

log = logging.getLogger(__name__)

Features = NDArray[np.float32]
Progress = Callable[[int], None]

_VERSION = 2
"""Of how files become features: to be raised when the same encoder gives others."""
_ROWS = 256  # of a chunk, which is written when it is whole


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
    about = {"view": asdict(examples.view), "views": views, "crops": crops, "input": [PICTURE_MEAN, PICTURE_STD, FLOOR_DB]}
    kept = {d.name: Kept(cache, labelled, d.width, {"describer": d.key, "name": d.name, **about}) for d in describers}
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
            kept[describer.name].put(rows, features, examples.facts)
        if on_progress:
            on_progress(done + int(np.searchsorted(missing, rows[-1], side="right")))
    return {name: each.close() for name, each in kept.items()}


class Kept:
    """Features (n, width) and facts (n, 2) of a data set's files, NaN where there are none yet; on a disk if `cache` is given.

    A chunk of rows is written when it is whole, by a rename, with its checksum: a kill costs what came after the last one.
    about: all that they depend on but for the files.
    """

    def __init__(self, cache: Path | None, labelled: Labelled, width: int, about: Mapping[str, Any]) -> None:
        n = len(labelled.files)
        self._made = np.full((n, width + 2), np.nan, np.float32)
        self._next = 0  # first row that is not written
        self._stored: Any = None
        if cache is not None:
            self._stored = _opened(cache, labelled, self._made.shape, about)
            self._made[:] = _checked(self._stored, cache)
        self._new = False

    def missing(self) -> NDArray[np.bool_]:
        return np.asarray(np.isnan(self._made).any(axis=1))

    def facts(self) -> dict[int, tuple[float, float]]:
        there = np.flatnonzero(~self.missing())
        return {int(row): (float(self._made[row, -2]), float(self._made[row, -1])) for row in there}

    def put(self, rows: NDArray[np.int64], features: Features, facts: Mapping[int, tuple[float, float]]) -> None:
        """rows: ascending from call to call."""
        self._made[rows, :-2] = features
        self._made[rows, -2:] = [facts[row] for row in rows.tolist()]
        self._new = True
        if (whole := int(rows[-1]) // _ROWS * _ROWS) > self._next:
            self._write(whole)

    def close(self) -> Features:
        if self._new:
            self._write(len(self._made))
        return self._made[:, :-2]

    def _write(self, stop: int) -> None:
        if self._stored is not None:
            self._stored[self._next : stop] = self._made[self._next : stop]
        self._next = stop


def _opened(cache: Path, labelled: Labelled, shape: tuple[int, int], about: Mapping[str, Any]) -> Any:
    about = {"version": _VERSION, "files": files_fingerprint(labelled), **about}
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
    cache.mkdir(parents=True, exist_ok=True)
    group = zarr.open_group(cache, mode="a", zarr_format=3)
    try:
        found = group[key]
        if isinstance(found, zarr.Array) and found.shape == shape:
            return found
    except (KeyError, ValueError):  # ValueError: what describes it is cut
        pass
    return group.create_array(
        key, shape=shape, chunks=(_ROWS, shape[1]), dtype="float32", fill_value=np.nan, overwrite=True,
        compressors=(ZstdCodec(), Crc32cCodec()), attributes={"task": labelled.name, **about},
    )  # fmt: skip


def _checked(stored: Any, cache: Path) -> Features:
    """What is stored; a chunk that is damaged counts as not there."""
    made = np.full(stored.shape, np.nan, np.float32)
    for first in range(0, len(made), _ROWS):
        try:
            made[first : first + _ROWS] = stored[first : first + _ROWS]
        except (ValueError, RuntimeError, OSError) as error:
            log.warning("a part of %s is damaged (%s); it is computed again", cache, error)
    return made


def files_fingerprint(labelled: Labelled) -> str:
    """Of names, sizes and times of all files."""
    digest = hashlib.sha256()
    for row, path in enumerate(labelled.files):
        about = path.stat() if path.exists() else os.stat_result([0] * 10)
        digest.update(f"{labelled.file_name(row)}\0{about.st_size}\0{about.st_mtime_ns}\0".encode())
    return digest.hexdigest()
