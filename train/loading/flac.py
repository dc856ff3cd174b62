"""Cutting FLAC without decoding it: whole frames are kept or dropped, and STREAMINFO is written anew (RFC 9639)."""

from __future__ import annotations

import math
from typing import NamedTuple

_STREAMINFO = 4 + 4 + 34
"""Bytes of the marker `fLaC`, of a block's header and of STREAMINFO, which is always the first block."""
_SYNC = (b"\xff\xf8", b"\xff\xf9")
"""What a frame begins with: its header gives the frame's number (all blocks are of one size), or that of its first sample."""


class _Frame(NamedTuple):
    at: int  # byte of the file
    first: int  # its first sample
    block: int  # samples


def _crc8_table() -> bytes:
    table = list(range(256))
    for _ in range(8):
        table = [(c << 1 ^ (0x07 if c & 0x80 else 0)) & 0xFF for c in table]
    return bytes(table)


_CRC8 = _crc8_table()


def cut_flac(data: bytes, start: int, stop: int) -> tuple[bytes, int]:
    """A FLAC file of only those frames of `data` that hold samples start..stop, and the place of its first sample in `data`.

    At least one frame is kept: the first or the last where start..stop lies beyond them. The frames' bytes are untouched
    (so they keep their numbers); other metadata is dropped, and the MD5 of the samples is zero, "not known".
    What is not FLAC, or does not add up, is returned unchanged, with 0: its decoder will say what is wrong.
    """
    try:
        stream = _Stream(data)
        if stream.total:
            start, stop = min(start, stream.total - 1), min(stop, stream.total)
        start = max(start, 0)
        first = stream.holding(start, stream.origin)
        last = stream.holding(stop - 1, first)
        end = stream.end(last)
        info = stream.info(last.first + last.block - first.first)
    except (IndexError, ValueError, OverflowError):
        return data, 0
    return b"".join((info, data[first.at : end])), first.first


def flac_rate(data: bytes) -> int:
    """Samples per second that a FLAC file states; 0 for what is not FLAC."""
    if len(data) < _STREAMINFO or data[:4] != b"fLaC" or data[4] & 0x7F:
        return 0
    return int.from_bytes(data[18:21], "big") >> 4


class _Stream:
    """The frames of a FLAC file, found by their headers. What does not add up raises ValueError, IndexError or
    OverflowError."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        if data[:4] != b"fLaC" or data[4] & 0x7F or data[5:8] != b"\x00\x00\x22":
            raise ValueError("no STREAMINFO")
        at, final = 4, False
        while not final:
            final = data[at] >= 0x80
            at += 4 + int.from_bytes(data[at + 1 : at + 4], "big")
        self.sync = data[at : at + 2]
        if self.sync not in _SYNC:
            raise ValueError("no frame follows the metadata")
        self.total = (data[21] & 0x0F) << 32 | int.from_bytes(data[22:26], "big")
        self.rate = data[at + 2] & 0x0F
        channels = data[20] >> 1 & 0x07
        # Of two channels, either or both may be stored as the difference or the mean.
        layouts = (1, 8, 9, 10) if channels == 1 else (channels,)
        self.formats = bytes(layout << 4 | data[at + 3] & 0x0E for layout in layouts)
        self.nominal = self.base = 0
        head = self._read(at)
        if self.sync == _SYNC[0]:  # numbers count blocks, each as long as the first
            self.nominal = head.block
        # A file that was cut before begins with a later frame.
        self.base = head.first * (self.nominal or 1)
        self.origin = _Frame(at, 0, head.block)

    def _read(self, at: int) -> _Frame:
        """The frame whose header begins at byte `at`. Raises ValueError or IndexError where there is none."""
        data = self.data
        code = data[at + 2]
        if code & 0x0F != self.rate or data[at + 3] not in self.formats:
            raise ValueError("the frame's format is not the file's")
        number, place = data[at + 4], at + 5
        if number >= 0x80:  # as UTF-8, of up to seven bytes
            length = 8 - (number ^ 0xFF).bit_length()
            if length in (1, 8):
                raise ValueError("a number begins with a continuation")
            number &= 0x7F >> length
            for byte in data[place : place + length - 1]:
                if byte & 0xC0 != 0x80:
                    raise ValueError("a number breaks off")
                number = number << 6 | byte & 0x3F
            place += length - 1
        code >>= 4
        if code >= 8:
            block = 256 << code - 8
        elif code >= 6:
            block = int.from_bytes(data[place : place + code - 5], "big") + 1
            place += code - 5
        elif code:
            block = 192 if code == 1 else 144 << code
        else:
            raise ValueError("a block size that is reserved")
        place += {12: 1, 13: 2, 14: 2}.get(self.rate, 0)
        crc = 0
        for byte in data[at:place]:
            crc = _CRC8[crc ^ byte]
        if crc != data[place]:
            raise ValueError("CRC-8")
        first = number * (self.nominal or 1) - self.base
        short = self.nominal and self.total and block != self.nominal
        if block > 65535 or (short and first + block != self.total):
            raise ValueError("a block size that does not belong here")
        return _Frame(at, first, block)

    def _next(self, start: int, stop: int, low: int, high: float) -> _Frame | None:
        """The first frame that begins in bytes start..stop with a sample in low..high (without `high`). The sync code
        also occurs inside frames: a header is believed if all its fields and its CRC-8 are right."""
        stop += 1  # of the sync code's two bytes, the second may lie beyond
        at = self.data.find(self.sync, start, stop)
        while at >= 0:
            try:
                frame = self._read(at)
                if low <= frame.first < high:
                    return frame
            except (IndexError, ValueError):
                pass
            at = self.data.find(self.sync, at + 1, stop)
        return None

    def holding(self, sample: int, low: _Frame) -> _Frame:
        """The frame, `low` or later, that holds `sample`; the last one if the file does not state its length."""
        stop, high = len(self.data), self.total or low.first + 2 * (sample - low.first)
        bound, guess = math.inf, True
        while sample >= low.first + low.block:
            # By proportion and by halving in turn: sound is loud here and silent there.
            share = (sample - low.block - low.first) / (high - low.first) if guess else 0.5
            guess = not guess
            middle = max(low.at + 2 + int((stop - low.at - 2) * share), low.at + 2)
            frame = self._next(middle, stop, low.first + low.block, bound)
            if frame is not None and frame.first <= sample:
                low = frame
                continue
            if frame is not None:
                high = bound = frame.first
            if stop == middle:
                if self.total or bound < math.inf:
                    raise ValueError("a frame is missing")
                return low
            stop = middle
        return low

    def end(self, frame: _Frame) -> int:
        """The byte after `frame`: where the next begins, or the file ends."""
        after = frame.first + frame.block
        following = self._next(frame.at + 2, len(self.data), after, after + 1) if after != self.total else None
        if following is None and self.total not in (0, after):
            raise ValueError("a frame is missing")
        return following.at if following else len(self.data)

    def info(self, samples: int) -> bytes:
        """The marker and STREAMINFO of a file of `samples` samples that has no other metadata."""
        info = bytearray(self.data[:_STREAMINFO])
        info[4] = 0x80
        if self.nominal and info[8:10] != info[10:12]:
            info[8:12] = self.nominal.to_bytes(2, "big") * 2
        info[12:18] = bytes(6)  # size of the smallest and the largest frame: not known
        info[21:26] = (info[21] >> 4 << 36 | samples).to_bytes(5, "big")
        info[26:42] = bytes(16)
        return bytes(info)
