"""One run of the study: train on decoded clips by the trainer's own step, and score. Its result is plain JSON."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from clips import VIEW, Clips
from numpy.typing import NDArray
from sklearn.linear_model import RidgeClassifierCV
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cmacc.train.config import PretrainConfig
from cmacc.train.contrast.objective import ObjectiveConfig
from cmacc.train.contrast.rings import Entries
from cmacc.train.evaluation.retrieval import Embedded, retrieval
from cmacc.train.loading.loader import LoaderConfig
from cmacc.train.loading.views import generator
from cmacc.train.model import CrossModal
from cmacc.train.networks.encoders import EncoderConfig
from cmacc.train.optimiser import OptimiserConfig
from cmacc.train.running.distributed import World
from cmacc.train.running.monitor import step_facts, to_host
from cmacc.train.step import Stepped, TrainingStep

EVERY = 25
"""Steps between two looks at the dictionaries."""
LAST = 50
"""Steps at the end over which losses are averaged."""


@dataclass(frozen=True)
class Setting:
    """All that decides a run, beside its seed and its data. objective: of ObjectiveConfig. scored: steps between scores."""

    steps: int = 600
    batch: int = 32
    rate: float = 1e-3
    warmup: int = 50
    scored: int = 150
    objective: dict[str, Any] = field(default_factory=dict)

    def config(self, seed: int) -> PretrainConfig:
        return PretrainConfig(
            steps=self.steps,
            seed=seed,
            view=VIEW,
            loader=LoaderConfig(batch=self.batch, device="cpu"),
            encoders=EncoderConfig(video="small", audio="small", width=128, hidden=256),
            objective=ObjectiveConfig(**self.objective),
            optimiser=OptimiserConfig(rate=self.rate, warmup=self.warmup, cosine=True, weight_decay=1e-4),
        )


def train(
    clips: Clips, setting: Setting, seed: int, on_step: Callable[[int], None] | None = None
) -> tuple[dict[str, Any], CrossModal]:
    """Raw results and the model. The same (clips, setting, seed) give the same, on one thread of the same kind of machine."""
    config = setting.config(seed)
    torch.manual_seed(seed)
    model = CrossModal(config.encoders, config.objective).train()
    step_once = TrainingStep(config, model, config.optimiser.build(model.learned().values()), World())
    curve: list[dict[str, float]] = []
    scores: list[dict[str, float]] = [{"step": 0, **held_out(model, clips)}]
    ends: dict[str, list[float]] = {"loss": [], "chance": [], "accuracy": []}
    choosing, began = 0.0, time.process_time()
    for step in range(setting.steps):
        places, _ = clips.order(seed, step, setting.batch)
        batch = clips.views(places, generator("study", seed, "views", step))
        fresh = _fresh(clips, config, step_once, seed, step)
        stepped = step_once(batch, step, fresh)
        choosing += stepped.choice.watch.seconds()
        if step >= setting.steps - LAST:
            for name, values in ends.items():
                values.append(float(np.mean([float(getattr(term, name).detach()) for term in stepped.contrast.terms().values()])))
        if (step + 1) % EVERY == 0:
            curve.append({"step": step + 1, **_facts(stepped, model, config, fresh)})
        if (step + 1) % setting.scored == 0 or step + 1 == setting.steps:
            scores.append({"step": step + 1, **held_out(model, clips)})
        if on_step:
            on_step(step + 1)
    loss, chance = float(np.mean(ends["loss"])), float(np.mean(ends["chance"]))
    result = {
        "seconds": {"processor": time.process_time() - began, "choosing": choosing},
        "end": {"loss": loss, "chance": chance, "bound_nats": chance - loss, "accuracy": float(np.mean(ends["accuracy"]))},
        "scores": scores,
        "probe": probe(model, clips),
        "curve": curve,
    }
    return result, model


def _fresh(clips: Clips, config: PretrainConfig, step_once: TrainingStep, seed: int, step: int) -> tuple[Entries, Entries] | None:
    """`pool: fresh`: other clips, encoded in this very step."""
    objective = config.objective
    if objective.pool != "fresh" or not objective.picks(step, config.loader.batch):
        return None
    draws = generator("study", seed, "fresh", step)
    total = objective.fresh * config.loader.batch
    places = draws.choice(clips.train, total, replace=False)
    return step_once.encode_keys(clips.views(places, draws), step, total)


def _facts(
    stepped: Stepped, model: CrossModal, config: PretrainConfig, fresh: tuple[Entries, Entries] | None
) -> dict[str, float]:
    """The monitor's numbers, and how many classes the dictionaries hold were they equally frequent: exp of the entropy."""
    picked = {"video": stepped.choice.picked_video, "audio": stepped.choice.picked_audio}
    candidates = dict(zip(("video", "audio"), fresh, strict=True)) if fresh else None
    q_video, q_audio, *_ = stepped.queries
    terms, tau = stepped.contrast.terms(), config.objective.pseudo_tau
    facts = to_host(step_facts(terms, q_video, q_audio, model.memory, picked, stepped.step, tau, candidates))
    for name in ("video", "audio"):
        ring = getattr(model.memory, f"dictionary_{name}", None)
        if ring is not None and facts.get(f"dictionary_{name}/entries"):
            entries = ring.entries
            counts = torch.bincount(entries.labels[(entries.ids >= 0) & (entries.labels >= 0)]).double()
            shares = counts / counts.sum()
            facts[f"dictionary_{name}/effective_classes"] = float(torch.special.entr(shares).sum().exp())
    return {name: round(value, 6) for name, value in facts.items() if math.isfinite(value)}


