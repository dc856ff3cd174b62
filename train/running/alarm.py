"""The alarm: a pure function of the numbers it was shown, which says when a run goes wrong, and what to do then."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

NonFinite = Literal["stop", "skip", "rollback"]
Collapse = Literal["stop", "rollback", "warn", "off"]
Trap = Literal["stop", "warn", "off"]
Action = Literal["warn", "skip", "rollback", "stop"]

_NAMED_CLIPS = 8
_FEW_DIRECTIONS = 7
"""Below so many the effective rank says nothing: of four clips, two pairs of one video each are a line."""


@dataclass(frozen=True)
class AlarmConfig:
    """What counts as an alarm, and what is done then.

    non_finite: a loss or a gradient is not finite. No weight was touched: `skip` takes the next batch, `rollback` goes back to
    the last checkpoint. collapse: the queries of a modality lie on a line or in a point. trap: the loss is far below chance, but
    held-out retrieval stays at chance: keys are told by their age, or from their BatchNorm, not by what they show.

    warmup: steps before collapse and trap are looked for, since networks that know nothing see all clips alike. patience: log
    lines in a row that must show a collapse. rank: an effective rank below this share of the way from 1, a line, to
    min(batch - 1, width), the most there can be, is a collapse; unit vectors drawn at random have above .9; in batches of less
    than 8 clips it is not looked at. uniformity: above it is a collapse too; 0 is a single point, -4 the whole sphere, -.2 a mean
    cosine of .95. trap_nats: the loss below chance by so much. trap_evaluations: in a row with retrieval within two standard
    deviations of chance.

    rollbacks: the next alarm after so many stops the run. rate_after_rollback: each multiplies the learning rate by it, for the
    same steps at the same rate would end the same. skips: more steps in a row that are not finite stop the run.
    """

    non_finite: NonFinite = "stop"
    collapse: Collapse = "warn"
    trap: Trap = "warn"
    warmup: int = 1_000
    patience: int = 5
    rank: float = 0.05
    uniformity: float = -0.2
    trap_nats: float = 0.5
    trap_evaluations: int = 2
    rollbacks: int = 3
    rate_after_rollback: float = 0.5
    skips: int = 10

    def __post_init__(self) -> None:
        for name, choices in (("non_finite", NonFinite), ("collapse", Collapse), ("trap", Trap)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"alarm.{name} is {getattr(self, name)!r}; use one of {', '.join(get_args(choices))}")
        for name in ("patience", "trap_evaluations", "skips"):
            if getattr(self, name) < 1:
                raise ValueError(f"alarm.{name} is {getattr(self, name)}; give 1 or more")
        for name in ("warmup", "rollbacks"):
            if getattr(self, name) < 0:
                raise ValueError(f"alarm.{name} is {getattr(self, name)}; give 0 or more")
        if not 0 <= self.rank < 1:
            raise ValueError(f"alarm.rank is {self.rank}; give a share from 0 (never) to below 1")
        if not -4 <= self.uniformity <= 0:
            raise ValueError(f"alarm.uniformity is {self.uniformity}; give -4 (an even sphere) to 0 (a point, so never)")
        if not 0 < self.trap_nats < math.inf:
            raise ValueError(f"alarm.trap_nats is {self.trap_nats}; give a number of nats above 0")
        if not 0 < self.rate_after_rollback <= 1:
            raise ValueError(f"alarm.rate_after_rollback is {self.rate_after_rollback}; give a factor above 0, at most 1")


@dataclass(frozen=True)
class Verdict:
    """step: where it happened. action: what the loop is to do. what: happened. why: it matters. remedy: what to try."""

    step: int
    kind: Literal["non_finite", "collapse", "trap"]
    action: Action
    what: str
    why: str
    remedy: str

    def sentence(self, clips: Sequence[str] = ()) -> str:
        """For the log, or the error that ends the run. clips: keys of the step's batch."""
        more = f" and {len(clips) - _NAMED_CLIPS} more" if len(clips) > _NAMED_CLIPS else ""
        named = f" (clips {', '.join(clips[:_NAMED_CLIPS])}{more})" if clips else ""
        return f"{self.what} at step {self.step}{named}: {self.why}; {self.remedy}"


@dataclass
class _Seen:
    """All that a verdict depends on besides the facts of the moment."""

    collapsed: int = 0
    at_chance: int = 0
    below_chance: float = 0.0
    last_bad: int = -2
    bad_in_a_row: int = 0
    rollbacks: int = 0
    told: list[str] = field(default_factory=list)


