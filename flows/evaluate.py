"""The `evaluate` flow: trained encoders in, scores out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmacc.flows.progress import progress, table
from cmacc.flows.tracked import tracked
from cmacc.shards.dataset import Dataset
from cmacc.shards.options import change

# What scores brings torch; who only puts the flow on a server need not have it.
if TYPE_CHECKING:
    from cmacc.train.evaluation.files import EvaluationConfig
    from cmacc.train.evaluation.results import Result
    from cmacc.train.export.trained import Trained
    from cmacc.train.loading.loader import LoaderConfig

RETRIEVAL = "retrieval"


@tracked("evaluate")
def evaluate(
    model: str,
    on: list[str],
    split: str = "eval",
    gallery: str = "train",
    clips: int = 1_000,
    protocols: list[str] | None = None,
    views: int = 10,
    crops: int = 1,
    baselines: bool = True,
    finetune: bool = False,
    options: dict[str, Any] | None = None,
    out: str | None = None,
    cache: str | None = None,
    batch: int = 32,
) -> dict[str, Any]:
    """Score the encoders of `model` (a run's folder, a checkpoint or an export).

    on: `esc50:DIR`, `ucf101:DIR`, `hmdb51:DIR`, `folder:DIR`, `sounds:DIR`, `retrieval:DATASET`. split, gallery, clips: of
    retrieval, see `train.evaluation.clips`. protocols, views, crops, baselines, finetune: of files, see `EvaluationConfig`.
    options: changes to `FinetuneConfig` by name, `finetune.epochs`.
    out: a folder for JSON and pictures (default: evaluation/ in a run's folder). cache: a folder for features (default:
    features.zarr in it).
    Raises ValueError, CheckpointError or DatasetError with one sentence.
    """
    from cmacc.train.evaluation.files import EvaluationConfig, evaluate_files
    from cmacc.train.evaluation.finetune import FinetuneConfig
    from cmacc.train.evaluation.labelled import read_labelled
    from cmacc.train.evaluation.pictures import draw
    from cmacc.train.evaluation.protocols import PROTOCOLS
    from cmacc.train.evaluation.results import results_folder, write
    from cmacc.train.export.trained import load_trained
    from cmacc.train.loading.loader import LoaderConfig

    asked = tuple(PROTOCOLS if protocols is None else protocols)
    if options and not finetune:
        raise ValueError(f"option {next(iter(options))!r} is of fine-tuning; give --finetune, too")
    tuning = change(FinetuneConfig(), {name.removeprefix("finetune."): value for name, value in (options or {}).items()})
    config = EvaluationConfig(asked, views, crops, baselines, finetune=tuning if finetune else None)
    labelled = {spec: read_labelled(spec) for spec in _known(on) if not spec.startswith(f"{RETRIEVAL}:")}
    trained, loader = load_trained(model), LoaderConfig(batch=batch)
    if out is None and not Path(model, "config.json").is_file():
        raise ValueError(f"{model} is not a run's folder on this machine; give --out, a folder for the results")
    target = results_folder(model if out is None else out)
    kept = Path(cache) if cache else target / "features.zarr"
    results: list[Result] = []
    for spec in on:
        if spec in labelled:
            found = evaluate_files(trained, labelled[spec], loader, config, cache=kept, stage=progress)
        else:
            found = _retrieval(trained, loader, spec.partition(":")[2], split, gallery, clips, config)
        paths = write(target, found)
        results += found
    paths = [*(target / f"{task}.json" for task in dict.fromkeys(r.task for r in results)), *draw(target, results)]
    heads, rows = scores_table(results)
    table("evaluate-scores", [{"score": name, **dict(zip(heads, values, strict=True))} for name, values in rows.items()])
    first = next((r for r in results if r.protocol == RETRIEVAL and r.encoder == "trained"), None)
    return {
        "model": model, "step": trained.step, "results": [asdict(r) for r in results], "written": [str(path) for path in paths],
        RETRIEVAL: {"clips": first.over, **first.facts} if first else None,
    }  # fmt: skip


def _known(on: Sequence[str]) -> Sequence[str]:
    from cmacc.train.evaluation.labelled import LAYOUTS

    layouts = f"{', '.join(f'{name}:DIR' for name in LAYOUTS)} or {RETRIEVAL}:DATASET"
    if not on:
        raise ValueError(f"there is nothing to evaluate on; give --on {layouts}")
    for spec in on:
        layout, _, place = spec.partition(":")
        if layout not in (*LAYOUTS, RETRIEVAL) or not place:
            raise ValueError(f"{spec!r} names nothing to evaluate on; give --on {layouts}")
    return on


def _retrieval(
    trained: Trained, loader: LoaderConfig, data: str, split: str, gallery: str, clips: int, config: EvaluationConfig
) -> list[Result]:
    from cmacc.train.evaluation.baselines import untrained
    from cmacc.train.evaluation.clips import retrieve
    from cmacc.train.evaluation.files import weights

    encoders = {"trained": (trained.video, trained.audio)}
    if config.baselines:
        encoders["random"] = untrained(trained.encoders, "video", config.seed), untrained(trained.encoders, "audio", config.seed)
    with progress("retrieval", total=0) as tell:
        found = retrieve(
            Dataset.open(data), encoders, trained.view, loader, split=split, gallery=gallery, clips=clips, views=config.views,
            on_progress=lambda done, total: tell(done, "views", total),
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
