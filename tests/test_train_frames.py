"""Frames by number: the same pictures that PyAV gives when it decodes everything in order."""

from __future__ import annotations

import io
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
import pytest

from cmacc.ingest.encode import VideoWriter
from cmacc.shards.profile import PROFILES, profile
from cmacc.train.frames import decode_frames

LENGTH, FPS = 40, 10


@lru_cache(maxsize=8)
def encoded(name: str) -> bytes:
    """40 frames of the profile, as `ingest` writes them, with keyframes every 10 or fewer: a block that wanders over noise."""
    small = profile(name, short_side=32, fps=FPS, gop=min(10, PROFILES[name].gop))
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 60, (32, 48, 3), dtype=np.uint8)
    with TemporaryDirectory() as folder:
        writer = VideoWriter(Path(folder) / "a.mp4", Fraction(1), small)
        for i in range(LENGTH):
            picture = noise.copy()
            picture[i % 24 : i % 24 + 8, i : i + 8] = (6 * i, 255 - 6 * i, 128)
            writer.write(av.VideoFrame.from_ndarray(picture, format="rgb24"), 1)
        return writer.close()


@lru_cache(maxsize=8)
def truth(name: str) -> dict[float, np.ndarray]:
    """Every frame by its time in seconds, decoded in order by PyAV alone."""
    with av.open(io.BytesIO(encoded(name))) as container:
        return {round(frame.time, 6): frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)}


@pytest.mark.parametrize("name", PROFILES)
def test_the_truth_itself(name: str) -> None:
    frames = truth(name)
    assert sorted(frames) == [round(i / FPS, 6) for i in range(LENGTH)]
    pictures = list(frames.values())
    assert all(np.abs(a.astype(int) - b).max() > 30 for a, b in pairwise(pictures))


@pytest.mark.parametrize(
    ("start", "count", "stride"),
    [(0, 4, 1), (0, 8, 5), (1, 3, 1), (9, 3, 1), (10, 2, 7), (13, 4, 2), (19, 5, 3), (27, 13, 1), (39, 1, 1), (5, 1, 9)],
)
@pytest.mark.parametrize("name", PROFILES)
def test_frames_are_those_of_their_instants(name: str, start: int, count: int, stride: int) -> None:
    found = decode_frames(encoded(name), start, count, stride)
    assert found.dtype == np.uint8
    expected = np.stack([truth(name)[round((start + i * stride) / FPS, 6)] for i in range(count)])
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize(("start", "count", "stride", "numbers"), [(36, 5, 2, (36, 38, 38, 38, 38)), (39, 3, 1, (39, 39, 39))])
def test_frames_past_the_end_repeat_the_last(name: str, start: int, count: int, stride: int, numbers: tuple[int, ...]) -> None:
    found = decode_frames(encoded(name), start, count, stride)
    assert np.array_equal(found, np.stack([truth(name)[round(n / FPS, 6)] for n in numbers]))


@pytest.mark.parametrize("name", PROFILES)
def test_a_start_past_the_end_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="no frame from number 60 on decodes"):
        decode_frames(encoded(name), 60, 4, 1)


@pytest.mark.parametrize("video", [b"", b"no video at all", bytes(2000)])
def test_garbage_is_an_error_of_its_content(video: bytes) -> None:
    """Never an OSError, which would mean that the source failed."""
    with pytest.raises((ValueError, av.error.InvalidDataError)):
        decode_frames(video, 0, 4, 1)
