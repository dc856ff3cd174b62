"""All that is asked of one labelled data set: each protocol on the features of each encoder, as results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmacc.train.evaluation import baselines
from cmacc.train.evaluation.examples import Examples
from cmacc.train.evaluation.features import Describer, Features, extract, fingerprint, of_encoder
from cmacc.train.evaluation.finetune import FinetuneConfig, finetune
from cmacc.train.evaluation.labelled import Labelled
from cmacc.train.evaluation.protocols import PROTOCOLS, probe
from cmacc.train.evaluation.results import Result, summed_up
from cmacc.train.evaluation.splits import first_of
from cmacc.train.export.trained import Trained
from cmacc.train.loading.loader import LoaderConfig

Tell = Callable[[int, str], None]
Stage = Callable[[str, int], AbstractContextManager[Tell]]
"""From a name (lower case and dashes) and a total to where progress is told."""


@dataclass(frozen=True)
class EvaluationConfig:
    """protocols: of frozen features. views: of each file, evenly spaced; crops: of each view of a video. baselines: compare
    with the untrained encoder, whose seed is `seed`, and with statistics of the files. finetune: train the encoder further, too.
    """

    protocols: tuple[str, ...] = tuple(PROTOCOLS)
    views: int = 10
    crops: int = 1
    baselines: bool = True
    seed: int = 0
    finetune: FinetuneConfig | None = None

    def __post_init__(self) -> None:
        for name in self.protocols:
            if name not in PROTOCOLS:
                raise ValueError(f"there is no protocol {name!r}; use {', '.join(PROTOCOLS)}")
        if self.views < 1:
            raise ValueError(f"views is {self.views}; give 1 or more")
        if self.crops not in (1, 3):
            raise ValueError(f"crops is {self.crops}; give 1, the middle, or 3, both ends too")
        if not self.protocols and self.finetune is None:
            raise ValueError("there is no protocol to evaluate by; give one, or finetune")


@contextmanager
def silent(what: str, total: int) -> Iterator[Tell]:
    """Tells nobody."""

    def tell(done: int, note: str = "") -> None: ...

    yield tell


def evaluate_files(
    trained: Trained,
    labelled: Labelled,
    loader: LoaderConfig,
    config: EvaluationConfig,
    *,
    cache: Path | None = None,
    stage: Stage = silent,
) -> list[Result]:
    """Results by protocol and encoder. Raises ValueError when there is nothing sensible to score."""
    examples = Examples(labelled, trained.view, loader)
    about: dict[str, Any] = {
        "data": str(labelled.root), "views": config.views, "crops": config.crops if labelled.kind == "video" else 1,
        "view_s": trained.view.view_s,
        "splits": [split.name for split in labelled.splits], "step": trained.step, "weights": weights(trained),
    }  # fmt: skip
    features = _features(trained, examples, config, cache, stage) if config.protocols else {}
    left_out, notes = labelled.left_out | examples.left_out, labelled.notes + unusual(examples)
    results = []
    for protocol in config.protocols:
        for encoder, each in features.items():
            with stage(f"{labelled.name}-{protocol}-{encoder.replace(' ', '-')}", len(labelled.splits)) as tell:
                told = probe(protocol, each, labelled.labels, labelled.splits, labelled.folds, tell)
            settings = {**about, "standardised": True, "seed": config.seed} | _chosen([one.settings for one in told])
            if encoder == "log-mel statistics":
                settings["views"] = "whole files"
            template = Result(labelled.name, protocol, encoder, 0.0, 0.0, 0, left_out=left_out, notes=notes, settings=settings)
            results.append(summed_up(template, labelled.labels, [(one.split, one.rows, one.names) for one in told]))
    if config.finetune is not None:
        results.append(_finetuned(trained, examples, config.finetune, about, notes, stage))
    return results


def _finetuned(
    trained: Trained,
    examples: Examples,
    config: FinetuneConfig,
    about: dict[str, Any],
    notes: list[str],
    stage: Stage,
) -> Result:
    """On each split anew. What did not decode when features were taken is in neither half."""
    labelled = examples.labelled
    classes = np.unique(labelled.labels)
    gone = {row for row in range(len(labelled.files)) if labelled.file_name(row) in examples.left_out}
    told = []
    for name, *halves in labelled.splits:
        train, test = (np.array([row for row in half.tolist() if row not in gone], dtype=np.int64) for half in halves)
        with stage(f"{labelled.name}-finetune-{name.replace(' ', '-')}", config.total) as tell:
            likely = finetune(trained, examples, train, test, labelled.labels, config, tell)
        there = np.isfinite(likely).all(axis=1)
        if not there.any():
            raise ValueError(f"{name} of {labelled.root} has no file to test that decodes; {first_of(examples.left_out)}")
        told.append((name, test[there], classes[likely[there].argmax(axis=1)]))
    crops = config.crops if labelled.kind == "video" else 1
    settings = about | asdict(config) | {"views": config.views, "crops": crops}
    left_out = labelled.left_out | examples.left_out
    template = Result(labelled.name, "finetune", "trained", 0.0, 0.0, 0, left_out=left_out, notes=notes, settings=settings)
    return summed_up(template, labelled.labels, told)


def weights(trained: Trained) -> str:
    """What tells one training's encoders from another's."""
    return f"{fingerprint(trained.video)[:8]}-{fingerprint(trained.audio)[:8]}"


def _features(
    trained: Trained, examples: Examples, config: EvaluationConfig, cache: Path | None, stage: Stage
) -> dict[str, Features]:
    labelled, loader = examples.labelled, examples.loader
    device = torch.device("cuda" if loader.dali_device == "gpu" else "cpu")
    own = trained.audio if labelled.kind == "audio" else trained.video
    describers: list[Describer] = [of_encoder("trained", own, loader.batch, device)]
    if config.baselines:
        untrained = baselines.untrained(trained.encoders, labelled.kind, config.seed)
        describers.append(of_encoder("random", untrained, loader.batch, device))
        describers += [baselines.colour_and_motion()] if labelled.kind == "video" else []
    with stage(f"{labelled.name}-features", len(labelled.files)) as tell:
        found = extract(examples, describers, config.views, config.crops, cache, lambda done: tell(done, "files"))
    if config.baselines and labelled.kind == "audio":
        with stage(f"{labelled.name}-statistics", len(labelled.files)) as tell:
            found["log-mel statistics"] = baselines.whole_sounds(examples, cache, lambda done: tell(done, "files"))
    return found


def _chosen(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """What differs between splits as a list of its values, what is the same in all as it is."""
    columns = {name: [each[name] for each in settings] for name in settings[0]}
    return {name: values if name in ("C", "inner_score") else values[0] for name, values in columns.items()}


_NAMED = 5
_USUAL = 0.5  # share of files that makes a rate or a length the usual one


def unusual(examples: Examples) -> list[str]:
    """Sentences on files of another rate or length than most, and on those that are shorter than a view."""
    labelled, facts = examples.labelled, examples.facts
    if not facts:
        return []
    rows = np.array(sorted(facts))
    rates, seconds = np.array([facts[int(row)] for row in rows]).T
    unit = "samples a second" if labelled.kind == "audio" else "frames a second"
    notes = []

    def named(odd: Any, what: str) -> None:
        if odd.any():
            names = [labelled.file_name(int(row)) for row in rows[odd][:_NAMED]]
            more = f" and {odd.sum() - _NAMED} more" if odd.sum() > _NAMED else ""
            notes.append(f"{odd.sum()} of {len(rows)} files {what}: {', '.join(names)}{more}")

    for values, digits, said in (
        (rates, 2, f"are not of {{}} {unit}, as most are"),
        (seconds, 1, "are not {} s long, as most are"),
    ):
        kinds, counts = np.unique(values.round(digits), return_counts=True)
        if counts.max() > _USUAL * len(rows):
            named(values.round(digits) != kinds[counts.argmax()], said.format(f"{kinds[counts.argmax()]:g}"))
    named(seconds < examples.view.view_s - 1e-3, f"are shorter than a view of {examples.view.view_s:g} s, which was filled up")
    return notes
