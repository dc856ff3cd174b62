"""Histograms and bars as HTML that needs no script: numbers in, SVG and text out."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

_WIDTH, _HEIGHT = 360, 190  # of a histogram, in its own units
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 40
_BINS = 20


def count_bins(values: NDArray[Any], bins: int = _BINS) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Edges (k + 1) at round numbers, about `bins` of them apart, and how many values lie in each bin (k).

    Every finite value is in one bin; a bin holds its lower edge, the last one its upper edge, too. Without values there are none.
    """
    finite = values[np.isfinite(values)]
    if not len(finite):
        return np.zeros(1), np.zeros(0, np.int64)
    low, high = float(finite.min()), float(finite.max())
    step = round_step((high - low) / bins or abs(high) / bins or 1.0)
    first, last = math.floor(low / step), math.floor(high / step) + 1
    if last - first > 1 and math.isclose(high, (last - 1) * step):
        last -= 1
    edges = np.arange(first, last + 1, dtype=np.float64) * step
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)  # a product may be off by its last digit
    return edges, np.histogram(finite, edges)[0].astype(np.int64)


def round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= least * (1 - 1e-9))


def histogram(title: str, unit: str, values: NDArray[Any]) -> str:
    """A figure with an SVG: bars, axis numbers, the unit below; hovering over a bar tells its range and count."""
    edges, counts = count_bins(values)
    head = f"<figcaption>{escape(title)}</figcaption>"
    if not len(counts):
        return f'<figure class="chart">{head}<p class="none">no clip has a number here</p></figure>'
    most = int(counts.max())
    rise = max(1.0, round_step(most / 4))
    top = math.ceil(most / rise) * rise
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    span = edges[-1] - edges[0]

    def x(value: float) -> float:
        return _LEFT + wide * float(value - edges[0]) / span

    def y(count: float) -> float:
        return _TOP + high * (1 - count / top)

    parts = []
    for count in np.arange(0, top + rise / 2, rise):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(count):.1f}" y2="{y(count):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(count) + 4:.1f}" text-anchor="end">{short(count)}</text>')
    for a, b, n in zip(edges[:-1], edges[1:], counts.tolist(), strict=True):
        if n:
            tall = max(1.0, y(0) - y(n))
            parts.append(
                f'<rect class="bar" data-count="{n}" x="{x(a) + 0.5:.2f}" y="{y(0) - tall:.2f}" '
                f'width="{max(0.5, x(b) - x(a) - 1):.2f}" height="{tall:.2f}">'
                f"<title>{_number(a)} to {_number(b)} {escape(unit)}: {n:,} clips</title></rect>"
            )
    step = round_step(span / 6)
    for value in np.arange(math.ceil(edges[0] / step - 1e-9), math.floor(edges[-1] / step + 1e-9) + 1) * step:
        parts.append(f'<text x="{x(value):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_number(value)}</text>')
    parts.append(f'<text class="unit" x="{_LEFT + wide / 2:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(unit)}</text>')
    lost = len(values) - int(counts.sum())
    note = f'<p class="none">{lost:,} clips have no number here</p>' if lost else ""
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f'<figure class="chart">{head}{svg}{note}</figure>'


def bars(title: str, counts: Mapping[str, int], total: int, most: int = 30) -> str:
    """A figure with one horizontal bar a name, the most frequent first; `total` is what 100 % is."""
    shown = dict(list(counts.items())[:most])
    longest = max(shown.values(), default=1)
    rows = "".join(
        f'<li><span class="name" dir="auto">{escape(clean(name, 120)) or "(none)"}</span><span class="rail">'
        f'<span class="bar" style="width:{100 * n / longest:.2f}%"></span></span>'
        f'<span class="count">{n:,}</span><span class="share">{100 * n / max(total, 1):.3g} %</span></li>'
        for name, n in shown.items()
    )
    more = f'<p class="none">and {len(counts) - len(shown):,} more</p>' if len(counts) > len(shown) else ""
    body = f'<ol class="bars">{rows}</ol>{more}' if rows else '<p class="none">there are none</p>'
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{body}</figure>'


def clean(text: str, longest: int) -> str:
    """Text from outside, without control characters and halves of characters, cut to a length; it still needs to be escaped."""
    plain = "".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in text[: longest + 1])
    return plain if len(plain) <= longest else f"{plain[:longest]}…"


def short(number: float) -> str:
    """950, 12k, 3.4M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _number(value: float) -> str:
    return f"{float(value) + 0.0:.6g}".replace("-", "−")
