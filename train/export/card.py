"""The model card of an export: what it is, what it was trained on, what it reached, and how to load it. Filled from the run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from cmacc.shards.options import flatten
from cmacc.shards.place import place, public_address
from cmacc.train.config import RECIPES, to_json
from cmacc.train.export.trained import Trained

_HELD_OUT = ("R@1", "R@5", "R@10", "class@1", "same_class_R@1")
_ABOUT = (
    "Trained by cross-modal active contrastive coding (CM-ACC, [arXiv 2009.09805](https://arxiv.org/abs/2009.09805)) with "
    "`cmacc`: a clip's picture must find its own sound among others, and the reverse, without any label."
)
_LOAD = """```python
import torch
from cmacc.train import load_encoder

encoders, prepare = load_encoder(".")  # this folder; elsewhere its path or URL
heard = encoders.audio(prepare.audio(torch.randn(64_000), 16_000))  # a waveform and its rate, or prepare.audio("dog.ogg")
seen = encoders.video(prepare.video(torch.zeros(50, 90, 120, 3, dtype=torch.uint8), 25.0))  # or prepare.video("dog.mp4")
print(heard @ seen.T)
```"""
_PROGRAMS = (
    'A program runs without this package: `embedding, features = torch.export.load("audio.pt2").module()(x)`. A .pt2 is a zip of '
    "JSON and raw weights. Of somebody else's torch would unpickle what is pickled, which can run any code; "
    "`cmacc.train.export.programs.load_program` refuses such a file."
)
_LIMITS = (
    "Nothing was checked beyond what stands above. The encoders know what their data showed: other kinds of pictures and sounds, "
    "other lengths, speech and music in particular, may be embedded poorly, and whatever is skewed in the data is skewed in "
    "them. They tell which sounds and pictures occur together; they do not identify people, and are not meant for decisions "
    "about them."
)
_LICENCE = (
    "The clips belong to those who made them, under the terms of their sources; `cmacc` cannot know these. State here what the "
    "data allow, and under which terms you pass these weights on, before you do."
)
_NOT_TOLD = ("checkpoint.", "distributed.", "log.", "alarm.")  # of the run, not of what it learned


def model_card(trained: Trained, run: str | os.PathLike[str], files: Mapping[str, str], notes: Sequence[str] = ()) -> str:
    """Markdown. run: the folder or address that was exported; its `config.json`, `metrics.jsonl` and `evaluation/*.json` are used
    as far as they are there. files: of the export, and what each is. notes: sentences about what was left out."""
    config, view, run = trained.origin.get("config", {}), trained.view, _run_of(run)
    kept = json.loads(_read(run, "config.json") or "{}")
    parts = [
        f"# Encoders of picture and sound, step {trained.step:,}",
        _ABOUT,
        "## Load",
        _LOAD,
        f"`prepare` makes one view of {view.view_s:g} s from the middle of a file (`views=4`: four, evenly spaced). Of it the "
        f"video encoder sees {view.frames} frames of {view.size} × {view.size} pixels, the audio encoder a log-mel of "
        f"{view.n_mels} bands and {view.mel_steps} steps of sound at {view.audio_rate:,} Hz. Embeddings are unit vectors of "
        f"{trained.encoders.width} numbers, to be compared by their dot product; `encoders.video.features(x)` "
        f"({trained.video.feature_width} numbers) and `encoders.audio.features(x)` ({trained.audio.feature_width}) are for "
        "other tasks.",
        "## Files",
        _table(("file", "what it is"), [(f"`{name}`", what) for name, what in files.items()]),
        _PROGRAMS if any(name.endswith(".pt2") for name in files) else "",
        *notes,
        "## Training",
        _table(("what", "of this run"), _training(trained, config, kept, run)),
        "## What it reached",
        *_held_out(run, trained.step),
        *_evaluations(run),
        "## Limits",
        _LIMITS,
        "## Licence",
        _LICENCE,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _run_of(path: str | os.PathLike[str]) -> str:
    """A run's folder, of which perhaps only a checkpoint was named."""
    return os.fspath(path).rpartition("/checkpoints")[0] or os.fspath(path)


