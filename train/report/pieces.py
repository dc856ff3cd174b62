"""What a report is made of: tables, lists of facts, numbers in words. What is given is plain text, and is escaped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from cmacc.shards.page.charts import clean

STYLE = """<style>
.wrap { overflow-x: auto; background: var(--sheet); border: 1px solid var(--line); border-radius: 10px; }
.wrap table { border-collapse: collapse; width: 100%; font-size: .9rem; overflow-wrap: normal; }
.wrap th, .wrap td { padding: .35rem .75rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
.wrap td.text { white-space: normal; min-width: 12rem; }
.wrap tr:last-child td { border-bottom: 0; }
.wrap th { color: var(--quiet); font-weight: 500; white-space: normal; vertical-align: bottom; }
@media (max-width: 600px) {
  .wrap table { font-size: .8rem; }
  .wrap th, .wrap td { padding: .3rem .35rem; }
  .wrap td:first-child { white-space: normal; }
  .pictures figure { overflow-x: auto; }
  .pictures figure img { width: auto; min-width: 460px; max-width: none; }
  body .near > .sheet { grid-template-columns: 1fr 1fr; gap: .5rem; }
  .near .said { padding: .4rem .5rem .5rem; }
  .near .key { font-size: .7rem; }
}
.wrap .number { text-align: right; font-variant-numeric: tabular-nums; }
.told { margin: .6rem 0; }
.told + .told { margin-top: 1.2rem; }
.told h3 { font-size: 1rem; margin: 1.2rem 0 .5rem; }
.pictures { display: grid; gap: .9rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); }
.pictures figure { margin: .9rem 0 0; }
.pictures img { width: 100%; height: auto; border-radius: 10px; border: 1px solid var(--line); background: #fff; }
.tiles small { display: block; font-weight: 400; font-size: .8rem; color: var(--quiet); }
.alarm { border-left: 4px solid var(--warn); padding: .35rem .9rem; background: var(--sheet); margin: .5rem 0; }
</style>"""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (), text: Sequence[int] = ()) -> str:
    """numbers: columns set to the right, besides those of shares. text: columns that may be long."""

    def kind(i: int) -> str:
        shares = bool(rows) and all(row[i].endswith("%") or row[i] == NONE for row in rows)
        return "number" if shares or i in numbers else "text" if i in text else ""

    kinds = [kind(i) for i in range(len(heads))]
    head = "".join(f'<th class="{kind}">{escape(name)}</th>' for kind, name in zip(kinds, heads, strict=True))
    lines = [
        "".join(f'<td class="{kind}">{escape(clean(cell, 1000))}</td>' for kind, cell in zip(kinds, row, strict=True))
        for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wrap" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(lines: Mapping[str, str]) -> str:
    """Names with what is to be said of each; what is empty is left out."""
    told = "".join(f'<dt>{escape(clean(k, 200))}</dt><dd dir="auto">{escape(clean(v, 2000))}</dd>' for k, v in lines.items() if v)
    return f'<dl class="facts">{told}</dl>'


def folded(title: str, body: str) -> str:
    """body: HTML."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


NONE = "–"


def percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.1%}"


def value(of: Any) -> str:
    """An option's value as it is typed."""
    return f"{of:g}" if isinstance(of, float) else json.dumps(of) if isinstance(of, (bool, str)) else str(of)


def many(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"
