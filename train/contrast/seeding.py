"""Seeding over gradient embeddings: each next centre by its distance to the nearest one so far.

`kmeans_plus_plus` draws by D^2, `greedy_kmeans_plus_plus` takes the best of some such draws, `k_center` takes the farthest.
All are for D problems of one size, and return int64 (D, count), distinct, -1 at the end once nothing allowed is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cmacc.train.contrast.gradients import GradientFactors

NOTHING_LEFT = -1
First = Literal["norm", "uniform"]


def first_centre(factors: GradientFactors, free: Tensor, first: First, u: Tensor) -> Tensor:
    """Index of the largest gradient, the first of several (BADGE), or any by `u` in [0, 1). 0-d."""
    if first == "norm":
        return factors.norms.masked_fill(~free, -1.0).argmax()
    return draw(free.double(), u)


def draw(weight: Tensor, u: Tensor) -> Tensor:
    """Indices with probability weight / sum(weight). weight: (N,) float64, u: in [0, 1), any shape, float64.

    By the inverse of the cumulative sum: torch.multinomial waits for the host and is limited to 2^24 entries.
    """
    # As two rows: of a single one CUDA adds up the blocks in whatever order they finish, and ranks would draw differently.
    cumulative = weight.expand(2, -1).cumsum(1)[0]
    return torch.searchsorted(cumulative, u * cumulative[-1], right=True).clamp_max_(len(weight) - 1)


def one_by_one(
    factors: Iterable[GradientFactors],
    allowed: Tensor,
    count: int,
    generator: torch.Generator,
    first: First,
    following: Callable[[GradientFactors, Tensor, Tensor, Tensor], Tensor],
    trials: int = 1,
) -> Tensor:
    """The plain loop. following(factors, nearest, free, u) -> the next centre, 0-d; u: (trials,) draws."""
    draws = torch.rand(len(allowed), count, trials, generator=generator, device=allowed.device, dtype=torch.float64)
    picks = []
    for f, free, u in zip(factors, allowed.clone(), draws, strict=True):
        nearest, mine = torch.full_like(f.norms, torch.inf), []
        for i in range(count):
            pick = following(f, nearest, free, u[i]) if i else first_centre(f, free, first, u[0, 0])
            mine.append(torch.where(free.any(), pick, NOTHING_LEFT))
            free.index_fill_(0, pick[None], False)  # free[pick] would read the number
            nearest = torch.minimum(nearest, f.nearest(f.rows(pick[None])))
        picks.append(torch.stack(mine))
    return torch.stack(picks)


def d2_weight(nearest: Tensor, free: Tensor) -> Tensor:
    """D^2 where free; uniform where all of those are 0. float64."""
    weight = nearest.where(free, 0).double()
    return torch.where(weight.sum() > 0, weight, free.double())


def kmeans_plus_plus(
    factors: Iterable[GradientFactors],
    allowed: Tensor,
    count: int,
    generator: torch.Generator,
    first: First = "norm",
    looks: bool | None = None,
) -> Tensor:
    """k-means++ seeding (Arthur & Vassilvitskii 2007): each next centre n with probability D(n)^2 / sum D^2, D the
    distance to the nearest centre so far. Where every D is 0, uniform over what is not yet chosen. What is not finite is never
    picked.

    By rejection, for D only falls as centres come. A law w >= D^2 is taken now and then. A proposal n is drawn with
    probability w(n) / sum w and accepted with probability D(n)^2 / w(n), D of that moment; so, whatever was picked before,
    it is n and accepted with probability D(n)^2 / sum w, which is in proportion to D(n)^2: the wanted law, exactly. When a new
    law is taken depends on the past alone. D is needed of proposals only, from a small matrix among them; the pool is
    read once for a new law. The first one, w = (|g_n| + |g_first|)^2, needs norms alone.

    looks: read numbers while choosing, so that no work is done in vain; default: on a CPU. Without it the amount of work is
    fixed, `LAWS` laws with `PROPOSALS` times `count` proposals each, and the host waits for nothing; should the sum of D^2
    fall so steeply that this is not enough, the last places stay -1.
    """
    looks = allowed.device.type == "cpu" if looks is None else looks
    by_rejection, each = _looking if looks else _unseen, iter(factors)
    # No name for them here: the last ones would be kept while the next are made.
    return torch.stack([by_rejection(next(each), mine, count, generator, first) for mine in allowed])


LAWS, PROPOSALS, PASSES = 4, 6, 10
"""Without looking. Measured: twenty clusters of exact copies are the worst and need all laws, most data one or two; five passes
were the most that any round needed."""
_PROPOSALS_A_ROUND, _MOST = 3, 1024
"""Times `count`, and at most, where one looks after each round."""
_FEW = 16
"""A new law is taken when less than one proposal in so many was accepted."""


def _looking(factors: GradientFactors, allowed: Tensor, count: int, generator: torch.Generator, first: First) -> Tensor:
    allowed = allowed & factors.norms.isfinite()
    picks = torch.full((count,), NOTHING_LEFT, device=allowed.device)
    left = min(count, int(allowed.sum()))
    if not left:
        return picks
    u = torch.rand((), generator=generator, device=allowed.device, dtype=torch.float64)
    picks[0] = first_centre(factors, allowed, first, u)
    law, done, since = _Law.bound(factors, allowed, picks[0]), 1, 0
    while done < left:
        proposals, conflict, welcome = law.propose(picks[since:done], min(_PROPOSALS_A_ROUND * count, _MOST), generator)
        accepted = welcome
        while not torch.equal(accepted, better := _pass(accepted, conflict, welcome)):
            accepted = better
        found = proposals[accepted > 0][: left - done]
        picks[done : done + len(found)] = found
        done += len(found)
        if done < left and len(found) * _FEW < len(proposals):
            law, since = law.renewed(picks[since:done]), done
    return picks


def _unseen(factors: GradientFactors, allowed: Tensor, count: int, generator: torch.Generator, first: First) -> Tensor:
    allowed = allowed & factors.norms.isfinite()
    u = torch.rand((), generator=generator, device=allowed.device, dtype=torch.float64)
    centre = first_centre(factors, allowed, first, u)
    picks = torch.full((count + 1,), NOTHING_LEFT, device=allowed.device)  # one place for what is left over
    picks[:1] = torch.where(allowed.any(), centre, NOTHING_LEFT)
    law, done = _Law.bound(factors, allowed, centre), torch.ones_like(centre)
    for number in range(LAWS):
        centres = picks[:count].where(picks[:count] != NOTHING_LEFT, centre)
        if number:
            law = law.renewed(centres)
        proposals, conflict, welcome = law.propose(centres, PROPOSALS * count, generator)
        before = passed = welcome
        for _ in range(PASSES):
            before, passed = passed, _pass(passed, conflict, welcome)
        # What two passes agree on is settled. What comes after a doubt is dropped; none was ever seen after so many.
        accepted = passed * (before == passed).cumprod(0) > 0
        place = done + accepted.cumsum(0) - 1
        picks[torch.where(accepted & (place < count), place, count)] = proposals
        done = done + accepted.sum()
    return picks[:count]


def _pass(accepted: Tensor, conflict: Tensor, welcome: Tensor) -> Tensor:
    """Accept what is welcome and meets no conflict with an accepted one before it; (S,) of 0 and 1. Done again and again from a
    guess too large, the results bound the solution from below and above in turn, and soon meet (arXiv 1202.3205)."""
    return welcome * (accepted @ conflict == 0)


@dataclass(frozen=True)
class _Law:
    """Weights (N,) float64 that proposals are drawn by, at least D^2 where free, 0 elsewhere. flat: 0-d bool, all D are 0."""

    factors: GradientFactors
    free: Tensor
    weight: Tensor
    flat: Tensor

    @classmethod
    def bound(cls, factors: GradientFactors, allowed: Tensor, centre: Tensor) -> _Law:
        norms = factors.norms.sqrt()
        free = allowed.index_fill(0, centre[None], False)
        return cls(factors, free, (norms + norms[centre[None]]).square().where(free, 0).double(), torch.zeros_like(free[0]))

    def renewed(self, centres: Tensor) -> _Law:
        """The law by the distances of now. centres: at least those picked since this law."""
        free = self.free.index_fill(0, centres, False)
        weight = torch.minimum(self.weight, self.factors.nearest(self.factors.rows(centres))).where(free & ~self.flat, 0)
        flat = weight.sum() == 0
        return _Law(self.factors, free, torch.where(flat, free.double(), weight), flat)

    def propose(self, centres: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Proposals (S,); whether the first of two, once accepted, would keep the second out, (S, S), above the diagonal; and
        which are not kept out by `centres`, those picked since the law was taken, (S,). The latter as float, 0 or 1."""
        draws = torch.rand(2, count, generator=generator, device=self.weight.device, dtype=torch.float64)
        proposals = draw(self.weight, draws[0])
        threshold = draws[1] * self.weight[proposals]
        others = torch.cat([centres, proposals])
        squared = self.factors.rows(others).squared_distances(self.factors.rows(proposals))
        squared = torch.where(self.flat, (others[:, None] != proposals).to(squared.dtype), squared)
        kept_out = squared <= threshold
        welcome = ~kept_out[: len(centres)].any(0) & (threshold < self.weight[proposals])  # a weight may be 0
        return proposals, kept_out[len(centres) :].triu_(1).float(), welcome.float()


