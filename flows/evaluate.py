"""The `evaluate` flow: trained encoders in, scores out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cmacc.flows.progress import table
from cmacc.flows.tracked import tracked
from cmacc.shards.dataset import Dataset
from cmacc.train.loader import LoaderConfig
from cmacc.train.probe import linear_probe, read_labelled_sounds, sound_features
from cmacc.train.retrieval import embed, held_out_rows, retrieval
from cmacc.train.trained import load_trained


@tracked("evaluate")
def evaluate(
    model: str,
    data: str | None = None,
    split: str = "eval",
    clips: int = 1_000,
    sounds: str | None = None,
    out: str | None = None,
    batch: int = 32,
) -> dict[str, Any]:
    """Score the encoders of `model` (a run's folder, a checkpoint or an export).

    data, split, clips: cross-modal retrieval among at most so many clips of that split of a data set. sounds: linear
    probe on a folder in ESC-50's layout. out: a JSON file for the scores (default: evaluation.json in a run's folder).
    Raises ValueError, CheckpointError or DatasetError with one sentence.
    """
    if not data and not sounds:
        raise ValueError("there is nothing to evaluate on; give --data, a data set, or --sounds, a folder in ESC-50's layout")
    trained, loader = load_trained(Path(model)), LoaderConfig(batch=batch)
    scores: dict[str, Any] = {"model": model, "step": trained.step}
    if data:
        dataset = Dataset.open(data)
        held_out = held_out_rows(dataset, split, clips)
        if len(held_out) < 2:
            raise ValueError(f"split {split!r} of {data} has {len(held_out)} clip; retrieval needs 2 or more")
        found = embed(dataset, held_out, trained.view, loader, trained.video, trained.audio)
        scores["retrieval"] = {"data": data, "split": split, "clips": len(found.ids), **retrieval(found)}
    if sounds:
        labelled = read_labelled_sounds(Path(sounds))
        features = sound_features(trained, labelled.files, loader)
        scores["linear_probe"] = {
            "sounds": sounds, "files": len(labelled.files), **linear_probe(features, labelled.labels, labelled.folds),
        }  # fmt: skip
    target = Path(out) if out else Path(model) / "evaluation.json" if Path(model).is_dir() else None
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(scores, indent=2) + "\n")
    rows = [
        {"score": f"{kind}/{k}", "value": v} for kind in ("retrieval", "linear_probe") for k, v in scores.get(kind, {}).items()
    ]
    table("evaluate-scores", rows)
    return scores
