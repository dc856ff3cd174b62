"""Gradient embeddings against autograd and against materialised outer products, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import gradients
from train_data import unit

from cmacc.train.contrast import gradients as module
from cmacc.train.contrast.gradients import GRADIENT_FORMS, GradientFactors, GradientForm, gradient_factors, residuals


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


def test_last_layer_is_the_gradient_of_a_linear_last_layer() -> None:
    """With q_j = W z_j and no L2 norm behind it: tau times dl_n/dW, by autograd in float64."""
    candidates, layer, last = unit(12, 8, seed=3), unit(8, 7, seed=4).double(), 3 * unit(5, 7, seed=5)
    factors = gradient_factors(candidates, (last.double() @ layer.T).float(), 0.5, "last_layer", last)
    for n in range(12):
        weight = layer.clone().requires_grad_()
        logits = last.double() @ weight.T @ candidates[n].double() / 0.5
        torch.nn.functional.cross_entropy(logits[None], logits.argmax()[None]).backward()
        found = torch.outer(factors.right[n], factors.left[n]).double()
        assert torch.allclose(found, 0.5 * weight.grad, atol=1e-5)


def test_last_layer_needs_its_input() -> None:
    with pytest.raises(ValueError, match=r"^objective\.form is last_layer, .*; give it, or use badge"):
        gradient_factors(unit(3, 8), unit(2, 8), 0.1, "last_layer")


@pytest.mark.parametrize("rows", [1 << 20, 100])
@pytest.mark.parametrize("form", GRADIENT_FORMS)
@pytest.mark.parametrize("tau", [0.07, 0.7])
def test_norms_and_distances_are_those_of_the_outer_products(
    form: GradientForm, tau: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the pool is gone through in parts that do not divide it."""
    monkeypatch.setattr(module, "_CELLS", rows)
    candidates, queries, last = unit(40, 16, seed=5), unit(7, 16, seed=6), 2 * unit(7, 5, seed=7)
    factors = gradient_factors(candidates, queries, tau, form, last)
    g = gradients(candidates, queries, tau, form, last)
    scale = factors.norms.max().item()
    assert np.allclose(factors.norms.numpy(), (g**2).sum(1), rtol=1e-5, atol=1e-6 * scale)
    expected = ((g[:, None] - g) ** 2).sum(2)
    found = factors.squared_distances(factors)
    assert not found.diagonal().any()
    assert np.allclose(found.numpy(), expected, rtol=1e-5, atol=2e-6 * scale)
    some = torch.tensor([3, 17, 39])
    assert np.allclose(factors.nearest(factors.rows(some)).numpy(), expected[:, some].min(1), rtol=1e-5, atol=2e-6 * scale)


@pytest.mark.parametrize("form", GRADIENT_FORMS)
@pytest.mark.parametrize(("count", "batch", "width"), [(7, 4, 6), (17, 8, 16), (50, 32, 128), (333, 128, 512)])
def test_copies_are_at_distance_nought(form: GradientForm, count: int, batch: int, width: int) -> None:
    """Not at the last bits of two sums: those would decide where D^2 sampling has nothing else to go by. In any company: how
    a product is summed depends on its size."""
    queries = unit(batch, width, seed=7)
    candidates = torch.cat([unit(1, width, seed=8).expand(count, width), unit(3, width, seed=9)])
    factors = gradient_factors(candidates, queries, 0.1, form, unit(batch, width, seed=10))
    for centres in ([0], [0, count // 2, count - 1], list(range(count))):
        distances = factors.squared_distances(factors.rows(torch.tensor(centres)))
        assert not distances[:count].any()
        assert (distances[count:] > 1e-3 * factors.norms[0]).all()


def test_small_distances_between_large_gradients() -> None:
    """A squared distance of a ten-thousandth of the norms is known to about a part in a hundred in float32."""
    left = 30 * (unit(1, 64, seed=10) + 0.01 * unit(20, 64, seed=11))
    right = unit(1, 32, seed=12) + 0.01 * unit(20, 32, seed=13)
    factors = GradientFactors.of(left, right)
    g = (left.double()[:, :, None] * right.double()[:, None, :]).flatten(1)
    expected = (g - g[3]).square().sum(1)
    found = factors.nearest(factors.rows(torch.tensor([3])))
    assert 5e-5 < (expected[4:] / 900).min() < (expected[4:] / 900).max() < 1e-3
    assert torch.allclose(found.double(), expected, rtol=0.01, atol=0)


def test_the_scale_trap() -> None:
    """METHOD: with unit vectors, M = 128 and pseudo_tau .7 every |R_n| is about .99, so uncertainty is constant."""
    candidates, queries = unit(500, 512, seed=14), unit(128, 512, seed=15)
    trapped, free = (residuals(candidates, queries, tau).norm(dim=1) for tau in (0.7, 0.02))
    assert 0.985 < trapped.min() < trapped.max() < 1.0
    assert trapped.std() < 1e-3
    assert free.std() > 50 * trapped.std()
