"""The scores of trained encoders: what is asked is opened, checked, scored, kept and drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cmacc.flows.progress import progress, table
from cmacc.shards.dataset import Dataset
from cmacc.shards.options import change
from cmacc.train.evaluation.baselines import untrained
from cmacc.train.evaluation.clips import retrieve
from cmacc.train.evaluation.files import EvaluationConfig, evaluate_files, weights
from cmacc.train.evaluation.finetune import FinetuneConfig
from cmacc.train.evaluation.labelled import LAYOUTS, Labelled, read_labelled
from cmacc.train.evaluation.pictures import draw
from cmacc.train.evaluation.protocols import PROTOCOLS
from cmacc.train.evaluation.results import Result, read_task, results_folder, write
from cmacc.train.evaluation.splits import task_name
from cmacc.train.export.trained import Trained, load_trained
from cmacc.train.loading.loader import LoaderConfig

RETRIEVAL = "retrieval"


def score(
    model: str,
    on: Sequence[str],
    *,
    split: str,
    gallery: str,
    clips: int,
    protocols: Sequence[str] | None,
    views: int,
    crops: int,
    baselines: bool,
    finetune: bool,
    options: Mapping[str, Any] | None,
    out: str | None,
    cache: str | None,
    batch: int,
) -> dict[str, Any]:
    """See the flow `evaluate`, whose parameters these are."""
    asked = tuple(PROTOCOLS if protocols is None else protocols)
    if options and not finetune:
        raise ValueError(f"option {next(iter(options))!r} is of fine-tuning; give --finetune, too")
    tuning = change(FinetuneConfig(), {name.removeprefix("finetune."): value for name, value in (options or {}).items()})
    config = EvaluationConfig(asked, views, crops, baselines, finetune=tuning if finetune else None)
    asked_on = {spec: _opened(spec) for spec in _known(on)}
    tasks = _tasks(asked_on)
    trained, loader = load_trained(model), LoaderConfig(batch=batch)
    if out is None and not Path(model, "config.json").is_file():
        raise ValueError(f"{model} is not a run's folder on this machine; give --out, a folder for the results")
    target = results_folder(model if out is None else out)
    for task in tasks:  # what cannot be added to is told before the work
        read_task(target, task)
    kept = Path(cache) if cache else target / "features.zarr"
    results: list[Result] = []
    paths: list[Path] = []
    for data in asked_on.values():
        if isinstance(data, Labelled):
            found = evaluate_files(trained, data, loader, config, cache=kept, stage=progress)
        else:
            found = _retrieval(trained, loader, data, split, gallery, clips, config, kept)
        paths += write(target, found)
        results += found
    for task in tasks:
        paths += draw(target, read_task(target, task))
    heads, rows = scores_table(results)
    table("evaluate-scores", [{"score": name, **dict(zip(heads, values, strict=True))} for name, values in rows.items()])
    first = next((r for r in results if r.protocol == RETRIEVAL and r.encoder == "trained"), None)
    return {
        "model": model, "step": trained.step, "results": [asdict(r) for r in results], "written": [str(path) for path in paths],
        RETRIEVAL: {"clips": first.over, **first.facts} if first else None,
    }  # fmt: skip


def _known(on: Sequence[str]) -> Sequence[str]:
    layouts = f"{', '.join(f'{name}:DIR' for name in LAYOUTS)} or {RETRIEVAL}:DATASET"
    if not on:
        raise ValueError(f"there is nothing to evaluate on; give --on {layouts}")
    for spec in on:
        layout, _, place = spec.partition(":")
        if layout not in (*LAYOUTS, RETRIEVAL) or not place:
            raise ValueError(f"{spec!r} names nothing to evaluate on; give --on {layouts}")
    return on


def _opened(spec: str) -> Labelled | Dataset:
    layout, _, place = spec.partition(":")
    return Dataset.open(place) if layout == RETRIEVAL else read_labelled(spec)


def _tasks(asked_on: Mapping[str, Labelled | Dataset]) -> list[str]:
    """What each is called, in names of files and in tables. Raises ValueError where two would be called the same."""
    named: dict[str, str] = {}
    for spec, data in asked_on.items():
        task = data.name if isinstance(data, Labelled) else task_name(RETRIEVAL, data.url)
        if task in named:
            said = f"{named[task]} and {spec} would both be called {task!r}"
            raise ValueError(f"{said}; evaluate on one at a time, each with a --out of its own, or rename a folder")
        named[task] = spec
    return list(named)


def _retrieval(
    trained: Trained,
    loader: LoaderConfig,
    data: Dataset,
    split: str,
    gallery: str,
    clips: int,
    config: EvaluationConfig,
    cache: Path,
) -> list[Result]:
    encoders = {"trained": (trained.video, trained.audio)}
    if config.baselines:
        encoders["random"] = untrained(trained.encoders, "video", config.seed), untrained(trained.encoders, "audio", config.seed)
    with progress("retrieval", total=0) as tell:
        found = retrieve(
            data, encoders, trained.view, loader, split=split, gallery=gallery, clips=clips, views=config.views,
            cache=cache, on_progress=lambda done, total: tell(done, "views", total),
        )  # fmt: skip
    about = {"step": trained.step, "weights": weights(trained), "seed": config.seed}
    return [replace(result, settings=result.settings | about) for result in found]


_SHOWN = {RETRIEVAL: ("R@1", "R@5", "R@10", "class@1"), "within video": ("R@1", "R@5"), "within audio": ("R@1", "R@5")}


def scores_table(results: Sequence[Result]) -> tuple[list[str], dict[str, list[str]]]:
    """Heads and rows: what was tried on what, each encoder beside chance, and over how many files."""
    encoders = list(dict.fromkeys(result.encoder for result in results))
    rows: dict[str, list[str]] = {}
    for task, protocol in dict.fromkeys((result.task, result.protocol) for result in results):
        each = {r.encoder: r for r in results if (r.task, r.protocol) == (task, protocol)}
        first = next(iter(each.values()))
        for fact in [f for f in _SHOWN.get(protocol, ()) if f in first.facts] or [""]:
            scores = {name: r.facts[fact] if fact else r.score for name, r in each.items()}
            chance = first.facts[f"chance_{fact}"] if fact else first.chance
            shown = [f"{scores[name]:.1%}" if name in scores else "" for name in encoders]
            how = "" if protocol == RETRIEVAL else f", {protocol}"
            rows[f"{task}{how} {fact}".strip()] = [*shown, f"{chance:.1%}", str(first.over)]
    return [*encoders, "chance", "over"], rows
