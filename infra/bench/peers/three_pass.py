"""The obvious way with FFmpeg: download a source video, three runs a clip (exact cut, picture, sound), a WebDataset tar."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import tempfile
import urllib.request
from pathlib import Path

import imageio_ffmpeg

from cmacc.ingest.encode import _video_codec  # the very settings, so that the two cannot drift apart
from cmacc.shards.profile import Profile

THREADS = ("-threads", "1", "-filter_threads", "1")


def encoder(profile: Profile) -> list[str]:
    """The profile's encoder as options of the `ffmpeg` command."""
    codec, options = _video_codec(profile)
    named = [text for name, value in options.items() for text in (f"-{name}", value)]
    return ["-c:v", codec, *named, "-g", str(profile.gop), "-bf", str(profile.b_frames), "-threads", "1"]


def three_passes(url: str, spans: tuple[tuple[float, float], ...], tar: Path, profile: Profile) -> int:
    """Bytes of the clips at `spans` (seconds) of the source video at `url`, now in `tar`."""
    side = profile.short_side
    scale = f"scale='if(gt(iw,ih),-2,min({side},iw))':'if(gt(iw,ih),min({side},ih),-2)':flags=bicubic+accurate_rnd+bitexact"
    with tempfile.TemporaryDirectory(dir=tar.parent) as name, tarfile.open(tar, "w") as out:
        folder = Path(name)
        source, cut, video, audio = (folder / file for file in ("source.mp4", "cut.mp4", "clip.mp4", "clip.flac"))
        with urllib.request.urlopen(url, timeout=60) as answer:
            source.write_bytes(answer.read())
        made = 0
        for start, end in spans:
            _ffmpeg("-ss", f"{start:.3f}", "-t", f"{end - start:.3f}", "-i", source, *encoder(profile), "-c:a", "aac", cut)
            _ffmpeg(
                "-i",
                cut,
                "-an",
                "-vf",
                f"fps={profile.fps},{scale},format=yuv420p",
                *encoder(profile),
                "-movflags",
                "+faststart",
                video,
            )
            _ffmpeg("-i", cut, "-vn", "-ac", "1", "-ar", profile.audio_rate, "-sample_fmt", "s16", "-c:a", "flac", audio)
            members = {"mp4": video.read_bytes(), "flac": audio.read_bytes(), "json": json.dumps({"span": (start, end)}).encode()}
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{tar.stem}_{start:.3f}.{extension}")
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
                made += len(data)
    return made


def _ffmpeg(*arguments: object) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-loglevel", "error", "-y", *THREADS]
    subprocess.run([*command, *map(str, arguments)], check=True)
