"""The `evaluate` flow: trained encoders in, scores out."""

from __future__ import annotations

from typing import Any

from cmacc.flows.tracked import tracked


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
    from cmacc.flows.scoring import score  # brings torch, which who only puts the flow on a server need not have

    return score(
        model, on, split=split, gallery=gallery, clips=clips, protocols=protocols, views=views, crops=crops, baselines=baselines,
        finetune=finetune, options=options, out=out, cache=cache, batch=batch,
    )  # fmt: skip