def greedy_kmeans_plus_plus(
    factors: Iterable[GradientFactors], allowed: Tensor, count: int, generator: torch.Generator, first: First = "norm"
) -> Tensor:
    """Of 2 + ln(count) draws by D^2 each time the one that leaves the smallest sum of D^2 (Arthur & Vassilvitskii 2007,
    section 5; the number is scikit-learn's), the first of equal ones."""

    def following(factors: GradientFactors, nearest: Tensor, free: Tensor, u: Tensor) -> Tensor:
        trials = draw(d2_weight(nearest, free), u)
        left = torch.minimum(nearest[:, None], factors.squared_distances(factors.rows(trials)))
        return trials.gather(0, left.where(free[:, None], 0).sum(0).argmin()[None])[0]

    return one_by_one(factors, allowed, count, generator, first, following, trials=2 + int(math.log(count)))


def k_center(
    factors: Iterable[GradientFactors], allowed: Tensor, count: int, generator: torch.Generator, first: First = "norm"
) -> Tensor:
    """Farthest first (Gonzalez 1985): each next centre has the largest distance to the nearest one so far, the first of equal
    ones."""

    def following(factors: GradientFactors, nearest: Tensor, free: Tensor, u: Tensor) -> Tensor:
        return nearest.masked_fill(~free, -1.0).argmax()

    return one_by_one(factors, allowed, count, generator, first, following)
