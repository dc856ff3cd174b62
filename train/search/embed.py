"""Embeddings of a whole data set, as columns of its catalog."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cmacc.shards.dataset import Dataset
from cmacc.shards.place import public_address
from cmacc.shards.publish import publish
from cmacc.train.export.trained import MODALITIES, Trained
from cmacc.train.loading.loader import LoaderConfig, evaluation_batches

SAVE_EVERY_S = 20.0
"""Seconds of work that a stop may cost."""
_DONE = "done.json"


def default_name(model: str | os.PathLike[str]) -> str:
    """What the columns of a model are called: as its run's or its export's folder."""
    path = public_address(os.fspath(model)).rstrip("/")
    path = path.rpartition("/checkpoints")[0] or path
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(path).absolute().name).strip("-.") or "model"


@torch.no_grad()
def embed_dataset(
    trained: Trained,
    dataset: Dataset,
    name: str,
    loader: LoaderConfig,
    on_progress: Callable[[int], None] | None = None,
    *,
    model: str = "",
    scratch: Path | None = None,
) -> tuple[str, str]:
    """Embed every clip by its central view and add columns `video-NAME`, `audio-NAME`, float16 (n, width), unit vectors.

    A clip that does not decode gets NaN. Columns of that name are replaced; their attributes have the hash of the model (`hash`),
    its name, its step, and where it was (`from`: `model`). scratch: where the work is kept until it is done, so that it goes on
    after a stop (default: in the user's cache). Returns the names of the columns. Raises DatasetError, ValueError when another
    process does the same, OSError.
    """
    device = torch.device("cuda" if loader.dali_device == "gpu" else "cpu")
    trained = trained.to(device)
    of = {"hash": trained.hash, "data": dataset.fingerprint, "url": dataset.url}
    folder = (scratch or _cache()) / hashlib.sha256(json.dumps(of).encode()).hexdigest()[:32]
    columns = {modality: f"{modality}-{name}" for modality in MODALITIES}
    with _alone(folder):
        work = _Work(folder, len(dataset), trained.encoders.width, of)
        if on_progress:
            on_progress(work.done)
        saved = time.monotonic()
        for batch in evaluation_batches(dataset, trained.view, loader, dataset.rows()[work.done :]):
            rows, batch = batch.ids.numpy(), batch.to(device)
            work.put(rows, {"video": trained.video(batch.video).cpu().numpy(), "audio": trained.audio(batch.audio).cpu().numpy()})
            if time.monotonic() - saved >= SAVE_EVERY_S:
                work.save()
                saved = time.monotonic()
            if on_progress:
                on_progress(work.done)
        work.finish()
        if on_progress:
            on_progress(work.done)
        about = {"model": name, "hash": trained.hash, "step": trained.step, "from": _found_again(model)}
        for modality, column in columns.items():
            dataset.catalog.add_column(column, work.arrays[modality], attrs=about, replace=True)
        shutil.rmtree(folder)
    return columns["video"], columns["audio"]


def _found_again(model: str) -> str:
    """An address that holds wherever the search is begun."""
    return public_address(model) if "://" in model or not model else str(Path(model).absolute())


class _Work:
    """Embeddings so far, in files: of rows before `done`, which are finished; those that were left out are NaN."""

    def __init__(self, folder: Path, rows: int, width: int, of: dict[str, str]) -> None:
        self.folder, self.rows, self.of = folder, rows, of
        self.done = self._kept()
        mode: Any = "r+" if self.done else "w+"
        self.arrays: dict[str, NDArray[np.float16]] = {
            name: np.lib.format.open_memmap(folder / f"{name}.npy", mode, np.float16, (rows, width)) for name in MODALITIES
        }

    def _kept(self) -> int:
        try:
            kept = json.loads((self.folder / _DONE).read_text())
            return int(kept["done"]) if kept["of"] == self.of else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def put(self, rows: NDArray[np.int64], vectors: dict[str, NDArray[np.float32]]) -> None:
        """rows: ascending, all from `done` on."""
        for name, found in vectors.items():
            self.arrays[name][self.done : rows[-1] + 1] = np.nan
            self.arrays[name][rows] = found
        self.done = int(rows[-1]) + 1

    def save(self) -> None:
        for array in self.arrays.values():
            array.flush()  # type: ignore[attr-defined]
        publish(self.folder / _DONE, json.dumps({"done": self.done, "of": self.of}).encode())

    def finish(self) -> None:
        for array in self.arrays.values():
            array[self.done :] = np.nan
        self.done = self.rows


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cmacc" / "embed"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError("another process embeds this data set with this model; wait for it") from error
        yield
