"""The `reshard` flow: data sets in, another one out, bytes copied and not decoded unless that is asked for."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ByteSize, TypeAdapter, ValidationError

from cmacc.flows.progress import progress, table
from cmacc.flows.tracked import tracked
from cmacc.shards.reshard import reshard as copy_clips


@tracked("reshard")
def reshard(
    sources: list[str],
    out: str,
    where: str | None = None,
    order: str = "source",
    shard_size: str = "256MiB",
    limit: int | None = None,
    split: str | None = None,
    balance: str | None = None,
    dedup: float | None = None,
    diverse: int | None = None,
    embedding: str | None = None,
    members: list[str] | None = None,
    transcode: str | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """See `cmacc.shards.reshard.reshard`. Returns what was selected, written, there and left out.

    shard_size: `512MB`, `256MiB`. transcode: a profile that the clips shall have, e.g. `h264` or `h264:short_side=112,fps=16`.
    """
    shard_bytes = parse_size(shard_size)
    encode: dict[str, Any] = {}
    if transcode is not None:
        from cmacc.flows.transcoding import parse_profile, transcoder

        profile = parse_profile(transcode)
        encode = {"profile": profile, "transcode": transcoder(profile, workers)}
    with progress("reshard", total=0) as tell:
        done = copy_clips(
            sources, out, where=where, order=order, shard_bytes=shard_bytes, limit=limit, split=split,
            balance=balance, dedup=dedup, diverse=diverse, embedding=embedding, members=members, pick=_pick, workers=workers,
            **encode,
            on_progress=lambda clips, total: tell(clips, "clips", total),
        )  # fmt: skip
    table("reshard-counts", [asdict(done)])
    return asdict(done)


def parse_size(text: str) -> int:
    """`512MB` (millions of bytes), `256MiB` (2^20 of them) or plain bytes, as a number of bytes. Raises ValueError."""
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = 0
    if size < 1:
        raise ValueError(f"size {text!r} is not understood; write it as 512MB, 256MiB or a number of bytes")
    return size


def _pick(vectors: NDArray[np.float32], count: int, seed: int) -> NDArray[np.int64]:
    """The trainer's own k-means++, loaded when it is wanted: it brings torch."""
    from cmacc.train.contrast.selection import pick_diverse

    return pick_diverse(vectors, count, seed)
