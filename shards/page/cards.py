"""A clip as a card of a page: its picture that plays, frames and log-mel over one axis of time, and what is said of it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape

import numpy as np

from cmacc.shards.clip import AUDIO, VIDEO
from cmacc.shards.dataset import Dataset
from cmacc.shards.facts import facts_from_json
from cmacc.shards.page.charts import clean
from cmacc.shards.page.pictures import LONGEST_S, mel
from cmacc.shards.page.preview import PICTURES, TEXT, Preview, kind_of, preview

_CLIP_BYTES = 256 << 20  # a larger clip is not read
_SHOWN = (*VIDEO, *AUDIO, *PICTURES, *TEXT, "json")
_CAPTIONS = 3  # shown; the others are folded
_KHZ = (0.5, 1, 2, 4, 8, 16)
_TICK = 0.13  # of a log-mel's height, the least from one of them to the next
_ICON = (
    '<svg viewBox="0 0 24 24" aria-hidden="true"><path class="go" d="M8 5v14l11-7z"/>'
    '<path class="halt" d="M6 5h4v14H6zm8 0h4v14h-4z"/></svg>'
)


def card(seen: Preview, name: str, told: str, more: str = "", classes: str = "") -> str:
    """The card of a clip. name: plain text, its heading; told, more: HTML that stands before and after its troubles; classes:
    of the card, beside its own."""
    said = f'<span class="key">{escape(name)}</span>{told}'
    said += "".join(f'<p class="trouble">{escape(clean(t[:1].upper() + t[1:], 400))}.</p>' for t in seen.troubles)
    if seen.seconds >= LONGEST_S:
        said += f'<p class="none">The first {LONGEST_S:.0f} s.</p>'
    plays = seen.play is not None
    names = " ".join(filter(None, ("card", "plays" if plays else "", classes)))
    length = f' data-seconds="{seen.seconds:.3f}"' if plays else ""
    return f'<article class="{names}"{length}>{_stage(seen, name)}{_timeline(seen)}<div class="said">{said}{more}</div></article>'


def chips(labels: Sequence[str], split: str = "") -> str:
    """Labels, after the name of a split, as a list."""
    found = [f'<li class="split" dir="auto">{escape(clean(split, 60))}</li>'] if split else []
    found += [f'<li dir="auto">{escape(clean(label, 120))}</li>' for label in labels]
    return f'<ul class="chips">{"".join(found)}</ul>' if found else ""


def look_at(dataset: Dataset, row: int) -> tuple[dict[str, bytes], Preview]:
    """The members of a clip that can be shown, and what is seen and heard of them; a clip that cannot be read raises nothing."""
    catalog, here = dataset.catalog, slice(row, row + 1)
    # not by Dataset.read, which wants the places of all clips: of ten million there would be 480 MB
    places = np.stack([catalog.column("offset", here)[0], catalog.column("size", here)[0]], axis=1).tolist()
    wanted = {m: (o, o + n) for m, (o, n) in zip(dataset.meta.members, places, strict=True) if n > 0 and kind_of(m) in _SHOWN}
    count, shard = sum(b - a for a, b in wanted.values()), int(catalog.column("shard", here)[0])
    if count > _CLIP_BYTES:
        return {}, Preview(troubles=(f"it has {count >> 20:,} MiB, too much for a page",))
    try:
        members = dict(zip(wanted, dataset.ranges([(shard, a, b) for a, b in wanted.values()]), strict=True))
    except Exception as e:  # each kind of bucket has errors of its own
        return {}, Preview(troubles=(f"it cannot be read: {e}",))
    return members, preview(members)


def _stage(seen: Preview, key: str) -> str:
    poster = f"data:image/jpeg;base64,{_base64(seen.poster)}" if seen.poster else ""
    if seen.play is None:
        return f'<div class="stage"><img alt="" src="{poster}"></div>' if poster else ""
    shown = f' poster="{poster}"' if poster else ""
    return (
        f'<div class="stage{"" if poster else " blind"}">'
        f'<video preload="none" playsinline{shown} src="data:video/mp4;base64,{_base64(seen.play)}"></video>'
        f'<button type="button" class="play" aria-label="Play {escape(key)}">{_ICON}</button>'
        f'<span class="clock">{seen.seconds:.1f} s</span></div>'
    )


def _timeline(seen: Preview) -> str:
    """Frames and log-mel over one axis of time, with the playhead over both."""
    rows = ""
    if seen.strip:
        width = 100 * seen.video_s / seen.seconds
        rows += (
            f'<div class="strip"><img alt="" style="width:{width:.2f}%" src="data:image/jpeg;base64,{_base64(seen.strip)}"></div>'
        )
    if seen.mel:
        top, ticks, last = mel(seen.rate / 2), "", 0.0
        for khz in _KHZ:
            place = mel(1000 * khz) / top
            if last + _TICK <= place <= 1 - _TICK / 2:
                ticks, last = f'{ticks}<i style="bottom:{100 * place:.1f}%">{khz:g} kHz</i>', place
        width = 100 * seen.sound_s / seen.seconds
        picture = f'<img alt="log-mel spectrogram" style="width:{width:.2f}%" src="data:image/png;base64,{_base64(seen.mel)}">'
        rows += f'<div class="mel" title="log-mel, 0 to {seen.rate / 2000:g} kHz, the loudest 80 dB">{picture}{ticks}</div>'
    head = '<div class="head"></div>' if seen.play is not None else ""
    return f'<div class="time">{rows}{head}</div>' if rows else ""


def captions(members: Mapping[str, bytes]) -> str:
    """What is said in a clip, the first of it unfolded."""
    lines = [
        f'<li dir="auto">{f"<b>{at}</b>" if at else ""}{escape(clean(text, 400))}</li>'
        for at, text in _spoken(members)
        if text.strip()
    ]
    if not lines:
        return ""
    rest = "".join(lines[_CAPTIONS:500])
    first = f'<ul class="captions">{"".join(lines[:_CAPTIONS])}</ul>'
    if not rest:
        return first
    more = f"{len(lines) - _CAPTIONS:,} more caption{'' if len(lines) == _CAPTIONS + 1 else 's'}"
    return f'{first}<details><summary>{more}</summary><ul class="captions">{rest}</ul></details>'


def _spoken(members: Mapping[str, bytes]) -> Iterator[tuple[str, str]]:
    """Captions with their times: of our json member, or whatever another's says in words."""
    for member, data in members.items():
        if kind_of(member) in TEXT:
            yield "", data[:4000].decode("utf-8", "replace")
    if not (data := members.get("json", b"")):
        return
    try:
        for a, b, text in facts_from_json(data).captions:
            yield f"{a:.1f}–{b:.1f} s", text
    except ValueError:
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            return
        if isinstance(found, dict):
            yield from (("", found[name]) for name in ("caption", "text", "title") if isinstance(found.get(name), str))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
