"""A run as one HTML page that needs nothing else: what it is, how it learns, what its encoders can do, and what it costs.

All that comes from files is escaped, and the page forbids any address outside it. A run in mid-training has a page as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path

from cmacc.shards.options import flatten, meanings
from cmacc.shards.page.charts import clean
from cmacc.shards.page.document import document
from cmacc.shards.place import public_address
from cmacc.shards.publish import publish
from cmacc.train.config import PretrainConfig, to_json
from cmacc.train.report import lines, pieces, scores
from cmacc.train.report.charts import charts
from cmacc.train.report.facts import Run, cost, differences, read_run
from cmacc.train.report.pieces import facts, folded, many, table, value

_LISTED = 10
_MOST = 200


def write_report(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    examples: int = 4,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the page of a run, as `report.html` in its folder or as `out`; it appears whole. Returns its path.

    examples: held-out clips to play, each with the sounds nearest to its picture, where checkpoint and data set can be reached;
    0: none. on_progress: called with how many clips are embedded, of how many. Raises ValueError when the folder is not that of
    a run of this version, OSError.
    """
    found = read_run(run)
    body = [
        *_head(found),
        *_configuration(found),
        *_troubles(found),
        *charts(found),
        *scores.held_out_table(found),
        *scores.evaluations(found),
        *scores.examples(found, examples, on_progress),
        *_cost(found),
    ]
    path = found.folder / "report.html" if out is None else Path(out)
    page = document(f"{_name(found)}: a report", lines.STYLE + pieces.STYLE + "".join(body))
    publish(path, page.encode("utf-8", "replace"))
    return path


# --- what it is ---


def _head(run: Run) -> Iterator[str]:
    config = run.config
    yield f"<header><h1>{escape(_name(run))}</h1>"
    state = "finished" if run.step >= config.steps else "not finished"
    yield f'<p class="quiet">{escape(_in_words(config))} Step {run.step:,} of {config.steps:,}: {state}.</p>'
    tiles = {"steps": f"{run.step:,}", "clips seen": f"{run.clips_seen:,}"}
    names = (("R@5", "held-out R@5"), ("class@1", "class of the first"), ("knn_both", "held-out k-NN"))
    for name, what in names:
        found, chance = run.last(f"held_out/{name}"), run.last(f"held_out/chance_{name.replace('_both', '')}")
        if found is not None and chance is not None:
            tiles[what] = f"{found:.1%} <small>chance {chance:.1%}</small>"
    yield f'<dl class="tiles">{"".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in tiles.items())}</dl>'
    versions = (run.checkpoint or {}).get("versions", {})
    told = {
        "folder": str(run.folder),
        "learns from": ", ".join(map(public_address, run.data)),
        "encoders": f"{config.encoders.video} and {config.encoders.audio}, {config.encoders.width} numbers a clip",
        "latest checkpoint": f"of step {run.checkpoint['step']:,}" if run.checkpoint else run.trouble,
        "written by": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }
    yield facts(told)
    yield "</header>"


def _in_words(config: PretrainConfig) -> str:
    objective = config.objective
    if not objective.uses_keys:
        return "Contrastive learning across modalities, with negatives from the batch alone."
    negatives = {"dictionary": "a dictionary", "batch+dictionary": "the batch and a dictionary"}.get(
        objective.negatives, objective.negatives
    )
    how = "filled in turn" if objective.selector == "fifo" else f"filled by {objective.selector}"
    return f"Contrastive learning across modalities, with negatives from {negatives} of {objective.dictionary:,} keys, {how}."


def _troubles(run: Run) -> Iterator[str]:
    if not (run.alarms or run.quarantined or run.failed):
        return
    yield "<h2>What went wrong</h2>"
    for alarm in run.alarms[-_LISTED:]:
        said = f"{alarm.get('sentence', '')} ({alarm.get('action', '')})"
        yield f'<p class="alarm">{escape(clean(said, 1000))}</p>'
    if run.failed:
        first = f"cmacc replay {run.folder / 'failed' / run.failed[0]}"
        yield f"<p>Batches of {many(len(run.failed), 'step')} that failed are kept: <code>{escape(first)}</code></p>"
    if run.quarantined:
        found = {str(bad.get("key", "")): str(bad.get("reason", "")) for bad in run.quarantined[:_MOST]}
        said = f"{many(len(run.quarantined), 'clip')} did not decode, and others were taken in their place"
        yield folded(said, facts(found))


# --- what it costs, and all it was told ---


def _cost(run: Run) -> Iterator[str]:
    yield f"<h2>Cost</h2>{facts(cost(run))}"


def _configuration(run: Run) -> Iterator[str]:
    name, changed = differences(run.config)
    yield "<h2>Configuration</h2>"
    if changed:
        yield f"<p>Nearest to the recipe <code>{escape(name)}</code>, but for:</p>"
        yield table(["option", "here", "there"], [[o, value(a), value(b)] for o, (a, b) in changed.items()])
    else:
        yield f"<p>It is the recipe <code>{escape(name)}</code>, unchanged.</p>"
    told = meanings(PretrainConfig)
    rows = [[o, value(it), told.get(o, "").partition(". ")[0]] for o, it in flatten(to_json(run.config)).items()]
    yield folded(f"All {len(rows)} options", table(["option", "value", "what it is"], rows, text=(2,)))


def _name(run: Run) -> str:
    return clean(run.folder.resolve().name, 200)
