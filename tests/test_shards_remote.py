"""Data sets in a bucket and behind HTTP: written, read and continued over real sockets of 127.0.0.1."""

from __future__ import annotations

from pathlib import Path

import pytest
from media import make_clip, tiny_profile

from cmacc.shards.clip import Clip
from cmacc.shards.dataset import Dataset
from cmacc.shards.writer import DatasetWriter

N = 8
SHARD_BYTES = 50_000


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [make_clip(i) for i in range(N)]


def write(url: str | Path, clips: list[Clip]) -> None:
    with DatasetWriter(str(url), tiny_profile(), shard_bytes=SHARD_BYTES) as w:
        for clip in clips:
            if clip.key not in w.keys:
                w.add(clip)


def test_the_same_bytes_in_a_bucket(s3: str, tmp_path: Path, clips: list[Clip]) -> None:
    write(f"{s3}/same", clips)
    write(tmp_path, clips)
    there, here = Dataset.open(f"{s3}/same"), Dataset.open(tmp_path)
    assert there.meta == here.meta and len(here.meta.shards) > 1
    assert [there.read(row, check=True) for row in range(N)] == [here.read(row) for row in range(N)]