def _training(trained: Trained, config: dict[str, Any], kept: dict[str, Any], run: str) -> Iterable[tuple[str, str]]:
    origin, encoders = trained.origin, trained.encoders
    yield "from", f"`{_plain(public_address(run))}`, step {trained.step:,}"
    data = ", ".join(f"`{_plain(public_address(str(d)))}`" for d in kept.get("data", []))
    yield "data sets", data or "not known: no run's `config.json` was there"
    if origin.get("clips_seen"):
        yield "clips seen", f"{origin['clips_seen']:,} (with repetition), split {config.get('split', '')!r}"
    yield (
        "encoders",
        f"video {encoders.video}, audio {encoders.audio}, head of {encoders.head_layers} layers, {encoders.norm} norm",
    )
    if config:
        objective = config["objective"]
        yield "objective", f"InfoNCE across modalities, negatives: {objective['negatives']}, chosen by {objective['selector']}"
        name, changed = _nearest_recipe(config)
        yield "recipe", name + (f", with {changed}" if changed else "")
    versions = ", ".join(f"{name} {number}" for name, number in origin.get("versions", {}).items())
    yield "versions", versions or "not known"
    yield "hash", f"`{trained.hash[:16]}`"


def _nearest_recipe(config: dict[str, Any]) -> tuple[str, str]:
    """The recipe from which the fewest options differ, and these."""
    now = flatten(config)

    def changed(name: str) -> dict[str, Any]:
        told = flatten(json.loads(json.dumps(to_json(RECIPES[name]()))))
        return {key: value for key, value in now.items() if told.get(key) != value}

    name = min(RECIPES, key=lambda name: len(changed(name)))
    told = ", ".join(f"`{key}={value}`" for key, value in changed(name).items() if not key.startswith(_NOT_TOLD))
    return f"`{name}`", told


def _held_out(run: str, step: int) -> Iterable[str]:
    """The last numbers of retrieval not after `step`."""
    last: dict[str, Any] = {}
    for line in _read(run, "metrics.jsonl").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            if (
                isinstance(record, dict)
                and record.get("step", step + 1) <= step
                and any(k.startswith("held_out/") for k in record)
            ):
                last = record
    found = {name: last.get(f"held_out/{name}") for name in _HELD_OUT}
    rows = [
        (name, f"{value:.3f}", _number(last.get(f"held_out/chance_{name}")))
        for name, value in found.items()
        if isinstance(value, int | float)
    ]
    if not rows:
        yield "There are no held-out numbers of retrieval in the run's folder."
        return
    yield f"Retrieval across modalities among held-out clips, mean of both directions, at step {last['step']:,} (shares, 0 to 1):"
    yield _table(("", "reached", "chance"), rows)


def _evaluations(run: str) -> Iterable[str]:
    """Results of `cmacc evaluate`, as it wrote them."""
    rows: list[tuple[Any, ...]] = []
    for name in _names(run, "evaluation"):
        with suppress(ValueError, KeyError, TypeError):
            found = json.loads(_read(run, f"evaluation/{name}")) if name.endswith(".json") else []
            for result in found if isinstance(found, list) else found.get("results", [found]):
                score, over = f"{float(result['score']):.3f}", result.get("over", "")
                rows.append((result["task"], result["protocol"], result["encoder"], score, _number(result.get("chance")), over))
    if rows:
        yield "Scores of `cmacc evaluate` (shares, 0 to 1), baselines beside them:"
        yield _table(("task", "protocol", "encoder", "score", "chance", "over"), rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([_plain(str(cell)) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Text from outside that stays in its cell."""
    return "".join(c if c.isprintable() else " " for c in text).replace("|", "\\|").replace("<", "&lt;")


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else ""


def _read(run: str, name: str) -> str:
    try:
        return place(run).read(name).decode("utf-8", "replace")
    except Exception:  # a card is written without what is not there; each kind of bucket has errors of its own
        return ""


def _names(run: str, folder: str) -> list[str]:
    try:
        return place(run).names(folder)
    except Exception:
        return []
