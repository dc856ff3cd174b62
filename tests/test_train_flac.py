"""Cut FLAC: the frames that hold the wanted samples, the same to the bit for DALI's decoder (libsndfile) and for FFmpeg."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import av
import numpy as np
import pytest
from media import audio_bytes
from nvidia.dali import fn, pipeline_def, types

from cmacc.ingest.encode import encode_audio
from cmacc.shards.profile import profile
from cmacc.train.loading.flac import cut_flac, flac_rate


def crc(data: bytes, polynomial: int, bits: int) -> bytes:
    value = 0
    for byte in data:
        value ^= byte << bits - 8
        for _ in range(8):
            value = (value << 1 ^ (polynomial if value >> bits - 1 else 0)) & (1 << bits) - 1
    return value.to_bytes(bits // 8, "big")


def utf8(number: int) -> bytes:
    if number < 0x80:
        return bytes([number])
    tail: list[int] = []
    while number >= 1 << 6 - len(tail):
        tail, number = [0x80 | number & 0x3F, *tail], number >> 6
    return bytes([0xFF00 >> len(tail) + 1 & 0xFF | number, *tail])


def header(number: int, block: int, variable: bool, form: int = 0x08, rate: int = 0) -> bytes:
    """Of a frame of 16-bit mono at the file's rate if not told otherwise, its block size in 16 bits."""
    head = bytes([0xFF, 0xF8 | variable, 0x70 | rate, form]) + utf8(number) + (block - 1).to_bytes(2, "big")
    return head + crc(head, 0x07, 8)


def verbatim(pcm: np.ndarray, blocks: list[int], variable: bool = True, first: int = 0, total: int | None = None) -> bytes:
    """A FLAC file of 16-bit mono `pcm` (S,) as it is, in blocks of these sizes, numbered from `first` on."""
    info = b"\x00\x10\xff\xff" + bytes(6) + (16000 << 44 | 15 << 36 | (pcm.size if total is None else total)).to_bytes(8, "big")
    out = [b"fLaC\x00\x00\x00\x22", info + bytes(16), b"\x81\x00\x00\x05" + b"notes"]
    at = 0
    for i, block in enumerate(blocks):
        frame = header(first + (at if variable else i), block, variable) + b"\x02" + pcm[at : at + block].astype(">i2").tobytes()
        out += [frame, crc(frame, 0x8005, 16)]
        at += block
    return b"".join(out)


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(-32768, 32768, count).astype(np.int16)


@cache
def files() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    loud = rng.normal(0, 0.2, 24_000) * np.linspace(0, 1, 24_000) ** 4  # frames from a few bytes to thousands
    sizes = [16, 4096, 700, 17, 1, 3000, 192, 40]
    return {
        "tone": audio_bytes(1, 1.5),
        "ingest": encode_audio(loud.astype(np.float32), profile("h264")),
        "stereo, 24 bits": _encoded(np.cumsum(rng.normal(0, 1e6, (2, 9000)), axis=1).astype(np.int32), 44_100),
        "one frame": verbatim(noise(300), [300]),
        "fixed": verbatim(noise(2010), [100] * 20 + [10], variable=False),
        "numbered from 120 on": verbatim(noise(2010), [100] * 20 + [10], variable=False, first=120),
        "variable": verbatim(noise(sum(sizes)), sizes),
        "variable, from 70000 on": verbatim(noise(sum(sizes)), sizes, first=70_000),
        "of a length not stated": verbatim(noise(2010), [100] * 20 + [10], variable=False, total=0),
    }


def _encoded(pcm: np.ndarray, rate: int) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="flac") as file:
        stream = file.add_stream("flac", rate=rate, layout="stereo")
        stream.codec_context.format = "s32"
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(pcm.T).reshape(1, -1), format="s32", layout="stereo")
        frame.sample_rate = rate
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()


def by_ffmpeg(data: bytes) -> np.ndarray:
    """int (S, channels)"""
    with av.open(io.BytesIO(data), "r") as file:
        frames = [frame.to_ndarray() for frame in file.decode(audio=0)]
        return np.concatenate(frames, axis=1).reshape(-1, file.streams.audio[0].channels)


@cache
def pipeline() -> Any:
    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def decode() -> Any:
        return fn.decoders.audio(fn.external_source(name="flac", dtype=types.UINT8, ndim=1), dtype=types.FLOAT)[0]

    return decode()


