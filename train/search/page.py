"""A search as one HTML page: what was asked, and the clips that were found, to see and hear."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

from cmacc.shards.dataset import Dataset
from cmacc.shards.page.charts import clean
from cmacc.shards.page.document import document
from cmacc.shards.place import public_address
from cmacc.shards.publish import publish
from cmacc.train.search.gallery import gallery
from cmacc.train.search.query import Found

_WORDS = {"video": "picture", "audio": "sound"}


def write_search_page(dataset: Dataset, found: Found, path: str | os.PathLike[str]) -> Path:
    """Write it as one file that needs nothing else; it appears whole. Returns its path. Raises OSError, DatasetError."""
    key = "" if found.query.row is None else dataset.texts("key", [found.query.row])[0]
    asked = clean(found.query.name or key, 200)
    title = f"{_WORDS[found.to].capitalize()}s nearest to the {_WORDS[found.by]} of {asked}"
    facts = {
        "data set": f"{public_address(dataset.url)}, {len(dataset):,} clips",
        "model": found.model,
        "order": "by cosine of the embeddings, all clips compared",
        "skipped": f"{found.skipped:,} clip{'s' * (found.skipped > 1)} without an embedding" if found.skipped else "",
    }
    told = "".join(f'<dt>{k}</dt><dd dir="auto">{escape(clean(v, 500))}</dd>' for k, v in facts.items() if v)
    head = f'<header><h1>{escape(title)}</h1><dl class="facts">{told}</dl></header>'
    note = '<p class="quiet">Click a clip to play it, and again to pause; on its button, the arrow keys move by 1 s.</p>'
    body = f"{head}<h2>{len(found.hits)} nearest</h2>{note}{gallery(dataset, [(found.query, found.hits)])}"
    page = Path(path)
    publish(page, document(title, body).encode("utf-8", "replace"))
    return page
