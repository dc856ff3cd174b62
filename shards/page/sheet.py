"""A sheet of pictures and sounds of a few clips, as one PNG."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image, ImageDraw

from cmacc.shards.clip import AUDIO, VIDEO
from cmacc.shards.dataset import Dataset
from cmacc.shards.describe import evenly
from cmacc.shards.page.pictures import frames, log_mel_picture, sound, strip, waveform
from cmacc.shards.page.preview import first_of

_CELL = 96  # pixels of a picture's height; every clip is one strip of that
_SOUND = 240
_FRAMES = 5
_TEXT = 14


def contact_sheet(dataset: Dataset, path: str | os.PathLike[str], n: int = 8) -> Path:
    """Write a PNG of `n` clips spread evenly over the data set, a strip each: frames, waveform, log-mel, key and labels.

    Raises DatasetError, or av.FFmpegError or ValueError for a clip that cannot be decoded.
    """
    strips = [_strip(dataset, row) for row in evenly(dataset.rows(), n).tolist()]
    width = max((s.width for s in strips), default=_SOUND)
    sheet = Image.new("RGB", (width, max(1, sum(s.height for s in strips))), "white")
    y = 0
    for picture in strips:
        sheet.paste(picture, (0, y))
        y += picture.height
    sheet.save(path, format="PNG")
    return Path(path)


def _strip(dataset: Dataset, row: int) -> Image.Image:
    found = dataset.read(row)
    video, audio = first_of(found, VIDEO), first_of(found, AUDIO)
    parts = [strip(frames(found[video], _FRAMES, _CELL), _CELL)] if video else []
    if audio:
        heard = sound(found[audio])
        parts += [waveform(heard.samples, _SOUND, _CELL), log_mel_picture(heard).convert("RGB").resize((_SOUND, _CELL))]
    whole = Image.new("RGB", (sum(p.width + 2 for p in parts), _CELL + _TEXT + 4), "white")
    here = slice(row, row + 1)
    names = ", ".join(dataset.catalog.labels(here)[0])
    ImageDraw.Draw(whole).text((2, 1), f"{dataset.catalog.texts('key', here)[0]}  {names}", fill="black")
    x = 0
    for part in parts:
        whole.paste(part, (x, _TEXT))
        x += part.width + 2
    return whole
