"""Linear support vector machines, one for each class against the rest, of all classes at once.

The problem is that of scikit-learn's `LinearSVC(dual=False)`, and so is its only solution. LIBLINEAR, which that calls, goes
through rows and classes one by one; here they are matrix products.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

_CLOSE = 1e-7
"""Norm of the gradient over that at zero weights, at which a class is done."""
_STEPS = 100
_INNER = 0.05  # of the gradient that may be left when a Newton step is solved for
_INNER_STEPS = 200
_DECREASE = 1e-4  # Armijo's
_ROUNDING = 1e-13


class LinearSvm:
    """Of each class (column) the w that minimises |w|^2 / 2 + C sum_i max(0, 1 - y_i w.x_i)^2, y = 1 for its rows and -1 for the
    others, x with a one behind it: the bias is a weight like others.

    Newton's method with a line search (Keerthi and DeCoste 2005), its linear systems by conjugate gradients. Rows are turned to
    their principal axes, where one division by each axis' spread serves as a preconditioner for all classes.
    """

    def __init__(self, x: Matrix, y: NDArray[Any]) -> None:
        """x: (n, d); y: labels (n,) of two classes or more."""
        self.classes, codes = np.unique(y, return_inverse=True)
        own = np.arange(len(self.classes)) if len(self.classes) > 2 else np.array([1])
        self._signs = np.where(codes[:, None] == own, 1.0, -1.0)
        self._axes, self._spread = _principal(_with_one(x))
        self._rows = _with_one(x) @ self._axes
        self._weights = np.zeros((len(self._spread), len(own)))

    def fit(self, cost: float) -> bool:
        """For C = `cost`, from the weights of the fit before. Returns whether all classes came to their solution."""
        rows, signs = self._rows, self._signs
        scores = rows @ self._weights
        close = _CLOSE * np.linalg.norm(2 * cost * rows.T @ signs, axis=0)
        todo = np.arange(signs.shape[1])
        for _ in range(_STEPS):
            slack = np.maximum(0, 1 - signs[:, todo] * scores[:, todo])
            gradient = self._weights[:, todo] - 2 * cost * (rows.T @ (signs[:, todo] * slack))
            left = np.linalg.norm(gradient, axis=0) > close[todo]
            todo, slack, gradient = todo[left], slack[:, left], gradient[:, left]
            if not len(todo):
                return True
            step = self._newton(cost, slack > 0, gradient)
            change = rows @ step
            length = self._length(cost, todo, scores[:, todo], slack, gradient, step, change)
            self._weights[:, todo] += length * step
            scores[:, todo] += length * change
        return False

    def predict(self, x: Matrix) -> NDArray[Any]:
        """The class of the largest score, (m,)."""
        scores = _with_one(x) @ (self._axes @ self._weights)
        place = scores.argmax(1) if len(self.classes) > 2 else (scores[:, 0] > 0).astype(int)
        return np.asarray(self.classes[place])

    def _newton(self, cost: float, inside: NDArray[np.bool_], gradient: Matrix) -> Matrix:
        """(I + 2 C X' D X)^-1 applied to -gradient; D: rows of a class that are inside its margin."""
        scale = 1 + 2 * cost * inside.mean(0) * self._spread[:, None]
        step, rest = np.zeros_like(gradient), -gradient
        close = _INNER * np.linalg.norm(gradient, axis=0)
        ready = rest / scale
        way, size = ready.copy(), (rest * ready).sum(0)
        todo = np.arange(gradient.shape[1])
        for _ in range(_INNER_STEPS):
            along = way[:, todo]
            bent = along + 2 * cost * (self._rows.T @ (inside[:, todo] * (self._rows @ along)))
            far = size[todo] / (along * bent).sum(0)
            step[:, todo] += far * along
            rest[:, todo] -= far * bent
            todo = todo[np.linalg.norm(rest[:, todo], axis=0) > close[todo]]
            if not len(todo):
                break
            ready = rest[:, todo] / scale[:, todo]
            before, size[todo] = size[todo], (rest[:, todo] * ready).sum(0)
            way[:, todo] = ready + size[todo] / before * way[:, todo]
        return step

    def _length(
        self, cost: float, todo: NDArray[np.int64], scores: Matrix, slack: Matrix, gradient: Matrix, step: Matrix, change: Matrix
    ) -> Matrix:
        """Of each class the largest of 1, 1/2, 1/4, ... by which its objective falls as it should."""
        signs, weights = self._signs[:, todo], self._weights[:, todo]
        now, slope = _objective(cost, weights, slack), (gradient * step).sum(0)
        length = np.ones(len(todo))
        while True:
            there = _objective(cost, weights + length * step, np.maximum(0, 1 - signs * (scores + length * change)))
            far = (there > now + _DECREASE * length * slope + _ROUNDING * now) & (length > 1e-9)
            if not far.any():
                return length
            length[far] /= 2


def _objective(cost: float, weights: Matrix, slack: Matrix) -> Matrix:
    return np.asarray((weights**2).sum(0) / 2 + cost * (slack**2).sum(0))


def _with_one(x: Matrix) -> Matrix:
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)


def _principal(x: Matrix) -> tuple[Matrix, Matrix]:
    """Principal axes (d, r) of all rows, not centred, and the sum of squares along each (r,). r: at most d and n."""
    if len(x) > x.shape[1]:
        spread, axes = np.linalg.eigh(x.T @ x)
        return axes, spread.clip(0)
    _, lengths, axes = np.linalg.svd(x, full_matrices=False)
    return axes.T, lengths**2
