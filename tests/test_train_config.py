"""Configurations: recipes, changes by dotted name, and one sentence that names the option for every mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from train_data import TINY

from cmacc.train.config import (
    FREE_TO_CHANGE,
    RECIPES,
    PretrainConfig,
    change,
    check_same_run,
    flatten,
    from_json,
    recipe,
    to_json,
)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_go_through_json(name: str) -> None:
    config = recipe(name)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    assert change(config, {}) == config


def test_the_papers_settings() -> None:
    """METHOD.md: M=128, K=30 M, N=300 M, m=.999, tau=.7, Adam 1e-3 after 500 warm-up steps, 16 frames of 112^2, 80 bands."""
    flat = flatten(to_json(recipe("paper")))
    settings = {
        "loader.batch": 128, "objective.dictionary": 30 * 128, "objective.pool": 300 * 128, "objective.momentum": 0.999,
        "objective.tau": 0.7, "objective.negatives": "dictionary", "objective.queue": "active", "optimiser.rate": 1e-3,
        "optimiser.warmup": 500, "view.frames": 16, "view.size": 112, "view.n_mels": 80, "encoders.video": "r3d_18",
    }  # fmt: skip
    assert {name: flat[name] for name in settings} == settings
    assert 0.07 <= flat["objective.pseudo_tau"] <= 0.2


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("steps", "7", 7), ("objective.tau", "0.5", 0.5), ("objective.tau", "1", 1.0), ("optimiser.cosine", "true", True),
     ("optimiser.cosine", "0", False), ("objective.queue", "fifo", "fifo"), ("split", "", ""), ("loader.device", "cpu", "cpu"),
     ("view.view_s", "2", 2.0), ("encoders.audio", "resnet18", "resnet18"), ("optimiser.rate", "3e-4", 3e-4)],
)  # fmt: skip
def test_change_takes_text(name: str, text: str, value: object) -> None:
    """Only that option changes, to its own type; the recipe stays as it was."""
    before = flatten(to_json(TINY))
    after = flatten(to_json(change(TINY, {name: text})))
    assert after == {**before, name: value}
    assert type(after[name]) is type(value)
    assert flatten(to_json(TINY)) == before
    assert change(TINY, {name: value}) == change(TINY, {name: text})


def test_several_changes() -> None:
    config = change(TINY, {"objective.tau": "0.5", "objective.pool": 99, "seed": "4"})
    assert (config.objective.tau, config.objective.pool, config.seed) == (0.5, 99, 4)


WRONG = {
    "unknown": ("stepz", "5"),
    "unknown owner": ("model.tau", "5"),
    "unknown field": ("objective.temperature", "5"),
    "no field": ("view.", "5"),
    "a whole part": ("objective", "5"),
    "too deep": ("objective.tau.x", "5"),
    "deeper still": ("objective.a.b.c", "5"),
    "not a number": ("objective.tau", "warm"),
    "not whole": ("steps", "1.5"),
    "nothing": ("steps", None),
    "not yes or no": ("optimiser.cosine", "maybe"),
    "not a choice": ("objective.queue", "lifo"),
    "not a backbone": ("encoders.video", "vit"),
    "a dict": ("steps", {"a": 1}),
    "a dict in a dict": ("objective.tau", {"x": {"y": 1}}),
    "a part by name": ("objective.tau", {"steps": 1}),
    "too small": ("steps", "0"),
    "negative": ("view.size", "-3"),
    "zero": ("objective.tau", "0"),
    "not a finite number": ("optimiser.rate", "inf"),
    "nan": ("objective.share", "nan"),
    "infinite": ("objective.tau", "inf"),
    "beyond the share": ("objective.share", "1.5"),
    "negative decay": ("optimiser.weight_decay", "-1"),
    "negative seed": ("seed", "-1"),
    "negative threads": ("loader.threads", "-1"),
    "negative warm-up": ("optimiser.warmup", "-1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_sentence_that_names_the_option(case: str) -> None:
    name, value = WRONG[case]
    with pytest.raises(ValueError, match="; ") as raised:
        change(TINY, {name: value})
    text = str(raised.value)
    assert type(raised.value) is ValueError
    assert "\n" not in text
    assert {"unknown owner": "model", "deeper still": "objective.a"}.get(case, name) in text
    assert ".has" not in text


@pytest.mark.parametrize("data", [{"objective": 5}, {"steps": {"a": 1}}, {"objective": {"tau": {"x": 1}}}, {"nothing": 1}])
def test_damaged_json_is_one_sentence(data: Any) -> None:
    with pytest.raises(ValueError, match="; ") as raised:
        from_json(data)
    assert type(raised.value) is ValueError


def test_an_unknown_recipe() -> None:
    with pytest.raises(ValueError, match=r"recipe 'huge' is not known; use one of paper, small"):
        recipe("huge")


def test_the_same_run() -> None:
    """What does not change the numbers may differ; anything else is named, with both values."""
    saved = json.loads(json.dumps(to_json(TINY)))
    check_same_run(saved, TINY, Path("run"))
    for name in FREE_TO_CHANGE:
        check_same_run(saved, change(TINY, {name: 3}), Path("run"))
    for name, value in {"objective.tau": 0.9, "steps": 13, "seed": 1, "view.flip": 0.1, "loader.batch": 5, "split": "x"}.items():
        with pytest.raises(ValueError, match=rf"^run was begun with {name}=.*, not {value!r}; use another run folder"):
            check_same_run(saved, change(TINY, {name: value}), Path("run"))
    with pytest.raises(ValueError, match=r"loader.batch=4, not 5 \(2 options differ\)"):
        check_same_run(saved, change(TINY, {"steps": 13, "loader.batch": 5}), Path("run"))


@pytest.mark.parametrize("act", [lambda d: d["objective"].pop("tau"), lambda d: d["objective"].update(more=1)])
def test_a_run_of_another_version(act: Callable[[dict[str, Any]], object]) -> None:
    """An option that the saved run lacks, or has too many, is a difference."""
    saved = to_json(TINY)
    act(saved)
    with pytest.raises(ValueError, match=r"objective\.(tau=None, not 0\.2|more=1, not None); use another run folder"):
        check_same_run(saved, TINY, Path("run"))


def test_flatten() -> None:
    assert flatten({"a": 1, "b": {"c": 2, "d": {"e": 3}}}) == {"a": 1, "b.c": 2, "b.d.e": 3}
    assert len(flatten(to_json(PretrainConfig()))) > 40
