"""Queries and the clips nearest to them, as HTML with clips that play; all in it that came from outside is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from cmacc.shards.dataset import Dataset
from cmacc.shards.page.cards import card, chips, look_at
from cmacc.shards.page.charts import clean
from cmacc.shards.page.preview import Preview, preview

_AT_ONCE = 4
_MARKS = {"": "", "own": "its own", "class": "same label", "other": "another label"}
_STYLE = """<style>
.near { margin: .9rem 0 2.2rem; }
.near > .sheet { grid-template-columns: repeat(auto-fill, minmax(min(100%, 240px), 1fr)); }
.near .asked { border: 2px solid var(--accent); }
.rank { display: flex; flex-wrap: wrap; gap: .2rem .8rem; font-variant-numeric: tabular-nums; font-size: .9rem; }
.rank b { font-weight: 600; }
.own .rank i, .class .rank i, .other .rank i { font-style: normal; padding: 0 .5rem; border-radius: 99px; color: #fff; }
.own .rank i { background: #1a7f37; }
.class .rank i { background: #8a5a00; }
.other .rank i { background: #b3202c; }
</style>"""


@dataclass(frozen=True)
class Shown:
    """A clip on a page: a row of the data set, or media of elsewhere by their members, e.g. `{"flac": bytes}`.

    by: what of it is compared. cosine: with the query. mark: of a hit, in words and colour: the query's own clip, one with its
    label, one with another. name: its heading (default: its key).
    """

    row: int | None = None
    members: Mapping[str, bytes] = field(default_factory=dict)
    by: Literal["", "video", "audio"] = ""
    cosine: float | None = None
    mark: Literal["", "own", "class", "other"] = ""
    name: str = ""

    def __post_init__(self) -> None:
        if (self.row is None) == (not self.members):
            raise ValueError("a clip of a gallery has either a row or members; give one of them")


def gallery(dataset: Dataset, rows: Sequence[tuple[Shown, Sequence[Shown]]]) -> str:
    """A section for each query with its hits, in the order given: HTML for the body of `shards.page.document.document`, whose
    style and script it needs and nothing else.

    A clip weighs as much as its media; one that cannot be read or decoded has a card that says so. Raises DatasetError for the
    catalog itself.
    """
    wanted = list(dict.fromkeys(s.row for query, hits in rows for s in (query, *hits) if s.row is not None))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        seen = dict(zip(wanted, pool.map(lambda row: look_at(dataset, row)[1], wanted), strict=True))
    return _STYLE + "".join(_section(dataset, query, hits, seen) for query, hits in rows)


def _section(dataset: Dataset, query: Shown, hits: Sequence[Shown], seen: Mapping[int, Preview]) -> str:
    cards = [_card(dataset, query, seen, "<b>query</b>", "asked")]
    cards += [_card(dataset, hit, seen, f"<b>{rank}</b>", hit.mark) for rank, hit in enumerate(hits, start=1)]
    none = "" if hits else '<p class="none">no clip was found</p>'
    return f'<section class="near"><div class="sheet">{"".join(cards)}</div>{none}</section>'


def _card(dataset: Dataset, shown: Shown, seen: Mapping[int, Preview], rank: str, classes: str) -> str:
    if shown.row is None:
        look, name, labels = preview(dict(shown.members)), "a file", ""
    else:
        here, look = slice(shown.row, shown.row + 1), seen[shown.row]
        name = str(dataset.catalog.texts("key", here)[0])
        labels = chips(dataset.catalog.labels(here)[0], str(dataset.catalog.texts("split", here)[0]))
    facts = [rank]
    if shown.cosine is not None:
        facts.append(f"<span>cosine {shown.cosine:.3f}</span>".replace("-", "−"))
    if shown.by:
        facts.append(f"<span>by its {'picture' if shown.by == 'video' else 'sound'}</span>")
    if shown.mark:
        facts.append(f"<i>{_MARKS[shown.mark]}</i>")
    told = f'<p class="rank">{"".join(facts)}</p>{labels}'
    return card(look, clean(shown.name or name, 300), told, classes=classes)
