"""Curves as inline SVG, in the look of `shards.page`: no script, crisp at any width, each point told where the pointer is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from cmacc.shards.page.charts import round_step, short

Point = tuple[float, float | None]
Drawn = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Steps and values, NaN in gaps."""

STYLE = """<style>
:root { --s1: #2460c8; --s2: #c2410c; --s3: #1a7f37; --s4: #7c3fc4; --s5: #b3202c; --s6: #0f7c86; }
@media (prefers-color-scheme: dark) {
  :root { --s1: #8ab4ff; --s2: #ff9d5c; --s3: #5fd38a; --s4: #c4a0ff; --s5: #ff8f8f; --s6: #5cd0da; }
}
.curves { grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
.chart path { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; vector-effect: non-scaling-stroke; }
.chart path.chance { stroke-dasharray: 4 4; stroke-width: 1.4; }
.s1 { stroke: var(--s1); } .s2 { stroke: var(--s2); } .s3 { stroke: var(--s3); }
.s4 { stroke: var(--s4); } .s5 { stroke: var(--s5); } .s6 { stroke: var(--s6); } .s0 { stroke: var(--quiet); }
.chart .band { fill: var(--accent); fill-opacity: 0; }
.chart .band:hover { fill-opacity: .14; }
.legend { display: flex; flex-wrap: wrap; gap: .05rem .9rem; margin: 0 0 .35rem; padding: 0; list-style: none; }
.legend li { font-size: .82rem; }
.legend svg { width: 18px; height: 8px; display: inline-block; margin-right: .35rem; }
.legend b { font-weight: 600; font-variant-numeric: tabular-nums; }
</style>"""

_WIDTH, _HEIGHT = 360, 200  # of a chart, in its own units
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 8, 36
_POINTS = 240  # drawn of a line at most; more are averaged
_BANDS = 40


@dataclass(frozen=True)
class Line:
    """points: (step, value), by step; a value that is None or not finite leaves a gap. colour: 1 to 6 of the palette, 0 is quiet.
    chance: drawn dashed, as what is to be beaten."""

    label: str
    points: Sequence[Point]
    colour: int
    chance: bool = False

    @property
    def last(self) -> float | None:
        """The last value that is a number."""
        return next((v for _, v in reversed(self.points) if v is not None and math.isfinite(v)), None)


def line_chart(title: str, lines: Sequence[Line], *, note: str = "", share: bool = False) -> str:
    """A figure with axes, a legend that tells last values, and a band for each part of the steps that tells those there.

    note: a sentence below. share: the values are 0..1, and so is the axis. Without any number there is no figure: "".
    """
    lines = [line for line in lines if line.last is not None]
    if not lines:
        return ""
    thin = [_thinned(line.points) for line in lines]
    across = max(float(steps[-1]) for steps, _ in thin) or 1.0
    values = np.concatenate([v for _, v in thin])
    values = values[np.isfinite(values)]
    low, high, rise = (0.0, 1.0, 0.25) if share else _range(float(values.min()), float(values.max()))
    wide, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(step: float) -> float:
        return _LEFT + wide * step / across

    def y(value: float) -> float:
        return _TOP + tall * (high - min(max(value, low), high)) / (high - low)

    parts = []
    for value in np.arange(low, high + rise / 2, rise):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{_said(value)}</text>')
    for step in np.arange(0, across * 1.001, round_step(across / 4)):
        anchor = "end" if x(step) > _WIDTH - 24 else "middle"
        parts.append(f'<text x="{x(step):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="{anchor}">{short(step)}</text>')
    parts.append(f'<text x="{_LEFT + wide / 2:.1f}" y="{_HEIGHT - 5}" text-anchor="middle">step</text>')
    for line, (steps, drawn) in zip(lines, thin, strict=True):
        path = _path([(x(s), y(v)) if math.isfinite(v) else None for s, v in zip(steps.tolist(), drawn.tolist(), strict=True)])
        parts.append(f'<path class="s{line.colour}{" chance" if line.chance else ""}" d="{path}"/>')
    parts += _bands(lines, thin, across, x, tall)
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    told = f'<p class="none">{escape(note)}</p>' if note else ""
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{_legend(lines)}{svg}{told}</figure>'


def _legend(lines: Sequence[Line]) -> str:
    items = []
    for line in lines:
        stroke = f'<path class="s{line.colour}{" chance" if line.chance else ""}" d="M0 4H18"/>'
        mark = f'<svg viewBox="0 0 18 8" aria-hidden="true">{stroke}</svg>'
        items.append(f"<li>{mark}{escape(line.label)} <b>{_said(line.last or 0.0)}</b></li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _bands(
    lines: Sequence[Line],
    thin: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
    across: float,
    x: Callable[[float], float],
    tall: float,
) -> list[str]:
    """Invisible columns; the one under the pointer is lit and tells the values nearest to its middle."""
    count = min(_BANDS, max(len(steps) for steps, _ in thin))
    width, found = across / count, []
    for i in range(count):
        middle = (i + 0.5) * width
        told = []
        for line, (steps, values) in zip(lines, thin, strict=True):
            at = int(np.abs(steps - middle).argmin())
            if math.isfinite(values[at]):
                told.append(f"{line.label}: {_said(float(values[at]))}")
        left, right = x(i * width), x((i + 1) * width)
        said = escape("\n".join([f"about step {middle:,.0f}", *told]))
        place = f'x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" height="{tall}"'
        found.append(f'<rect class="band" {place}><title>{said}</title></rect>')
    return found


def _thinned(points: Sequence[Point]) -> Drawn:
    """Means of runs of points, where there are more than can be told apart."""
    steps = np.array([step for step, _ in points], dtype=np.float64)
    values = np.array([math.nan if value is None else value for _, value in points], dtype=np.float64)
    values[~np.isfinite(values)] = math.nan
    if len(steps) <= _POINTS:
        return steps, values
    runs = np.array_split(np.arange(len(steps)), _POINTS)
    means = [float(np.nanmean(values[run])) if np.isfinite(values[run]).any() else math.nan for run in runs]
    return np.array([steps[run].mean() for run in runs]), np.array(means)


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    """A point by itself is a line of no length, which a round cap shows."""
    text, begun = [], False
    for point in points:
        if point is None:
            begun = False
            continue
        text.append(f"{'L' if begun else 'M'}{point[0]:.1f} {point[1]:.1f}" + ("" if begun else "h0"))
        begun = True
    return "".join(text)


def _range(least: float, most: float) -> tuple[float, float, float]:
    """Ends and rise of an axis at round numbers; from 0 where that costs less than half of it."""
    if least >= 0 and (least < 0.6 * most or least == most):
        least = 0.0
    elif most <= 0 and most > 0.6 * least:
        most = 0.0
    rise = round_step((most - least) / 4 or abs(most) / 4 or 1.0)
    low, high = math.floor(least / rise + 1e-9) * rise, math.ceil(most / rise - 1e-9) * rise
    return low, high if high > low else low + rise, rise


def _said(value: float) -> str:
    if value and abs(value) < 1e-4:
        return f"{value:.1e}".replace("-", "−").replace("e−0", "e−")
    text = short(value) if value >= 10_000 else f"{value:.4g}" if abs(value) >= 1000 else f"{round(value, 10):.3g}"
    return text.replace("-", "−")
