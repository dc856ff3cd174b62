"""What a media file is, told by its packets: nothing is decoded but the first picture and the first sound, unless asked.

`python -m cmacc.shards.probe` is the child process that `prober.Prober` asks: a JSON line for each question on stdin, one for
each answer on stdout. A file may be hostile: it opens no other file, and what crashes is this process.
"""

from __future__ import annotations

import ctypes
import io
import json
import math
import os
import resource
import signal
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np

_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flac,wav,w64,aiff,mp3,aac,ogg,mpegts,mpeg,mpegvideo,asf,flv,ac3,amr,rm,dv,caf"
)
# a file may be a playlist in disguise: no such format, and no protocol at all
_OPEN = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
_ATTACHED_PICTURE = 0x400
_MEMORY = 4 << 30
_PR_SET_PDEATHSIG = 1
_STILL = (0.5, 1.5)  # of the frame interval: a gap within it is constant frame rate


class Window(io.RawIOBase):
    """A part of a file, as a file that is read alone."""

    def __init__(self, path: str | Path, offset: int, size: int) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._offset, self._size, self._at = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, n: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        data = os.pread(self._file, left if n < 0 else min(n, left), self._offset + self._at)
        self._at += len(data)
        return data

    def close(self) -> None:
        if not self.closed:
            os.close(self._file)
        super().close()


def probe(file: Any, kind: str, *, measure: bool = False) -> dict[str, Any]:
    """Traits of the first stream of a kind (`video` or `audio`) in a file object, as JSON holds them.

    video: codec, width, height (as coded), rotation (degrees), fps, frames, seconds, keyframes (frame numbers as shown), constant
    (frame rate), reordered (B-frames), sound (there is some). audio: codec, rate, channels, seconds.
    measure: everything is decoded; also `motion` (0..255) and `loudness_db` of the sound, where there is any.
    Raises ValueError for what is broken.
    """
    try:
        with av.open(file, "r", options=_OPEN) as container:
            named = [s for s in container.streams if s.type == kind and not int(s.disposition) & _ATTACHED_PICTURE]
            if not named:
                raise ValueError(f"it holds no {'picture' if kind == 'video' else 'sound'}")
            stream = min(named, key=lambda s: (not int(s.disposition) & 1, s.index))
            found = _video(container, stream) if kind == "video" else _audio(container, stream)
        if measure:
            file.seek(0)
            with av.open(file, "r", options=_OPEN) as container:
                found |= _measured(container, kind)
    except (av.FFmpegError, EOFError, ZeroDivisionError, MemoryError) as e:
        raise ValueError(str(getattr(e, "strerror", None) or e or type(e).__name__).lower()[:200]) from e
    return found


def _packets(container: Any, stream: Any) -> tuple[list[Any], Any]:
    """(pts, dts, duration, key, shown) of each packet, and the first frame that decodes."""
    packets: list[Any] = []
    first = None
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.is_corrupt:
            raise ValueError(f"it is cut short or damaged after {len(packets)} packets")
        shown = not packet.is_discard
        packets.append((packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe, shown))
        if first is None:
            first = next(iter(packet.decode()), None)
    if first is None:
        first = next(iter(stream.codec_context.decode(None)), None)
    if first is None:
        raise ValueError("nothing of it decodes")
    return packets, first


