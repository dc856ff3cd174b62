"""Gradient embeddings against autograd and against materialised outer products, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from train_data import unit

from cmacc.train.gradients import GRADIENT_FORMS, GradientFactors, GradientForm, gradient_factors, residuals


def plain_residuals(candidates: torch.Tensor, queries: torch.Tensor, tau: float) -> np.ndarray:
    """softmax of u . q / tau, less 1 at its largest entry, (N, M), float64."""
    u, q = candidates.double().numpy(), queries.double().numpy()
    rows = []
    for one in u:
        e = np.exp([(one @ other) / tau for other in q])
        p = e / e.sum()
        p[int(np.argmax(p))] -= 1
        rows.append(p)
    return np.array(rows)


@pytest.mark.parametrize("tau", [0.05, 0.2, 0.7])
def test_residuals(tau: float) -> None:
    candidates, queries = unit(30, 8, seed=1), unit(6, 8, seed=2)
    found = residuals(candidates, queries, tau)
    assert found.dtype == torch.float32
    assert np.allclose(found.numpy(), plain_residuals(candidates, queries, tau), atol=1e-6)
    assert found.sum(1).abs().max() < 1e-6
    assert torch.equal((found < 0).sum(1), torch.ones(30, dtype=torch.int64))
    half = residuals(candidates.half(), queries.half(), tau)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_forms_are_gradients_of_the_pseudo_labelled_cross_entropy(tau: float) -> None:
    """l_n = -ln softmax_j(q_j . u_n / tau)[y_n], y_n the best query. Autograd, float64:
    prototype is dl_n/du_n itself; badge is tau times dl_n/dQ, Q a last layer with the queries as rows."""
    candidates, queries = unit(12, 8, seed=3), unit(5, 8, seed=4)
    badge, prototype = (gradient_factors(candidates, queries, tau, form) for form in ("badge", "prototype"))
    assert badge.left.dtype == badge.right.dtype == prototype.left.dtype == torch.float32
    for n in range(12):
        u, layer = candidates[n].double().requires_grad_(), queries.double().requires_grad_()
        logits = layer @ u / tau
        torch.nn.functional.cross_entropy(logits[None], logits.argmax()[None]).backward()
        assert torch.allclose(torch.outer(badge.left[n], badge.right[n]).double(), tau * layer.grad, atol=1e-6)
        assert torch.allclose(torch.outer(prototype.left[n], prototype.right[n])[:, 0].double(), u.grad, atol=1e-5)


@pytest.mark.parametrize("form", GRADIENT_FORMS)
@pytest.mark.parametrize("tau", [0.07, 0.7])
def test_norms_and_distances_are_those_of_the_outer_products(form: GradientForm, tau: float) -> None:
    candidates, queries = unit(40, 16, seed=5), unit(7, 16, seed=6)
    factors = gradient_factors(candidates, queries, tau, form)
    r, u, q = plain_residuals(candidates, queries, tau), candidates.double().numpy(), queries.double().numpy()
    g = np.stack([np.outer(r[n], u[n]).ravel() if form == "badge" else r[n] @ q / tau for n in range(40)])
    norms = factors.squared_norm()
    assert np.allclose(norms.numpy(), (g**2).sum(1), rtol=1e-5, atol=1e-6 * norms.max().item())
    for c in range(40):
        expected = ((g - g[c]) ** 2).sum(1)
        found = factors.squared_distance(torch.tensor(c), norms).numpy()
        assert found[c] == 0
        assert np.allclose(found, expected, rtol=1e-5, atol=2e-6 * norms.max().item()), c


@pytest.mark.parametrize("form", GRADIENT_FORMS)
@pytest.mark.parametrize(("count", "batch", "width"), [(7, 4, 6), (17, 8, 16), (50, 32, 128), (333, 128, 512)])
def test_copies_are_at_distance_nought(form: GradientForm, count: int, batch: int, width: int) -> None:
    """Not at the last bits of two sums: those would decide where D^2 sampling has nothing else to go by."""
    queries = unit(batch, width, seed=7)
    candidates = torch.cat([unit(1, width, seed=8).expand(count, width), unit(3, width, seed=9)])
    factors = gradient_factors(candidates, queries, 0.1, form)
    norms = factors.squared_norm()
    for c in (0, count // 2, count - 1):
        distances = factors.squared_distance(torch.tensor(c), norms)
        assert torch.equal(distances[:count], torch.zeros(count))
        assert (distances[count:] > 1e-3 * norms[c]).all()


def test_small_distances_between_large_gradients() -> None:
    """A squared distance of a ten-thousandth of the norms is known to about a part in a hundred in float32."""
    left = 30 * (unit(1, 64, seed=10) + 0.01 * unit(20, 64, seed=11))
    right = unit(1, 32, seed=12) + 0.01 * unit(20, 32, seed=13)
    factors = GradientFactors(left, right)
    g = (left.double()[:, :, None] * right.double()[:, None, :]).flatten(1)
    expected = (g - g[3]).square().sum(1)
    found = factors.squared_distance(torch.tensor(3), factors.squared_norm())
    assert 5e-5 < (expected[4:] / 900).min() < (expected[4:] / 900).max() < 1e-3
    assert torch.allclose(found.double(), expected, rtol=0.01, atol=0)


def test_the_scale_trap() -> None:
    """METHOD: with unit vectors, M = 128 and pseudo_tau .7 every |R_n| is about .99, so uncertainty is constant."""
    candidates, queries = unit(500, 512, seed=14), unit(128, 512, seed=15)
    trapped, free = (residuals(candidates, queries, tau).norm(dim=1) for tau in (0.7, 0.02))
    assert 0.985 < trapped.min() < trapped.max() < 1.0
    assert trapped.std() < 1e-3
    assert free.std() > 50 * trapped.std()
