"""Configurations: recipes, changes by dotted name, and one sentence that names the option for every mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from train_data import TINY

from cmacc.shards.options import meanings
from cmacc.train.config import (
    FREE_TO_CHANGE,
    OTHER_NAMES,
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
        "loader.batch": 128, "objective.dictionary": 30 * 128, "objective.candidates": 300 * 128, "objective.momentum": 0.999,
        "objective.tau": 0.7, "objective.negatives": "dictionary", "objective.selector": "kmeans++", "optimiser.rate": 1e-3,
        "optimiser.warmup": 500, "view.frames": 16, "view.size": 112, "view.n_mels": 80, "encoders.video": "r3d_18",
        "encoders.audio": "resnet18_1d", "objective.pool": "fifo", "objective.share": 1.0,
    }  # fmt: skip
    assert {name: flat[name] for name in settings} == settings
    assert 0.07 <= flat["objective.pseudo_tau"] <= 0.2


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("steps", "7", 7), ("objective.tau", "0.5", 0.5), ("objective.tau", "1", 1.0), ("optimiser.cosine", "true", True),
     ("optimiser.cosine", "0", False), ("objective.selector", "fifo", "fifo"), ("split", "", ""), ("loader.device", "cpu", "cpu"),
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


def test_the_compared_backbone() -> None:
    before, after = (flatten(to_json(recipe(name))) for name in ("paper", "paper-r2plus1d"))
    assert {name for name in before if before[name] != after[name]} == {"encoders.video"}
    assert after["encoders.video"] == "r2plus1d_18"


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_other_names(name: str) -> None:
    """`cmacc pretrain --recipe paper --set train.batch=64`."""
    assert change(TINY, {name: 64}) == change(TINY, {OTHER_NAMES[name]: 64}) != TINY


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("train.momentum", "objective.momentum"),
        ("batch", "loader.batch"),
        ("optimiser.weight_decay_rate", "optimiser.weight_decay"),
        ("objective.temperature", "objective.tau"),
        ("temperature", "objective.tau"),
        ("train.batch_size", "loader.batch"),
        ("lr", "optimiser.rate"),
        ("optimizer.rate", "optimiser.rate"),
        ("objective.tua", "objective.tau"),
        ("objectiv.dictionary", "objective.dictionary"),
        ("stepz", "steps"),
    ],
)
def test_an_unknown_option_says_what_is_meant(name: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"^there is no option .*; did you mean {meant}\?$"):
        change(TINY, {name: "5"})


def test_an_unknown_option_like_none() -> None:
    """Or one whose name several groups have: then what there is."""
    with pytest.raises(ValueError, match=r"^there is no option objective\.zebra; objective has negatives, selector, "):
        change(TINY, {"objective.zebra": "5"})
    assert {n.partition(".")[0] for n in flatten(to_json(TINY)) if n.endswith(".warmup")} == {"optimiser", "alarm"}


IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "objective.pool is fresh, but objective.selector=fifo picks nothing": {
        "objective.pool": "fresh",
        "objective.selector": "fifo",
    },
    "objective.pool is epoch, but objective.negatives=batch has no": {"objective.pool": "epoch", "objective.negatives": "batch"},
    "objective.pool is fresh, but nothing is picked": {"objective.pool": "fresh", "objective.share": 0.0},
    "objective.repeats is false, and a pool of 10": {"objective.repeats": False, "objective.candidates": 10},
    "compute.batchnorm is shuffled": {"compute.batchnorm": "shuffled", "objective.negatives": "batch"},
    "compute.batchnorm is sync": {"compute.batchnorm": "sync", "encoders.norm": "group"},
    "encoders.bands is 80, but view.n_mels is 16": {"encoders.audio": "resnet18_1d"},
    "loader.batch is 1": {"loader.batch": 1, "objective.negatives": "batch"},
}


@pytest.mark.parametrize("sentence", IMPOSSIBLE)
def test_what_goes_not_together(sentence: str) -> None:
    """Each alone is possible."""
    with pytest.raises(ValueError, match=rf"^{sentence}.*; (give|use|leave) ") as raised:
        change(TINY, IMPOSSIBLE[sentence])
    assert "\n" not in str(raised.value)
    for name, value in IMPOSSIBLE[sentence].items():
        if len(IMPOSSIBLE[sentence]) > 1:
            change(TINY, {name: value})


def test_every_option_is_explained() -> None:
    """What its owner's docstring says, for `cmacc recipes`."""
    told = meanings(PretrainConfig)
    assert list(told) == list(flatten(to_json(TINY)))
    assert told["objective.tau"] == "temperature of the loss."
    assert told["loader.batch"] == "clips a step, over all ranks."
    assert told["alarm.patience"].startswith("log lines in a row")
    untold = {name for name, text in told.items() if not text}
    assert untold <= {"objective.share_start", "objective.share_ramp"}  # told with objective.share


def test_several_changes() -> None:
    config = change(TINY, {"objective.tau": "0.5", "objective.candidates": 99, "seed": "4"})
    assert (config.objective.tau, config.objective.candidates, config.seed) == (0.5, 99, 4)


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
    "not a choice": ("objective.selector", "lifo"),
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
    with pytest.raises(ValueError, match=r"recipe 'huge' is not known; use one of paper, paper-r2plus1d, small-cpu, demo"):
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
