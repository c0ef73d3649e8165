"""A quadratic in a few numbers that stands in for what is costly to measure (MAP, Li et al. 2024, arXiv 2406.07529).

Shape suffixes: N points of D numbers each, C coefficients, K other points.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

Activation = Literal["identity", "sigmoid"]

DRAWS = 30  # of a bootstrap, as MAP has it
KEPT = 0.8  # of the points of each draw, the same
_NEAREST = 1e-3  # to 0 and 1, of values from whose logits a fit begins
_EVALUATIONS = 500  # of a fit, at most


class Surrogate(NamedTuple):
    """A quadratic, and what it goes through: values between 0 and 1 through a sigmoid.

    coefficients_C: of the squares, the products of two numbers (i < j), the numbers, and 1, in this order.
    """

    coefficients_C: Array
    activation: Activation

    def at(self, points_KD: Array) -> Array:
        """Its values (K)."""
        value_K = terms(points_KD) @ self.coefficients_C
        return _sigmoid(value_K) if self.activation == "sigmoid" else value_K


def count(numbers: int) -> int:
    """How many coefficients a quadratic in so many numbers has."""
    return (numbers + 1) * (numbers + 2) // 2


def terms(points_ND: Array) -> Array:
    """What the coefficients stand before: (N, C)."""
    i, j = np.triu_indices(points_ND.shape[1], 1)
    ones_N1 = np.ones((len(points_ND), 1))
    return np.hstack([points_ND**2, points_ND[:, i] * points_ND[:, j], points_ND, ones_N1])


def fit(points_ND: Array, values_N: Array, activation: Activation = "identity") -> Surrogate:
    """The quadratic that is nearest to the values in squares: in closed form, or by Levenberg and Marquardt's method
    where there is a sigmoid, from the closed form of its logits.
    """
    terms_NC = terms(points_ND)
    if activation == "identity":
        return Surrogate(_solved(terms_NC, values_N), activation)
    from scipy.optimize import least_squares

    inside_N = np.clip(values_N, _NEAREST, 1 - _NEAREST)
    start_C = _solved(terms_NC, np.log(inside_N / (1 - inside_N)))

    def slopes(coefficients_C: Array) -> Array:
        value_N = _sigmoid(terms_NC @ coefficients_C)
        return (value_N * (1 - value_N))[:, None] * terms_NC

    found = least_squares(
        lambda coefficients_C: _sigmoid(terms_NC @ coefficients_C) - values_N,
        start_C,
        slopes,
        method="lm" if len(terms_NC) >= len(start_C) else "trf",
        max_nfev=_EVALUATIONS,
    )
    return Surrogate(found.x, activation)


def activation_of(values_N: Array) -> Activation:
    """A sigmoid where all values are shares."""
    return "sigmoid" if values_N.min() >= 0 and values_N.max() <= 1 else "identity"


def enough(numbers: int) -> int:
    """The fewest points of which each draw of a bootstrap has as many as a quadratic has coefficients."""
    least = count(numbers)
    return next(n for n in range(least, 2 * least + 2) if _kept(n) >= least)


def bootstrap_error(points_ND: Array, values_N: Array, activation: Activation, seed: int) -> float:
    """The root mean square by which fits to some of the points miss the others, over several draws of them."""
    rng = np.random.default_rng(seed)
    squares = []
    for _ in range(DRAWS):
        order_N = rng.permutation(len(points_ND))
        inside, outside = order_N[: _kept(len(order_N))], order_N[_kept(len(order_N)) :]
        fitted = fit(points_ND[inside], values_N[inside], activation)
        squares.append((fitted.at(points_ND[outside]) - values_N[outside]) ** 2)
    return float(np.sqrt(np.concatenate(squares).mean()))


def _kept(points: int) -> int:
    return min(int(KEPT * points), points - 1)


def _solved(terms_NC: Array, values_N: Array) -> Array:
    return np.linalg.lstsq(terms_NC, values_N, rcond=None)[0].astype(np.float64, copy=False)


def _sigmoid(value: Array) -> Array:
    return 0.5 * (1 + np.tanh(value / 2))
