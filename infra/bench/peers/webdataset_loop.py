"""Re-sharding as one does it with the webdataset library: read every sample, keep those whose facts fit, shuffle, write."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import webdataset


def webdataset_loop(source: Path, out: Path, fits: Callable[[dict[str, Any]], bool], shard_bytes: int) -> int:
    """Bytes written. The shuffle is webdataset's own, inside a buffer of 1,000 samples; nothing is verified or hashed."""
    out.mkdir(parents=True)
    shards = [str(p) for p in sorted(source.glob("*.tar"))]
    samples = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=1).shuffle(1000)
    with webdataset.ShardWriter(str(out / "clips-%06d.tar"), maxcount=1 << 40, maxsize=shard_bytes, verbose=0) as writer:
        for sample in samples:
            if fits(json.loads(sample["json"])):
                writer.write({k: v for k, v in sample.items() if k == "__key__" or not k.startswith("__")})
    os.sync()
    return sum(p.stat().st_size for p in out.glob("*.tar"))
