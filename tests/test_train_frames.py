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
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from scipy.ndimage import gaussian_filter

from cmacc.ingest.encode import VideoWriter
from cmacc.shards.profile import PROFILES, profile
from cmacc.train.loading import frames
from cmacc.train.loading.frames import decode_crops, decode_frames
from cmacc.train.loading.graph import scaled

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
    found = decode_frames(encoded(name), start + stride * np.arange(count))
    assert found.dtype == np.uint8
    expected = np.stack([truth(name)[round((start + i * stride) / FPS, 6)] for i in range(count)])
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize(("start", "count", "stride", "numbers"), [(36, 5, 2, (36, 38, 38, 38, 38)), (39, 3, 1, (39, 39, 39))])
def test_frames_past_the_end_repeat_the_last(name: str, start: int, count: int, stride: int, numbers: tuple[int, ...]) -> None:
    found = decode_frames(encoded(name), start + stride * np.arange(count))
    assert np.array_equal(found, np.stack([truth(name)[round(n / FPS, 6)] for n in numbers]))


@pytest.mark.parametrize("name", PROFILES)
def test_a_start_past_the_end_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="no frame from number 60 on decodes"):
        decode_frames(encoded(name), np.arange(60, 64))


@pytest.mark.parametrize("video", [b"", b"no video at all", bytes(2000)])
def test_garbage_is_an_error_of_its_content(video: bytes) -> None:
    """Never an OSError, which would mean that the source failed."""
    with pytest.raises((ValueError, av.error.InvalidDataError)):
        decode_frames(video, np.arange(4))


def resized(video: np.ndarray, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """The crop by PIL, bilinear with antialiasing."""
    top, left, height, width = box
    edges = (left, top, left + width, top + height)
    return np.stack([np.asarray(Image.fromarray(f).resize((size, size), Image.Resampling.BILINEAR, edges)) for f in video])


def by_dali(video: np.ndarray, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """The crop as the graph makes it on a GPU, after NVDEC: the same operator on the CPU."""

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipeline() -> object:
        frames = fn.external_source(name="video", layout="FHWC", dtype=types.UINT8, batch=True)
        return scaled(frames, size, np.float32(box[:2]), np.float32([box[0] + box[2], box[1] + box[3]]))

    built = pipeline()
    built.build()
    built.feed_input("video", [video])
    return np.array(built.run()[0][0])


BOXES = [(0, 0, 160, 240), (0, 40, 160, 160), (20, 50, 110, 100), (10, 0, 80, 140), (60, 150, 82, 90)]


@lru_cache(maxsize=8)
def textured(name: str) -> bytes:
    """A few frames whose lightness changes from pixel to pixel and whose colours do over some, as in pictures of the world."""
    rng = np.random.default_rng(0)
    rough = gaussian_filter(rng.normal(0, 1, (160, 260, 1)), (1.5, 1.5, 0))
    smooth = gaussian_filter(rng.normal(0, 1, (160, 260, 3)), (5, 5, 0))
    noise = 40 * rough / rough.std() + 20 * smooth / smooth.std()
    with TemporaryDirectory() as folder:
        writer = VideoWriter(
            Path(folder) / "a.mp4", Fraction(1), profile(name, short_side=160, fps=FPS, gop=min(10, PROFILES[name].gop))
        )
        for i in range(6):
            picture = (128 + noise[:, 4 * i : 240 + 4 * i]).clip(0, 255).astype(np.uint8)
            writer.write(av.VideoFrame.from_ndarray(picture, format="rgb24"), 1)
        return writer.close()


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("size", [56, 112])
@pytest.mark.parametrize("name", PROFILES)
def test_a_crop_is_resized_as_elsewhere(name: str, size: int, box: tuple[int, int, int, int]) -> None:
    """Smaller and larger: within 2/255 of what PIL makes of the whole decoded pictures, and DALI, as it does after NVDEC."""
    numbers = np.array([0, 2, 5])
    found = decode_frames(textured(name), numbers, crop=box, size=size).astype(float)
    assert found.shape == (3, size, size, 3)
    whole = decode_frames(textured(name), numbers)
    for made in (resized(whole, box, size), by_dali(whole, box, size)):
        assert np.abs(found - made).mean() < 2
        for shifted in (found[:, 1:] - made[:, :-1], found[:, :, 1:] - made[:, :, :-1]):
            assert np.abs(shifted).mean() > np.abs(found - made).mean() + 1


@pytest.mark.parametrize("name", PROFILES)
def test_a_crop_of_the_very_size_is_those_pixels(name: str) -> None:
    """Beside the scaler's way for pictures that are to be scaled there is one for others."""
    numbers, (top, left, side, _) = np.array([0, 3]), (4, 10, 24, 24)
    found = decode_frames(textured(name), numbers, crop=(top, left, side, side), size=side).astype(float)
    whole = decode_frames(textured(name), numbers)[:, top : top + side, left : left + side]
    assert np.abs(found - whole).mean() < 2


@pytest.mark.parametrize("name", PROFILES)
def test_without_deblocking(name: str) -> None:
    """Nearly the same pictures of H.264, the very same of the others."""
    numbers = np.arange(6)
    exact, quick = (decode_frames(textured(name), numbers, size=56, deblock=on).astype(float) for on in (True, False))
    off = np.abs(exact - quick).mean()
    assert 0 < off < 2 if name.startswith("h264") else off == 0


@pytest.mark.parametrize("name", PROFILES)
def test_crops_of_the_same_frames_are_those_of_each_alone(name: str) -> None:
    numbers = np.array([5, 6, 20])
    boxes = [None, (0, 8, 32, 32), (4, 10, 22, 20)]
    for box, made in zip(boxes, decode_crops(encoded(name), numbers, boxes, size=16), strict=True):
        assert np.array_equal(made, decode_frames(encoded(name), numbers, crop=box, size=16))


@pytest.mark.parametrize(("name", "least"), [("h264", 10), ("h264-dense", 0), ("mjpeg", 40), ("vp9", 0)])
def test_frames_that_no_other_needs(name: str, least: int) -> None:
    """Without all that are said to stand alone the others decode as before. B-frames are among them."""
    with av.open(io.BytesIO(encoded(name))) as container:
        stream = container.streams.video[0]
        unit = stream.time_base
        alone, dropped, left = frames._alone(stream.codec_context), [], []
        for packet in container.demux(stream):
            if packet.pts is not None and alone(packet):
                dropped.append(round(float(packet.pts * unit), 6))
            else:
                left += stream.codec_context.decode(packet if packet.pts is not None else None)
    assert least <= len(dropped) <= LENGTH
    found = {round(float(frame.pts * unit), 6): frame.to_ndarray(format="rgb24") for frame in left}
    assert found.keys() == truth(name).keys() - set(dropped)
    assert all(np.array_equal(picture, truth(name)[at]) for at, picture in found.items())