def by_dali(data: bytes) -> np.ndarray:
    """float32 (S, channels)"""
    pipeline().feed_input("flac", [np.frombuffer(data, np.uint8)])
    (sound,) = pipeline().run()
    return sound.as_array()[0]


@pytest.mark.parametrize("name", files())
def test_decodes_to_the_same_samples(name: str) -> None:
    data, rng = files()[name], np.random.default_rng(1)
    whole = by_ffmpeg(data)
    # DALI wants the length: a cut always states it.
    heard = by_dali(cut_flac(data, 0, len(whole))[0] if "not stated" in name else data)
    assert len(whole) == len(heard)
    for start, stop in [(0, 1), (0, len(whole)), *(sorted(rng.integers(0, len(whole), 2).tolist()) for _ in range(15))]:
        cut, first = cut_flac(data, start, stop)
        assert cut is not data
        assert cut_flac(cut, start - first, stop - first) == (cut, 0)
        part = by_ffmpeg(cut)
        assert first <= start <= stop <= first + len(part)
        assert (part == whole[first : first + len(part)]).all()
        assert (by_dali(cut) == heard[first : first + len(part)]).all()


@pytest.mark.parametrize("variable", [False, True])
def test_no_frame_too_many(variable: bool) -> None:
    """Every boundary: one sample more or less takes one frame more or less."""
    blocks = [100] * 20 + [10]
    data, edges = verbatim(noise(2010), blocks, variable), np.cumsum([0, *blocks]).tolist()
    for i, left in enumerate(edges[:-1]):
        for right in edges[i + 1 :]:
            for start, stop in ((left, right), (left + 9, right - 9)):
                cut, first = cut_flac(data, start, stop)
                assert first == left
                assert cut[8:12] == (data[8:12] if variable else b"\0\x64\0\x64")
                assert len(cut) == 42 + sum(len(f) for f in _frames(data, blocks)[i : edges.index(right)])


def _frames(data: bytes, blocks: list[int]) -> list[bytes]:
    """All frames as long as `verbatim` made them: numbers of one byte below 128, of two below 2048."""
    at, first, out = 42 + 9, 0, []
    for i, block in enumerate(blocks):
        number = first if data[at + 1] & 1 else i
        size = 4 + len(utf8(number)) + 3 + 1 + 2 * block + 2
        out.append(data[at : at + size])
        at, first = at + size, first + block
    assert at == len(data)
    return out


@pytest.mark.parametrize(
    ("start", "stop", "kept"),
    [(-50, 10, (0, 100)), (-9, -5, (0, 100)), (5000, 6000, (2000, 2010)), (1990, 9000, (1900, 2010)),
     (150, 150, (100, 200)), (350, 150, (300, 400))],
)  # fmt: skip
@pytest.mark.parametrize("name", ["fixed", "of a length not stated"])
def test_what_lies_outside(name: str, start: int, stop: int, kept: tuple[int, int]) -> None:
    cut, first = cut_flac(files()[name], start, stop)
    assert (first, first + len(by_ffmpeg(cut))) == kept


def wrong_crc(number: int, variable: bool) -> bytes:
    head = header(number, 100, variable)
    return head[:-1] + bytes([head[-1] ^ 1])


LURES = {
    "wrong CRC-8": wrong_crc,
    "two channels": lambda number, variable: header(number, 100, variable, form=0x18),
    "24 bits": lambda number, variable: header(number, 100, variable, form=0x0C),
    "another rate": lambda number, variable: header(number, 100, variable, rate=9),
    "a short block": lambda number, variable: header(number, 90, variable),
}


