"""The `reshard` flow: data sets in, another one out, bytes copied and not decoded."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cmacc.flows.progress import progress, table
from cmacc.flows.tracked import tracked
from cmacc.shards.reshard import reshard as copy_clips


@tracked("reshard")
def reshard(
    sources: list[str],
    out: str,
    where: str | None = None,
    order: str = "source",
    shard_mb: int = 256,
    limit: int | None = None,
    split: str | None = None,
    members: list[str] | None = None,
) -> dict[str, Any]:
    """See `cmacc.shards.reshard.reshard`; shard_mb is in MiB. Returns what was selected, written, there and left out."""
    if shard_mb < 1:
        raise ValueError(f"shard_mb is {shard_mb}; give 1 or more MiB")
    written = 0
    with progress("reshard", total=limit or 0) as tell:

        def committed(_: str, keys: list[str]) -> None:
            nonlocal written
            written += len(keys)
            tell(written, "clips")

        done = copy_clips(
            sources, out, where=where, order=order, shard_bytes=shard_mb << 20, limit=limit, split=split, members=members,
            on_commit=committed,
        )  # fmt: skip
    table("reshard-counts", [asdict(done)])
    return asdict(done)
