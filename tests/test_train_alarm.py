"""The alarm: what sets it off and what does not, a verdict that names the step, and a state that continues."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from train_data import unit

from cmacc.train.running.alarm import Alarm, AlarmConfig, Verdict
from cmacc.train.running.monitor import query_facts, to_host

HEALTHY = {
    "queries/effective_rank_video": 20.0, "queries/effective_rank_audio": 20.0, "queries/uniformity_video": -3.0,
    "queries/uniformity_audio": -3.0,
}  # fmt: skip
COLLAPSED = {**HEALTHY, "queries/effective_rank_audio": 1.2}
LOSS = {"loss/total": 4.0, "loss/video_to_audio": 2.0, "loss/audio_to_video": 2.0, "chance/video_to_audio": 4.0,
        "chance/audio_to_video": 4.0}  # fmt: skip
CHANCE = {"held_out/R@5": 0.02, "held_out/chance_R@5": 0.02, "held_out/chance_R@1": 0.004, "held_out/class@1": 0.08,
          "held_out/chance_class@1": 0.08}  # fmt: skip
NAN = {"optimiser/gradient_norm": math.nan}


def alarm(**options: Any) -> Alarm:
    return Alarm(AlarmConfig(**{"warmup": 0, "patience": 3, **options}), batch=32, width=128)


def seen(alarm: Alarm, *facts: dict[str, float], first: int = 100) -> list[Verdict | None]:
    return [alarm.look(first + i, each) for i, each in enumerate(facts)]


def actions(found: list[Verdict | None]) -> list[str]:
    return [verdict.action if verdict else "" for verdict in found]


def test_healthy_numbers_say_nothing() -> None:
    assert seen(alarm(), *[HEALTHY | LOSS] * 20, CHANCE | {"held_out/R@5": 0.2}, HEALTHY) == [None] * 22


@pytest.mark.parametrize(
    "name", ["loss/total", "loss/video_to_audio", "optimiser/gradient_norm", "optimiser/gradient_norm_audio"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stops_at_once(name: str, value: float) -> None:
    (verdict,) = seen(Alarm(AlarmConfig(), 32, 128), {**LOSS, name: value}, first=7)
    assert verdict and (verdict.step, verdict.kind, verdict.action) == (7, "non_finite", "stop")
    said = verdict.sentence(["yt_a", "yt_b"])
    assert said.startswith(f"{name} is not finite at step 7 (clips yt_a, yt_b): ") and "; " in said and "\n" not in said
    assert (
        verdict.sentence([f"k{i}" for i in range(128)])
        .split(" (")[1]
        .startswith("clips k0, k1, k2, k3, k4, k5, k6, k7 and 120 more)")
    )


def test_other_numbers_may_be_not_finite() -> None:
    """The gradient decides; an accuracy of no row, or a cosine of no pair, does not stop a run."""
    assert seen(alarm(), {"accuracy/video_to_audio": math.nan, "dictionary_video/cosine": math.nan}) == [None]


def test_skips_in_a_row_are_bounded() -> None:
    """Steps in between that are well are not shown: the numbers of the steps tell."""
    watch = alarm(non_finite="skip", skips=2)
    assert [watch.look(step, NAN).action for step in (3, 5, 6, 9, 10)] == ["skip"] * 5  # type: ignore[union-attr]
    last = watch.look(11, NAN)
    assert last and last.action == "stop" and "so were the 2 steps before it" in last.sentence()


def test_a_step_is_told_once() -> None:
    """The device reports it, then its log line has it again."""
    watch = alarm(non_finite="skip")
    assert actions([watch.look(4, NAN), watch.look(4, NAN | LOSS), watch.look(5, NAN)]) == ["skip", "", "skip"]


def test_rollbacks_are_counted_and_slow_the_learning() -> None:
    watch = alarm(non_finite="rollback", rollbacks=2, rate_after_rollback=0.5)
    assert watch.rate == 1
    for rate in (0.5, 0.25):
        verdict = watch.look(50, NAN)
        assert verdict and verdict.action == "rollback"
        assert watch.rate == rate
    verdict = watch.look(50, NAN)
    assert verdict and verdict.action == "stop" and "2 rollbacks did not help" in verdict.sentence()


@pytest.mark.parametrize(
    "sign",
    [{"queries/effective_rank_video": 2.4}, {"queries/effective_rank_audio": 1.0}, {"queries/uniformity_video": -0.1},
     {"queries/uniformity_audio": 0.0}],
)  # fmt: skip
@pytest.mark.parametrize("action", ["warn", "stop", "rollback"])
def test_a_collapse_must_last(sign: dict[str, float], action: Any) -> None:
    """Of 31 directions that a batch of 32 can have, 1 + .05 x 30 = 2.5 are needed."""
    bad = HEALTHY | sign
    found = seen(alarm(collapse=action), bad, bad, HEALTHY, bad, bad, bad)
    assert actions(found) == [""] * 5 + [action]
    last = found[-1]
    assert last and (last.step, last.kind) == (105, "collapse")
    assert "the queries have collapsed (" in last.sentence() and "3 log lines in a row" in last.sentence()


def test_a_warning_is_given_once_until_it_was_gone() -> None:
    found = seen(alarm(), *[COLLAPSED] * 6, HEALTHY, *[COLLAPSED] * 3)
    assert actions(found) == ["", "", "warn", "", "", "", "", "", "", "warn"]


def test_no_collapse_in_the_warm_up_nor_when_it_is_off() -> None:
    assert actions(seen(alarm(warmup=103), *[COLLAPSED] * 6)) == [""] * 5 + ["warn"]
    assert seen(alarm(collapse="off"), *[COLLAPSED] * 9) == [None] * 9
    assert actions(seen(alarm(warmup=1000), NAN)) == ["stop"]


def test_small_batches_are_not_collapsed_by_their_size() -> None:
    for batch in (2, 3, 4):
        facts = to_host(query_facts(unit(batch, 16, seed=1), unit(batch, 16, seed=2)))
        assert seen(Alarm(AlarmConfig(warmup=0, patience=1), batch, 16), facts) == [None]
    assert seen(Alarm(AlarmConfig(warmup=0), 1, 16), *[to_host(query_facts(unit(1, 16), unit(1, 16)))] * 9) == [None] * 9


@pytest.mark.parametrize(("batch", "expected"), [(4, ""), (7, ""), (8, "warn"), (32, "warn")])
def test_the_rank_of_a_few_clips_tells_nothing(batch: int, expected: str) -> None:
    """Two pairs of clips, each of one video, lie on a line whatever the encoders are. A point is a collapse all the same."""
    apart = unit(2, 16, seed=3)
    facts = to_host(query_facts(apart.repeat_interleave(batch // 2, 0), apart.repeat_interleave(batch // 2, 0)))
    assert facts["queries/effective_rank_video"] < 1.1
    assert actions(seen(Alarm(AlarmConfig(warmup=0, patience=1), batch, 16), facts)) == [expected]
    point = {**facts, "queries/uniformity_video": -0.01}
    assert actions(seen(Alarm(AlarmConfig(warmup=0, patience=1), batch, 16), point)) == ["warn"]


def test_the_trap() -> None:
    """METHOD.md: the loss well below chance while held-out retrieval is at chance."""
    found = seen(alarm(), LOSS, CHANCE, LOSS, CHANCE, LOSS, CHANCE)
    assert actions(found) == ["", "", "", "warn", "", ""]
    assert found[3] and found[3].kind == "trap"
    assert found[3].sentence().startswith("the loss is 2.00 nats below chance, but held-out retrieval is at chance at step 103: ")
    assert actions(seen(alarm(trap="stop", trap_evaluations=1), LOSS, CHANCE)) == ["", "stop"]
    assert seen(alarm(trap="off"), *[LOSS, CHANCE] * 5) == [None] * 10


@pytest.mark.parametrize(
    ("loss", "held_out"),
    [
        ({"loss/audio_to_video": 3.6}, {}),  # one term is near chance: nothing is told from anything yet
        ({}, {"held_out/R@5": 0.04}),  # 250 clips: two deviations above .02 are .0377
        ({}, {"held_out/class@1": 0.12}),  # classes are found, .1143 is the limit
        ({}, {"held_out/chance_R@1": 1 / 6, "held_out/chance_R@5": 5 / 6, "held_out/R@5": 5 / 6}),  # too few clips
    ],
)
def test_no_trap(loss: dict[str, float], held_out: dict[str, float]) -> None:
    assert seen(alarm(), *[LOSS | loss, CHANCE | held_out] * 4) == [None] * 8


def test_the_trap_at_the_edge_of_noise() -> None:
    """Within two deviations of chance nothing was found."""
    assert actions(seen(alarm(trap_evaluations=1), LOSS, CHANCE | {"held_out/R@5": 0.037, "held_out/class@1": 0.114})) == [
        "",
        "warn",
    ]


@pytest.mark.parametrize("at", range(1, 12))
def test_the_state_continues(at: int) -> None:
    """Saved at any moment, as JSON, it goes on as if nothing had been."""
    options = {"non_finite": "rollback", "collapse": "rollback", "rollbacks": 3, "trap_evaluations": 2}
    facts = [COLLAPSED, LOSS, NAN, COLLAPSED, CHANCE, COLLAPSED, COLLAPSED, LOSS, CHANCE, LOSS, CHANCE, NAN]
    whole = seen(alarm(**options), *facts)
    assert {verdict.kind for verdict in whole if verdict} == {"non_finite", "collapse", "trap"}
    first, second = alarm(**options), alarm(**options)
    before = seen(first, *facts[:at])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + seen(second, *facts[at:], first=100 + at) == whole
    first.load_state_dict(second.state_dict())
    assert first.rate == second.rate


def test_encoders_that_only_pull_together_collapse() -> None:
    """No negatives: alignment alone is learned, the monitor's numbers set the alarm off; with negatives they do not."""

    def train(negatives: bool) -> list[str]:
        torch.manual_seed(0)
        video, audio = (torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16)) for _ in range(2))
        watch, found = Alarm(AlarmConfig(patience=5, warmup=20, collapse="stop"), 32, 16), []
        optimiser = torch.optim.Adam([*video.parameters(), *audio.parameters()], lr=1e-2)
        for step in range(120):
            x = torch.randn(32, 20)
            q, k = (torch.nn.functional.normalize(f(x), dim=1) for f in (video, audio))
            loss = torch.nn.functional.cross_entropy(q @ k.T / 0.2, torch.arange(32)) if negatives else -(q * k).sum(1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            found += [watch.look(step, to_host(query_facts(q.detach(), k.detach())))]
        return actions(found)

    assert "stop" in train(negatives=False)
    assert set(train(negatives=True)) == {""}


WRONG: dict[str, Any] = {
    "non_finite": "ignore", "collapse": "skip", "trap": "rollback", "patience": 0, "skips": 0, "trap_evaluations": 0,
    "warmup": -1, "rollbacks": -1, "rank": 1.0, "uniformity": 0.5, "trap_nats": math.nan, "rate_after_rollback": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_option(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^alarm\.{name} is .*; (use|give) "):
        AlarmConfig(**{name: WRONG[name]})
