"""Is anything being learned? Numbers that show a collapse, or a falling loss that means nothing, when it starts."""

from __future__ import annotations

import torch
from torch import Tensor

from cmacc.train.gradients import residuals
from cmacc.train.losses import LossParts
from cmacc.train.model import CrossModal
from cmacc.train.objective import Contrast
from cmacc.train.rings import EMPTY, Ring


def alignment(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared distance of positive pairs, 0 is perfect (arXiv 2005.10242). x, y: (n, d), unit vectors."""
    return (x - y).square().sum(1).mean()


def uniformity(x: Tensor) -> Tensor:
    """ln of the mean Gaussian potential of pairs, lower is more even on the sphere (arXiv 2005.10242). x: (n, d)."""
    return torch.pdist(x).square().mul(-2).exp().mean().log()


def effective_rank(x: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values: 1 is a collapse to a line, d is isotropic. x: (n, d)."""
    s = torch.linalg.svdvals(x - x.mean(0))
    p = s / s.sum().clamp_min(1e-12)
    return torch.special.entr(p).sum().exp()


def modality_gap(x: Tensor, y: Tensor) -> Tensor:
    """Distance of the two modalities' centres (arXiv 2203.02053)."""
    return (x.mean(0) - y.mean(0)).norm()


def dictionary_facts(dictionary: Ring, step: int) -> dict[str, float]:
    """Diversity of a dictionary: entries, mean cosine of pairs, share of duplicate clips, mean age in steps, and, where
    clips have labels, distinct classes (the count of the paper's figure 3)."""
    entries = dictionary.entries.take(dictionary.filled)
    n = len(entries.ids)
    if n < 2:
        return {"entries": float(n)}
    total = entries.keys.sum(0).square().sum()
    classes = entries.labels[entries.labels != EMPTY].unique()
    return {
        "entries": float(n),
        "cosine": float((total - n) / (n * (n - 1))),
        "duplicates": 1 - len(entries.ids.unique()) / n,
        "age": float((step - entries.born).float().mean()),
        "classes": float(len(classes)),
    }


def _term(name: str, parts: LossParts) -> dict[str, float]:
    return {
        f"loss/{name}": float(parts.loss.detach()),
        f"chance/{name}": float(parts.chance),
        f"accuracy/{name}": float(parts.accuracy),
    }


@torch.no_grad()
def step_facts(model: CrossModal, result: Contrast, q_video: Tensor, q_audio: Tensor, step: int) -> dict[str, float]:
    """One step's numbers, `group/name` to value. Waits for the device: call it on log steps alone."""
    facts = _term("video_to_audio", result.video_to_audio) | _term("audio_to_video", result.audio_to_video)
    facts |= {
        "loss/total": float(result.loss.detach()),
        "queries/alignment": float(alignment(q_video, q_audio)),
        "queries/uniformity_video": float(uniformity(q_video)),
        "queries/uniformity_audio": float(uniformity(q_audio)),
        "queries/effective_rank_video": float(effective_rank(q_video)),
        "queries/effective_rank_audio": float(effective_rank(q_audio)),
        "queries/modality_gap": float(modality_gap(q_video, q_audio)),
        "selection/picked": float((result.late_audio.ids == EMPTY).sum() + (result.late_video.ids == EMPTY).sum()),
    }
    if not model.objective.uses_keys:
        return facts
    memory = model.memory
    for name, ring in (("dictionary_video", memory.dictionary_video), ("dictionary_audio", memory.dictionary_audio)):
        facts |= {f"{name}/{fact}": value for fact, value in dictionary_facts(ring, step).items()}
    pool = memory.pool_video.entries.take(memory.pool_video.filled)
    facts["pool_video/entries"] = float(len(pool.ids))
    if len(pool.ids) > 1:
        norms = residuals(pool.keys, q_audio, model.objective.pseudo_tau).norm(dim=1)
        facts["selection/residual_mean"], facts["selection/residual_std"] = float(norms.mean()), float(norms.std())
    return facts
