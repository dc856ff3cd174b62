"""What a run's encoders can do: held-out retrieval, evaluations on labelled data, and clips with their nearest sounds."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal

from cmacc.shards.page.charts import clean
from cmacc.train.evaluation.results import Result, read_results, results_folder
from cmacc.train.evaluation.retrieval import RANKS
from cmacc.train.report.facts import Run
from cmacc.train.report.nearest import Hit, evenly_over_labels, held_out, nearest_sounds
from cmacc.train.report.pieces import folded, many, percent, table
from cmacc.train.search.gallery import Shown, gallery

NEAREST = 3
_PICTURES = ("confusion", "classes")
_PICTURE_BYTES = 4 << 20


def held_out_table(run: Run) -> Iterator[str]:
    """The last retrieval among held-out clips, each direction, their mean and chance; nothing where there was none."""
    look = next((record for record in reversed(run.records) if "held_out/R@1" in record), None)
    if look is None:
        return
    ways = (("video_to_audio/", "picture → sound"), ("audio_to_video/", "sound → picture"), ("", "mean"), ("chance_", "chance"))
    names = [*(f"R@{k}" for k in RANKS), "class@1", *(f"same_class_R@{k}" for k in RANKS)]
    rows = []
    for name in names:
        cells = [look.get(f"held_out/{way}{name}") for way, _ in ways]
        if cells[-1] is not None and cells[-1] < 1:
            label = name.replace("same_class_", "") + (" in its class" if name.startswith("same") else "")
            rows.append([label, *(percent(cell) for cell in cells)])
    yield f"<h2>Held-out retrieval at step {look['step']:,}</h2>"
    yield table(["", *(label for _, label in ways)], rows)


def evaluations(run: Run) -> Iterator[str]:
    yield "<h2>Evaluation</h2>"
    try:
        results = read_results(run.folder)
    except ValueError as error:
        yield f'<p class="trouble">{escape(clean(str(error), 500))}.</p>'
        return
    if not results:
        command = f"cmacc evaluate {run.folder} --on esc50:DIR"
        yield f"<p>Its encoders were not tried on other data yet: <code>{escape(command)}</code> adds a table here.</p>"
    for task in dict.fromkeys(result.task for result in results):
        yield from _task([result for result in results if result.task == task], results_folder(run.folder))


def _task(results: Sequence[Result], folder: Path) -> Iterator[str]:
    """A row for each protocol, a column for each encoder; what the scores depend on is folded."""
    task, encoders = results[0].task, list(dict.fromkeys(result.encoder for result in results))
    rows = []
    for protocol in dict.fromkeys(result.protocol for result in results):
        found = {result.encoder: result for result in results if result.protocol == protocol}
        first = next(iter(found.values()))
        scores = [percent(found[name].score if name in found else None) for name in encoders]
        rows.append([protocol, *scores, percent(first.chance), f"{first.over:,}"])
    yield f'<div class="told"><h3>{escape(clean(task, 100))}</h3>'
    yield table(["", *encoders, "chance", "over"], rows, numbers=(len(encoders) + 2,))
    left_out = {name: why for result in results for name, why in result.left_out.items()}
    notes = [*dict.fromkeys(note for result in results for note in result.notes)]
    if left_out:
        notes.append(f"{many(len(left_out), 'file')} left out: {_first(left_out)}")
    yield "".join(f'<p class="quiet">{escape(clean(note, 600))}</p>' for note in notes)
    details = [
        {
            "encoder": r.encoder,
            "protocol": r.protocol,
            "splits": r.splits,
            "settings": r.settings,
            "other numbers": r.facts,
            "versions": r.versions,
        }
        for r in results
    ]
    yield folded("Splits, settings and versions", f"<pre>{escape(_json(details))}</pre>")
    pictures = [made for name in _PICTURES if (made := _picture(folder / f"{task}-{name}.png"))]
    if pictures:
        yield f'<div class="pictures">{"".join(pictures)}</div>'
    yield "</div>"


def _picture(path: Path) -> str:
    data = path.read_bytes() if path.is_file() and path.stat().st_size <= _PICTURE_BYTES else b""
    if not data.startswith(b"\x89PNG"):
        return ""
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return f'<figure><img alt="{escape(clean(path.stem, 200))}" src="{source}"></figure>'


def examples(run: Run, count: int, on_progress: Callable[[int, int], None] | None) -> Iterator[str]:
    """Whatever keeps the clips from being shown is told, and the page goes without them."""
    if count < 1:
        return
    yield "<h2>Pictures and the sounds nearest to them</h2>"
    if run.checkpoint is None:
        yield f'<p class="none">{escape(run.trouble)} So no clip can be looked up.</p>'
        return
    try:
        step, dataset, embedded = held_out(run.folder, run.data[0], run.config, on_progress)
        rows = []
        for query in evenly_over_labels(embedded, count):
            hits = nearest_sounds(dataset, embedded, query, NEAREST)
            found = [Shown(row=hit.row, by="audio", cosine=hit.cosine, mark=_mark(hit)) for hit in hits]
            rows.append((Shown(row=int(embedded.ids[query]), by="video"), found))
        said = f"Of {len(embedded.ids):,} held-out clips, by the encoders of step {step:,}. Click a clip to play it."
        yield f"<p>{said}</p>"
        yield gallery(dataset, rows)
    except Exception as error:  # a data set that has moved, a bucket that is gone: each has errors of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        yield f'<p class="none">Its clips cannot be shown: {escape(clean(reason, 500))}.</p>'


def _mark(hit: Hit) -> Literal["", "own", "class", "other"]:
    if hit.own or hit.same is None:
        return "own" if hit.own else ""
    return "class" if hit.same else "other"


def _json(thing: Any) -> str:
    return json.dumps(thing, indent=1, ensure_ascii=False)[:200_000]


def _first(left_out: dict[str, str]) -> str:
    shown = "; ".join(f"{name} ({why})" for name, why in list(left_out.items())[:3])
    return shown + (f" and {len(left_out) - 3:,} more" if len(left_out) > 3 else "")
