"""Embeddings of a whole data set, as columns of its catalog."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from cmacc.shards.dataset import Dataset
from cmacc.train.loader import LoaderConfig, evaluation_batches
from cmacc.train.trained import Trained


@torch.no_grad()
def embed_dataset(
    trained: Trained, dataset: Dataset, name: str, loader: LoaderConfig, on_progress: Callable[[int], None] | None = None
) -> tuple[str, str]:
    """Embed every clip by its central view and add columns `video-NAME`, `audio-NAME`, float16 (n, width), unit vectors.

    A clip that does not decode gets NaN. Columns of that name are replaced. Returns their names.
    """
    device = torch.device("cuda" if loader.dali_device == "gpu" else "cpu")
    trained = trained.to(device)
    video = np.full((len(dataset), trained.encoders.width), np.nan, np.float16)
    audio = video.copy()
    done = 0
    for batch in evaluation_batches(dataset, trained.view, loader, dataset.rows()):
        rows, batch = batch.ids.numpy(), batch.to(device)
        video[rows] = trained.video(batch.video).cpu().numpy()
        audio[rows] = trained.audio(batch.audio).cpu().numpy()
        done += len(rows)
        if on_progress:
            on_progress(done)
    names = f"video-{name}", f"audio-{name}"
    for column, values in zip(names, (video, audio), strict=True):
        dataset.catalog.add_column(column, values, attrs={"model": name, "step": trained.step}, replace=True)
    return names
