"""A data set as one HTML page that needs nothing else: its facts, how its clips are spread, and some of them to see and hear.

Everything that comes from the data set is untrusted: text is escaped, media are decoded here before they are shown, and the page
itself forbids any script but its own and any address outside it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from cmacc.shards.clip import AUDIO, VIDEO
from cmacc.shards.dataset import Dataset
from cmacc.shards.describe import describe, evenly, label_counts, split_counts
from cmacc.shards.facts import facts_from_json
from cmacc.shards.page.charts import bars, clean, histogram
from cmacc.shards.page.look import SCRIPT, STYLE
from cmacc.shards.page.pictures import LONGEST_S, mel
from cmacc.shards.page.preview import PICTURES, TEXT, Preview, kind_of, preview
from cmacc.shards.place import public_address
from cmacc.shards.publish import publish
from cmacc.shards.query import matching

_MEASURED = (("Duration", "seconds", "duration_s"), ("Loudness", "dBFS", "loudness_db"), ("Motion", "luma steps", "motion"))
_CLIP_BYTES = 256 << 20  # a larger clip is not read
_SHOWN = (*VIDEO, *AUDIO, *PICTURES, *TEXT, "json")
_AT_ONCE = 4
_CAPTIONS = 3  # shown; the others are folded
_KHZ = (0.5, 1, 2, 4, 8, 16)
_TICK = 0.13  # of a log-mel's height, the least from one of them to the next
_ICON = (
    '<svg viewBox="0 0 24 24" aria-hidden="true"><path class="go" d="M8 5v14l11-7z"/>'
    '<path class="halt" d="M6 5h4v14H6zm8 0h4v14h-4z"/></svg>'
)


def selection(dataset: Dataset, split: str | None = None, where: str | None = None) -> NDArray[np.int64]:
    """Row numbers, ascending, of the clips of a split for which an SQL expression is true. Raises DatasetError."""
    rows = matching(dataset, where)
    return rows if split is None else np.intersect1d(rows, dataset.rows(split), assume_unique=True)


def write_page(
    dataset: Dataset,
    path: str | os.PathLike[str],
    *,
    rows: NDArray[np.int64] | None = None,
    said: str = "",
    clips: int = 24,
    seed: int | None = None,
    facts: dict[str, Any] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Path:
    """Write the page of a data set as one file, which appears whole; returns its path.

    rows: the clips that are counted and shown from (default: all); said: how they were chosen, for its head.
    clips: how many are shown, spread evenly over the rows, or drawn by a seed. facts: what `describe` says,
    where it was asked already. on_progress: called with how many are done.
    A clip that cannot be read or decoded has a card that says so. Raises DatasetError for the data set itself, OSError.
    """
    chosen = dataset.rows() if rows is None else rows
    shown = evenly(chosen, clips) if seed is None else _drawn(chosen, clips, seed)
    cards = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for card in pool.map(lambda row: _card(dataset, row), shown.tolist()):
            cards.append(card)
            if on_progress:
                on_progress(len(cards))
    parts = [
        *_head(dataset, facts or describe(dataset), chosen, said),
        *_spread(dataset, None if len(chosen) == len(dataset) else chosen),
    ]
    parts.append(f"<h2>{len(cards):,} of {_many(len(chosen), 'clip')}</h2>" if cards else "<h2>No clip to show</h2>")
    if cards:
        parts.append(
            '<p class="quiet">Click a clip to play it, and again to pause; on its button, the arrow keys move by 1 s.</p>'
        )
    parts.append(f'<section class="sheet" aria-label="Clips">{"".join(cards)}</section>')
    page = Path(path)
    publish(page, _document(_name(dataset), "".join(parts)).encode("utf-8", "replace"))
    return page


def _drawn(rows: NDArray[np.int64], n: int, seed: int) -> NDArray[np.int64]:
    draws = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64)).random_raw(len(rows))
    return np.sort(rows[np.argsort(draws, kind="stable")[:n]])


def _document(title: str, body: str) -> str:
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'unsafe-inline'; img-src data:; media-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}</style></head>'
        f"<body>{body}<script>{SCRIPT}</script></body></html>\n"
    )


# --- facts ---


def _head(dataset: Dataset, facts: dict[str, Any], rows: NDArray[np.int64], said: str) -> Iterator[str]:
    yield f"<header><h1>{escape(_name(dataset))}</h1>"
    yield f'<p class="quiet">{escape(clean(public_address(dataset.url), 500))}</p>'
    tiles = {
        "clips": f"{facts['clips']:,}",
        **_lasting(facts["hours"]),
        "size": _size(facts["bytes"]),
        "shards": f"{facts['shards']:,}",
        "source videos": f"{facts['sources']:,}",
        "labels": f"{len(facts['labels']):,}",
    }
    yield f'<dl class="tiles">{"".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in tiles.items())}</dl>'
    lines = {
        "profile": _profile(facts["profile"]),
        "members": ", ".join(facts["members"]),
        "splits": ", ".join(f"{name or '(none)'} {n:,}" for name, n in facts["splits"].items()),
        "near-duplicates": f"{facts['duplicates']:,}" if facts["duplicates"] else "",
        "added columns": ", ".join(f"{name} {tuple(shape)}" for name, shape in facts["added_columns"].items()),
        "made elsewhere": "yes: its shards were indexed where they lie" if dataset.meta.foreign else "",
        "fingerprint": facts["fingerprint"],
        "shown below": f"{_many(len(rows), 'clip')}: {said}" if said else "",
    }
    told = "".join(f'<dt>{k}</dt><dd dir="auto">{escape(clean(v, 2000))}</dd>' for k, v in lines.items() if v)
    yield f'<dl class="facts">{told}</dl>'
    if facts["provenance"]:
        text = json.dumps(facts["provenance"], indent=2, sort_keys=True, ensure_ascii=False)
        yield f"<details><summary>Provenance</summary><pre>{escape(text[:200_000])}</pre></details>"
    yield "</header>"


def _spread(dataset: Dataset, rows: NDArray[np.int64] | None) -> Iterator[str]:
    catalog = dataset.catalog
    total = len(dataset) if rows is None else len(rows)
    yield f'<h2>How the {"" if rows is None else f"{len(rows):,} chosen "}clips are spread</h2><section class="charts">'
    for title, unit, column in _MEASURED:
        values = catalog.column(column)
        yield histogram(title, unit, values if rows is None else values[rows])
    yield '</section><section class="charts wide">'
    labels = label_counts(catalog, rows)
    yield bars("Labels" if len(labels) <= 30 else f"Labels, the 30 most frequent of {len(labels):,}", labels, total)
    splits = split_counts(catalog, rows)
    if len(splits) > 1:
        yield bars("Splits", splits, total)
    yield "</section>"


def _name(dataset: Dataset) -> str:
    return clean(Path(urlsplit(dataset.url).path).name or dataset.url, 200)


def _profile(profile: dict[str, Any] | None) -> str:
    if profile is None:
        return "none: its clips are not all alike"
    p = profile
    name = "" if p["name"] == p["codec"] else f"{p['name']}: "
    video = f"{name}{p['codec']}, short side {p['short_side']}, {p['fps']} fps, a keyframe every {_many(p['gop'], 'frame')}"
    return f"{video}, {p['audio_codec']} at {p['audio_rate'] / 1000:g} kHz"


def _many(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _lasting(hours: float) -> dict[str, str]:
    if not math.isfinite(hours):
        return {"hours": "–"}
    return {"hours": f"{hours:,.1f}"} if hours >= 2 else {"minutes": f"{hours * 60:.1f}"}


def _size(count: int) -> str:
    for size, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count} B"


# --- clips ---


def _card(dataset: Dataset, row: int) -> str:
    here, catalog = slice(row, row + 1), dataset.catalog
    key = clean(str(catalog.texts("key", here)[0]), 300)
    members, seen = _seen(dataset, row)
    numbers = {
        name: float(catalog.column(name, here)[0]) for name in ("duration_s", "loudness_db", "motion", "fps", "width", "height")
    }
    known = {
        f"{numbers['duration_s']:.2f} s": numbers["duration_s"] > 0,
        f"{numbers['loudness_db']:.1f} dBFS".replace("-", "−"): math.isfinite(numbers["loudness_db"])
        and numbers["loudness_db"] != 0,
        f"motion {numbers['motion']:.1f}": math.isfinite(numbers["motion"]) and seen.video_s > 0,
        f"{numbers['width']:.0f} × {numbers['height']:.0f}": numbers["width"] > 0,
        f"{numbers['fps']:g} fps": numbers["fps"] > 0,
    }
    split = clean(str(catalog.texts("split", here)[0]), 60)
    chips = [f'<li class="split" dir="auto">{escape(split)}</li>'] if split else []
    chips += [f'<li dir="auto">{escape(clean(label, 120))}</li>' for label in catalog.labels(here)[0]]
    told = f'<span class="key">{escape(key)}</span>'
    told += f'<ul class="chips">{"".join(chips)}</ul>' if chips else ""
    told += f'<p class="numbers">{" · ".join(text for text, there in known.items() if there)}</p>'
    told += "".join(f'<p class="trouble">{escape(clean(t[:1].upper() + t[1:], 400))}.</p>' for t in seen.troubles)
    if seen.seconds >= LONGEST_S:
        told += f'<p class="none">The first {LONGEST_S:.0f} s.</p>'
    plays = seen.play is not None
    attributes = f' data-seconds="{seen.seconds:.3f}"' if plays else ""
    return (
        f'<article class="card{" plays" if plays else ""}"{attributes}>{_stage(seen, key)}{_timeline(seen)}'
        f'<div class="said">{told}{_captions(members)}</div></article>'
    )


def _seen(dataset: Dataset, row: int) -> tuple[dict[str, bytes], Preview]:
    """The members of a clip that can be shown, and what is seen and heard of them; a clip that cannot be read raises nothing."""
    catalog, here = dataset.catalog, slice(row, row + 1)
    # not by Dataset.read, which wants the places of all clips: of ten million there would be 480 MB
    places = np.stack([catalog.column("offset", here)[0], catalog.column("size", here)[0]], axis=1).tolist()
    wanted = {m: (o, o + n) for m, (o, n) in zip(dataset.meta.members, places, strict=True) if n > 0 and kind_of(m) in _SHOWN}
    count, shard = sum(b - a for a, b in wanted.values()), int(catalog.column("shard", here)[0])
    if count > _CLIP_BYTES:
        return {}, Preview(troubles=(f"it has {_size(count)}, too much for a page",))
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


def _captions(members: dict[str, bytes]) -> str:
    lines = [
        f'<li dir="auto">{f"<b>{at}</b>" if at else ""}{escape(clean(text, 400))}</li>'
        for at, text in _spoken(members)
        if text.strip()
    ]
    if not lines:
        return ""
    rest = "".join(lines[_CAPTIONS:500])
    folded = f"<details><summary>{_many(len(lines) - _CAPTIONS, 'more caption')}</summary>" if rest else ""
    first = f'<ul class="captions">{"".join(lines[:_CAPTIONS])}</ul>'
    return f'{first}{folded}<ul class="captions">{rest}</ul></details>' if rest else first


def _spoken(members: dict[str, bytes]) -> Iterator[tuple[str, str]]:
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