def baited(lures: list[bytes], variable: bool) -> bytes:
    """20 frames of 100 samples that look like sync codes, one of the lures in each."""
    pcm = np.full(2000, -8, np.int16)  # ff f8
    for i, lure in enumerate(lures):
        pcm[100 * i + 20 : 100 * i + 20 + (len(lure) + 1) // 2] = np.frombuffer(lure + bytes(len(lure) % 2), ">i2")
    return verbatim(pcm, [100] * 20, variable)


def cuts_in_place(data: bytes) -> int:
    """How many of 36 cuts of one frame were made; each is checked."""
    whole, made = by_dali(data), 0
    for start in range(0, 1800, 50):
        cut, first = cut_flac(data, start, start + 20)
        if cut is not data:
            made += 1
            assert first == start // 100 * 100
            assert (by_dali(cut) == whole[first : first + 100]).all()
    return made


@pytest.mark.parametrize(("kind", "variable"), [*((k, False) for k in LURES), *((k, True) for k in LURES if "short" not in k)])
def test_headers_that_are_none(kind: str, variable: bool) -> None:
    """Each with the number of a frame further on, or further back."""
    lures = [LURES[kind]((i + 5) % 20 * (100 if variable else 1), variable) for i in range(20)]
    assert cuts_in_place(baited(lures, variable)) == 36


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize(("number", "least"), [(0, 36), (19, 5)])
def test_a_right_header_in_the_wrong_place(variable: bool, number: int, least: int) -> None:
    """A whole header of another frame among the samples may stop a cut, not move it."""
    lure = header(number * (100 if variable else 1), 100, variable)
    assert cuts_in_place(baited([lure] * 20, variable)) >= least


def test_streaminfo() -> None:
    """What is no longer known is zero; rate and format stay."""
    data = files()["ingest"]
    cut, _ = cut_flac(data, 5000, 9000)
    assert any(data[26:42]) and not any(cut[26:42])
    assert any(data[12:18]) and not any(cut[12:18])
    assert cut[:8] == b"fLaC\x80\x00\x00\x22"
    assert (cut[18:21], cut[21] >> 4) == (data[18:21], data[21] >> 4)
    assert int.from_bytes(cut[22:26], "big") == len(by_ffmpeg(cut))


@pytest.mark.parametrize(
    "data",
    [b"", b"fLaC", b"RIFF" + bytes(400), audio_bytes(codec="opus"), b"ID3" + audio_bytes(), audio_bytes()[:42],
     audio_bytes()[:100], b"fLaC\x80\x00\x00\x22" + bytes(4000), b"fLaC\x80\x00\x00\x22" + b"\xff\xf8" * 4000],
    ids=["empty", "marker alone", "wav", "opus", "a tag before it", "no frame", "cut off", "zeros", "sync codes alone"],
)  # fmt: skip
def test_what_is_not_flac_stays(data: bytes) -> None:
    assert cut_flac(data, 100, 300) == (data, 0)


def test_a_missing_or_damaged_frame() -> None:
    """Where the search meets the damage the file stays; elsewhere the sound is that of the place asked for."""
    blocks = [100] * 20
    data = verbatim(noise(2000), blocks, variable=False)
    frames, whole = _frames(data, blocks), by_dali(data)
    gone = data.replace(frames[7], b"")
    assert cut_flac(gone, 650, 750) == cut_flac(gone, 650, 700) == cut_flac(gone, 750, 800) == (gone, 0)
    assert cut_flac(data.replace(frames[-1], b""), 1850, 1950) == (data.replace(frames[-1], b""), 0)
    cut, first = cut_flac(gone, 1250, 1350)
    assert first == 1200
    assert (by_dali(cut) == whole[1200:1400]).all()


@pytest.mark.parametrize("name", ["ingest", "variable", "fixed"])
def test_noise_in_the_file(name: str) -> None:
    """Never an error of its own, and never more than the file held."""
    data, rng, unchanged = files()[name], np.random.default_rng(0), 0
    for _ in range(400):
        damaged = bytearray(data)
        for at in rng.integers(0, rng.choice([60, len(data)]), 3):
            damaged[at] = rng.integers(256)
        noisy = bytes(damaged[: rng.integers(len(data) // 2, len(data) + 1)])
        cut, first = cut_flac(noisy, 500, 900)
        unchanged += cut is noisy
        assert cut is noisy or (first <= 500 and cut[42:] in noisy)
        assert not first or cut is not noisy
    assert 0 < unchanged < 400


@pytest.mark.parametrize(
    ("data", "rate"),
    [(audio_bytes(), 8000), (cut_flac(audio_bytes(), 10, 20)[0], 8000), (files()["stereo, 24 bits"], 44_100), (b"", 0),
     (audio_bytes()[:41], 0), (audio_bytes(codec="opus"), 0)],
    ids=["ours", "cut", "stereo", "empty", "cut off", "opus"],
)  # fmt: skip
def test_rate(data: bytes, rate: int) -> None:
    assert flac_rate(data) == rate