class Alarm:
    """Shown the facts of log steps and evaluations, and those of a step that was not finite, it answers with a verdict or None.

    batch: clips of the global batch, width: of the embedding; both bound the effective rank. When a verdict says `rollback`, keep
    this object as it is (do not load its state from the checkpoint): it counts them, and `rate` falls with each.
    """

    def __init__(self, config: AlarmConfig, batch: int, width: int) -> None:
        self.config = config
        directions = min(batch - 1, width)
        self.lowest_rank = 1 + config.rank * (directions - 1) if directions >= _FEW_DIRECTIONS else 0.0
        self._seen = _Seen()

    @property
    def rate(self) -> float:
        """Factor on the learning rate."""
        return self.config.rate_after_rollback**self._seen.rollbacks

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self._seen)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seen = _Seen(**state)

    def look(self, step: int, facts: Mapping[str, float]) -> Verdict | None:
        """facts: of one step, `group/name` to value, as `monitor` and `retrieval` name them; only what is there is judged."""
        found = self._non_finite(step, facts)
        if found is None and step >= self.config.warmup:
            found = self._collapse(step, facts) or self._trap(step, facts)
        return found

    # --- inside ---

    def _non_finite(self, step: int, facts: Mapping[str, float]) -> Verdict | None:
        names = [n for n, v in facts.items() if n.startswith(("loss/", "optimiser/gradient")) and not math.isfinite(v)]
        seen, config = self._seen, self.config
        if not names or step == seen.last_bad:  # the log line of a step that was told before
            return None
        seen.bad_in_a_row = seen.bad_in_a_row + 1 if step == seen.last_bad + 1 else 1
        seen.last_bad = step
        what = f"{_listed(names)} {'are' if len(names) > 1 else 'is'} not finite"
        action: Action = config.non_finite
        why = "nothing was updated by it"
        if action == "skip" and seen.bad_in_a_row > config.skips:
            action, why = "stop", f"so were the {seen.bad_in_a_row - 1} steps before it, more than alarm.skips={config.skips}"
        action, why = self._counted(action, why)
        remedy = "`cmacc replay` names the first layer; lower optimiser.rate, raise objective.tau, or leave out the clip"
        return Verdict(step, "non_finite", action, what, why, remedy)

    def _collapse(self, step: int, facts: Mapping[str, float]) -> Verdict | None:
        seen, config = self._seen, self.config
        signs = []
        for modality in ("video", "audio"):
            rank, even = (facts.get(f"queries/{name}_{modality}") for name in ("effective_rank", "uniformity"))
            if rank is not None and rank < self.lowest_rank:
                signs.append(f"effective rank of {modality} {rank:.2f}, below {self.lowest_rank:.2f}")
            if even is not None and even > config.uniformity:
                signs.append(f"uniformity of {modality} {even:.3f}, above {config.uniformity:g}")
            if rank is None and even is None:
                return None
        seen.collapsed = seen.collapsed + 1 if signs else 0
        if not signs:
            self._gone("collapse")
        if config.collapse == "off" or seen.collapsed < config.patience:
            return None
        action, why = self._counted(config.collapse, f"all clips look alike for {seen.collapsed} log lines in a row")
        if not self._news("collapse", action):
            return None
        remedy = "raise objective.momentum, lower optimiser.rate, or use objective.negatives=batch+dictionary, in a new run"
        return Verdict(step, "collapse", action, f"the queries have collapsed ({'; '.join(signs)})", why, remedy)

    def _trap(self, step: int, facts: Mapping[str, float]) -> Verdict | None:
        seen, config = self._seen, self.config
        terms = [n.removeprefix("loss/") for n in facts if n.startswith("loss/") and f"chance/{n.removeprefix('loss/')}" in facts]
        if terms:
            seen.below_chance = min(facts[f"chance/{t}"] - facts[f"loss/{t}"] for t in terms)
        if "held_out/R@5" not in facts:
            return None
        trapped = seen.below_chance > config.trap_nats and _at_chance(facts)
        seen.at_chance = seen.at_chance + 1 if trapped else 0
        if not trapped:
            self._gone("trap")
        if config.trap == "off" or seen.at_chance < config.trap_evaluations:
            return None
        if not self._news("trap", config.trap):
            return None
        what = f"the loss is {seen.below_chance:.2f} nats below chance, but held-out retrieval is at chance"
        why = f"for {seen.at_chance} evaluations: keys are told by something else than what the clips show, as their age"
        remedy = (
            "raise objective.momentum, use objective.negatives=batch+dictionary or objective.pool=fresh, or lower optimiser.rate"
        )
        return Verdict(step, "trap", config.trap, what, why, remedy)

    def _news(self, kind: str, action: Action) -> bool:
        """A warning is given once, until the sign was gone."""
        if action == "warn" and kind in self._seen.told:
            return False
        self._gone(kind)
        self._seen.told.append(kind)
        return True

    def _gone(self, kind: str) -> None:
        self._seen.told = [k for k in self._seen.told if k != kind]

    def _counted(self, action: Action, why: str) -> tuple[Action, str]:
        """Rollbacks are counted; after the last one, the next alarm stops the run."""
        if action != "rollback":
            return action, why
        if self._seen.rollbacks >= self.config.rollbacks:
            return "stop", f"{why}, and {self._seen.rollbacks} rollbacks did not help (alarm.rollbacks)"
        self._seen = _Seen(rollbacks=self._seen.rollbacks + 1)
        return action, why


def _at_chance(facts: Mapping[str, float]) -> bool:
    """Whether R@5, and class@1 where there are labels, are within two standard deviations of chance, for n clips."""
    n = 1 / max(facts["held_out/chance_R@1"], 1e-9)
    for name in ("R@5", "class@1"):
        if f"held_out/{name}" not in facts:
            continue
        chance = facts[f"held_out/chance_{name}"]
        limit = chance + 2 * math.sqrt(chance * (1 - chance) / n)
        if limit >= 1 or facts[f"held_out/{name}"] > limit:  # among so few clips nothing can be said
            return False
    return True


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
