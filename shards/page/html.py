"""A data set as one HTML page that needs nothing else: its facts, how its clips are spread, and some of them to see and hear.

Everything that comes from the data set is untrusted: text is escaped, media are decoded here before they are shown, and the page
itself forbids any script but its own and any address outside it.
"""

from __future__ import annotations

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

from cmacc.shards.dataset import Dataset
from cmacc.shards.describe import describe, evenly, label_counts, split_counts
from cmacc.shards.page.cards import captions, card, chips, look_at
from cmacc.shards.page.charts import bars, clean, histogram
from cmacc.shards.page.document import document
from cmacc.shards.place import public_address
from cmacc.shards.publish import publish
from cmacc.shards.query import matching

_MEASURED = (("Duration", "seconds", "duration_s"), ("Loudness", "dBFS", "loudness_db"), ("Motion", "luma steps", "motion"))
_AT_ONCE = 4


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
    publish(page, document(_name(dataset), "".join(parts)).encode("utf-8", "replace"))
    return page


def _drawn(rows: NDArray[np.int64], n: int, seed: int) -> NDArray[np.int64]:
    draws = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64)).random_raw(len(rows))
    return np.sort(rows[np.argsort(draws, kind="stable")[:n]])


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
    members, seen = look_at(dataset, row)
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
    told = chips(catalog.labels(here)[0], str(catalog.texts("split", here)[0]))
    told += f'<p class="numbers">{" · ".join(text for text, there in known.items() if there)}</p>'
    return card(seen, clean(str(catalog.texts("key", here)[0]), 300), told, captions(members))