@torch.no_grad()
def encoded(model: CrossModal, clips: Clips, places: NDArray[np.int64]) -> dict[str, torch.Tensor]:
    """Embeddings `video`, `audio` and features `video_features`, `audio_features` of the middle of each clip."""
    model.eval()
    columns: dict[str, list[torch.Tensor]] = {}
    for at in range(0, len(places), 64):
        batch = clips.views(places[at : at + 64], None)
        for name, encoder, x in (("video", model.video, batch.video), ("audio", model.audio, batch.audio)):
            features = encoder.features(x)
            columns.setdefault(f"{name}_features", []).append(features)
            columns.setdefault(name, []).append(encoder.project(features)[0])
    model.train()
    return {name: torch.cat(parts) for name, parts in columns.items()}


def held_out(model: CrossModal, clips: Clips) -> dict[str, float]:
    """Cross-modal retrieval among the held-out clips; `rare_class@1`: among those of the less frequent half of the classes."""
    places = clips.held_out
    found = encoded(model, clips, places)
    video, audio = found["video"], found["audio"]
    ids, labels = (torch.from_numpy(column[places]) for column in (clips.ids, clips.labels))
    facts = {name: round(v, 6) for name, v in retrieval(Embedded(video, audio, ids, labels)).items()}
    counts = np.bincount(clips.labels[clips.train], minlength=len(clips.classes))
    rare = torch.from_numpy(np.isin(labels.numpy(), np.argsort(counts, kind="stable")[: len(counts) // 2]))
    scores = video @ audio.T
    right = [labels[matrix.argmax(1)] == labels for matrix in (scores, scores.T)]
    facts["rare_class@1"] = round(float(torch.stack(right)[:, rare].float().mean()), 6)
    return facts


def probe(model: CrossModal, clips: Clips) -> dict[str, float]:
    """Accuracy of a ridge classifier on frozen features of the held-out clips, whose strength is chosen inside the training
    clips: `video`, `audio` and `both` learn from four fifths; with `few_` from one fifth, and are tested on four. Where a class
    has fewer than five clips, there are as many parts as it has."""
    found, labels = encoded(model, clips, clips.held_out), clips.labels[clips.held_out]
    video, audio = (found[f"{name}_features"].numpy() for name in ("video", "audio"))
    parts = min(5, int(np.unique(labels, return_counts=True)[1].min()))
    folds = list(StratifiedKFold(parts, shuffle=True, random_state=0).split(video, labels))
    classifier = make_pipeline(StandardScaler(), RidgeClassifierCV(np.logspace(-1, 4, 6)))
    facts = {}
    for name, x in {"video": video, "audio": audio, "both": np.concatenate([video, audio], 1)}.items():
        facts[name] = float(cross_val_score(classifier, x, labels, cv=folds).mean())
        facts[f"few_{name}"] = float(cross_val_score(classifier, x, labels, cv=[(test, learn) for learn, test in folds]).mean())
    return facts
