"""Is anything being learned? Numbers that show a collapse, or a falling loss that means nothing, when it starts.

All are 0-d tensors until `to_host` brings them over in one transfer: nothing before it waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cmacc.train.contrast.gradients import residuals
from cmacc.train.contrast.losses import LossParts
from cmacc.train.contrast.rings import EMPTY, Entries, Ring

Facts = dict[str, Tensor]
"""`group/name` to a 0-d tensor."""

SAMPLED = 1_024
"""Candidates whose residuals are looked at: over a whole pool that costs as much as a part of the selection."""


def alignment(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared distance of positive pairs, 0 is perfect (arXiv 2005.10242). x, y: (n, d), unit vectors."""
    return (x - y).square().sum(1).mean()


def uniformity(x: Tensor) -> Tensor:
    """ln of the mean Gaussian potential of pairs, lower is more even on the sphere (arXiv 2005.10242). x: (n, d), n >= 2."""
    return torch.pdist(x).square().mul(-2).exp().mean().log()


def effective_rank(x: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values: 1 is a collapse to a line, d is isotropic. x: (n, d).

    NaN where x is not finite, on which LAPACK would raise.
    """
    finite = x.isfinite().all()
    x = x.where(finite, 0.0)
    s = torch.linalg.svdvals(x - x.mean(0))
    p = s / s.sum().clamp_min(1e-12)
    return torch.special.entr(p).sum().exp().where(finite, math.nan)


def modality_gap(x: Tensor, y: Tensor) -> Tensor:
    """Distance of the two modalities' centres (arXiv 2203.02053)."""
    return (x.mean(0) - y.mean(0)).norm()


def loss_facts(terms: Mapping[str, LossParts]) -> Facts:
    """Each term with its accuracy and its chance level, and their sum."""
    facts: Facts = {"loss/total": torch.stack([parts.loss.detach() for parts in terms.values()]).sum()}
    for name, parts in terms.items():
        facts |= {f"loss/{name}": parts.loss.detach(), f"chance/{name}": parts.chance, f"accuracy/{name}": parts.accuracy}
    return facts


def query_facts(video: Tensor, audio: Tensor) -> Facts:
    """video, audio: (M, d), unit vectors of the same clips."""
    facts: Facts = {"queries/alignment": alignment(video, audio), "queries/modality_gap": modality_gap(video, audio)}
    if len(video) > 1:
        for name, x in (("video", video), ("audio", audio)):
            facts |= {f"queries/uniformity_{name}": uniformity(x), f"queries/effective_rank_{name}": effective_rank(x)}
    return facts


def gradient_facts(encoders: Mapping[str, nn.Module]) -> Facts:
    """Norm of the gradient of each encoder, and of all. Not finite where any gradient is not."""
    squared = {
        name: torch.nn.utils.get_total_norm([p.grad for p in encoder.parameters() if p.grad is not None]).square()
        for name, encoder in encoders.items()
    }
    facts: Facts = {f"optimiser/gradient_norm_{name}": value.sqrt() for name, value in squared.items()}
    return {"optimiser/gradient_norm": torch.stack([*squared.values()]).sum().sqrt(), **facts}


def dictionary_facts(dictionary: Ring, step: int) -> Facts:
    """Diversity of a dictionary: entries, mean cosine of pairs, share of duplicate clips, mean and largest age in steps, and
    distinct classes among labelled clips (the count of the paper's figure 3)."""
    entries, filled = dictionary.entries, dictionary.filled
    n = filled.sum()
    total = entries.keys.where(filled[:, None], 0.0).sum(0).square().sum()
    age = torch.where(filled, step - entries.born, 0)
    return {
        "entries": n,
        "cosine": (total - n) / (n * (n - 1)),
        "duplicates": 1 - _distinct(entries.ids, filled) / n,
        "age": age.sum() / n,
        "age_max": age.max(),
        "classes": _distinct(entries.labels, filled),
    }


def _distinct(values: Tensor, among: Tensor) -> Tensor:
    """How many different values other than EMPTY there are; `unique` would wait for the device."""
    ordered = values.where(among, EMPTY).sort().values
    return ((ordered[1:] != ordered[:-1]) & (ordered[1:] != EMPTY)).sum() + (ordered[0] != EMPTY)


def pick_facts(picked: Mapping[str, Entries], step: int) -> Facts:
    """How many candidates were picked in this step, and the mean age of their keys, in steps.

    picked: by modality, the entries that were let into the dictionaries; an id of -1 is none.
    """
    count = torch.stack([(p.ids != EMPTY).sum() for p in picked.values()]).sum()
    age = torch.stack([torch.where(p.ids != EMPTY, step - p.born, 0).sum() for p in picked.values()]).sum()
    return {"selection/picked": count, "selection/age": age / count.clamp_min(1)}


def residual_facts(candidates: Mapping[str, tuple[Entries, Tensor]], pseudo_tau: float) -> Facts:
    """Mean and spread of |R_n|, the uncertainty of candidates: where the spread is 0, only diversity chooses.

    candidates: by modality, entries (an id of -1 is none) and the other modality's queries (M, d).
    """
    facts: Facts = {}
    for name, (entries, queries) in candidates.items():
        sample = slice(None, None, max(1, len(entries.ids) // SAMPLED))
        there = (entries.ids[sample] != EMPTY).float()
        norms, n = residuals(entries.keys[sample], queries, pseudo_tau).norm(dim=1), there.sum()
        mean = (norms * there).sum() / n
        spread = (((norms - mean).square() * there).sum() / (n - 1).clamp_min(1)).sqrt()
        facts |= {f"selection/residual_mean_{name}": mean, f"selection/residual_std_{name}": spread}
        facts[f"pool_{name}/entries"] = (entries.ids != EMPTY).sum()
    return facts


@torch.no_grad()
def step_facts(
    terms: Mapping[str, LossParts],
    q_video: Tensor,
    q_audio: Tensor,
    memory: nn.Module | None,
    picked: Mapping[str, Entries],
    step: int,
    pseudo_tau: float,
    candidates: Mapping[str, Entries] | None = None,
) -> Facts:
    """One step's numbers. terms: the two losses by name. q_video, q_audio: (M, d). memory: with its rings `dictionary_…` and
    `pool_…`, None where there are no keys. picked: by modality. candidates: of this step, where they are not the pools'."""
    facts = loss_facts(terms) | query_facts(q_video.detach(), q_audio.detach()) | pick_facts(picked, step)
    if memory is None:
        return facts
    among = dict(candidates or {})
    for name, ring in memory.named_children():
        if not isinstance(ring, Ring):
            continue
        if name.startswith("dictionary_"):
            facts |= {f"{name}/{fact}": value for fact, value in dictionary_facts(ring, step).items()}
        elif name.startswith("pool_"):
            among.setdefault(name.removeprefix("pool_"), ring.entries)
    queries = {"video": q_audio.detach(), "audio": q_video.detach()}
    return facts | residual_facts({name: (entries, queries[name]) for name, entries in among.items()}, pseudo_tau)


def to_host(facts: Mapping[str, Tensor]) -> dict[str, float]:
    """Numbers for the log, in one transfer, without what an empty ring cannot tell, and classes where no clip has a label."""
    names, values = list(facts), torch.stack([value.detach().double() for value in facts.values()]).tolist()
    told = dict(zip(names, values, strict=True))
    for name in names:
        group, _, fact = name.partition("/")
        few = told.get(f"{group}/entries", math.inf) < 2
        if (few and fact != "entries") or (fact == "classes" and told[name] == 0):
            del told[name]
    for name in ("video", "audio"):
        if told.get(f"pool_{name}/entries", math.inf) < 2:
            for fact in ("mean", "std"):
                told.pop(f"selection/residual_{fact}_{name}", None)
    return told
