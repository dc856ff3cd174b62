"""The `reshard` flow: data sets in, another one out, bytes copied and not decoded unless that is asked for."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmacc.flows.progress import progress, table
from cmacc.flows.tracked import tracked
from cmacc.shards.reshard import reshard as copy_clips


@tracked("reshard")
def reshard(
    sources: list[str],
    out: str,
    where: str | None = None,
    order: str = "source",
    shard_mb: float = 256,
    limit: int | None = None,
    split: str | None = None,
    balance: str | None = None,
    dedup: float | None = None,
    diverse: int | None = None,
    embedding: str | None = None,
    members: list[str] | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """See `cmacc.shards.reshard.reshard`; shard_mb is in MiB. Returns what was selected, written, there and left out."""
    if shard_mb <= 0:
        raise ValueError(f"shard_mb is {shard_mb}; give more than 0 MiB")
    with progress("reshard", total=0) as tell:
        done = copy_clips(
            sources, out, where=where, order=order, shard_bytes=round(shard_mb * 2**20), limit=limit, split=split,
            balance=balance, dedup=dedup, diverse=diverse, embedding=embedding, members=members, pick=_pick, workers=workers,
            on_progress=lambda clips, total: tell(clips, "clips", total),
        )  # fmt: skip
    table("reshard-counts", [asdict(done)])
    return asdict(done)


def _pick(vectors: NDArray[np.float32], count: int, seed: int) -> NDArray[np.int64]:
    """The trainer's own k-means++, loaded when it is wanted: it brings torch."""
    from cmacc.train.selection import pick_diverse

    return pick_diverse(vectors, count, seed)