def _video(container: Any, stream: Any) -> dict[str, Any]:
    stream.thread_type = "NONE"
    packets, first = _packets(container, stream)
    allowed = 0.9 if container.format.name == "avi" else 1.0  # a frame that AVI repeats has no bytes
    if len(packets) < allowed * stream.frames:
        raise ValueError(f"it is cut short: {len(packets)} of {stream.frames} frames are there")
    shown = [p for p in packets if p[4]]
    if not shown:
        raise ValueError("it has no frame to show")
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    stamps = [p[0] for p in shown]
    if None in stamps:  # AVI has no times of display: packets come in their order
        order = list(range(len(shown)))
        seconds, constant, reordered = len(shown) / rate if rate else 0.0, bool(rate), bool(stream.codec_context.has_b_frames)
    else:
        order = sorted(range(len(shown)), key=lambda i: stamps[i])
        unit = float(stream.time_base)
        gaps = [b - a for a, b in pairwise(stamps[i] for i in order)]
        usual = float(np.median(gaps)) if gaps else float(shown[0][2])
        last = shown[order[-1]][2] or usual
        seconds = (stamps[order[-1]] - stamps[order[0]] + last) * unit or (1 / rate if rate else 0.0)
        constant = all(_STILL[0] * usual < gap < _STILL[1] * usual for gap in gaps)
        reordered = order != list(range(len(shown)))
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError("its frames have no times")
    place = {packet: number for number, packet in enumerate(order)}
    keyframes = sorted(place[i] for i, p in enumerate(shown) if p[3])
    return {
        "codec": stream.codec.canonical_name, "width": first.width, "height": first.height,
        "rotation": round(getattr(first, "rotation", 0) or 0) % 360, "fps": rate or len(shown) / seconds, "frames": len(shown),
        "seconds": seconds, "keyframes": keyframes, "constant": constant, "reordered": reordered,
        "sound": any(s.type == "audio" for s in container.streams),
    }  # fmt: skip


def _audio(container: Any, stream: Any) -> dict[str, Any]:
    packets, first = _packets(container, stream)
    unit = float(stream.time_base)
    stamped = [p for p in packets if p[0] is not None]
    seconds = sum(p[2] for p in packets) * unit
    if stamped:
        seconds = max(seconds, (stamped[-1][0] + stamped[-1][2] - stamped[0][0]) * unit)
    declared = float((stream.duration or 0) * unit)
    if container.format.name in ("flac", "wav") and seconds < 0.99 * declared - 0.1:
        raise ValueError(f"it is cut short: {seconds:.2f} of {declared:.2f} s are there")
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError("it has no sound in it")
    return {
        "codec": stream.codec.canonical_name, "rate": first.sample_rate, "channels": first.layout.nb_channels,
        "seconds": declared if 0 < declared < seconds else seconds,
    }  # fmt: skip


def _measured(container: Any, kind: str) -> dict[str, float]:
    found = {}
    sounds = [s for s in container.streams if s.type == "audio"][:1]
    pictures = [s for s in container.streams if kind == "video" and s.type == "video"][:1]
    power, samples, changes, frames, before = 0.0, 0, 0.0, 0, None
    resampler = av.AudioResampler(format="flt", layout="mono")
    for frame in container.decode(sounds + pictures):
        if isinstance(frame, av.AudioFrame):
            for part in resampler.resample(frame):
                sound = part.to_ndarray()[0].astype(np.float64)
                power, samples = power + float(sound @ sound), samples + len(sound)
        else:
            frames += 1
            luma = _luma(frame)
            if before is not None and luma.shape == before.shape:
                changes += float(np.abs(luma - before).mean())
            before = luma
    if samples:
        found["loudness_db"] = round(max(-120.0, 10 * math.log10(max(power / samples, 1e-12))), 2)
    if frames:
        found["motion"] = round(changes / max(frames - 1, 1), 4)
    return found


def _luma(frame: Any) -> Any:
    """int16, at a short side of at most 256 pixels, every fourth pixel of every fourth line."""
    scale = min(1.0, 256 / min(frame.width, frame.height))
    gray = frame.reformat(width=max(1, round(frame.width * scale)), height=max(1, round(frame.height * scale)), format="gray")
    return gray.to_ndarray()[::4, ::4].astype(np.int16)


def main() -> None:
    """Answer until stdin ends or the parent dies."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        raise SystemExit("the parent process is gone")
    # whatever prints, prints to stderr: the pipe to the parent carries answers alone
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    av.logging.set_level(av.logging.PANIC)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard), hard))
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            with Window(asked["path"], asked["offset"], asked["size"]) as file:
                answer = probe(file, asked["kind"], measure=asked["measure"])
        except Exception as e:  # one sample's trouble is not the next one's
            answer = {"error": str(e) if isinstance(e, ValueError) else f"{type(e).__name__}: {e}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
