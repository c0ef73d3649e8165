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
LEFT_OUT = 0.2  # of the points, of each draw, the same
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
    """The fewest points that a quadratic is fitted to: a quarter more than it has coefficients."""
    return -(-5 * count(numbers) // 4)


def bootstrap_error(points_ND: Array, values_N: Array, activation: Activation, seed: int) -> float:
    """The root mean square by which fits to some of the points miss the others, over several draws of them.

    A draw has four fifths of the points, as MAP has it; or more, where those were hardly more than the coefficients,
    which would say much of so few points and little of all: half of the surplus at least.
    """
    rng = np.random.default_rng(seed)
    points, surplus = len(points_ND), len(points_ND) - count(points_ND.shape[1])
    left = max(1, min(int(LEFT_OUT * points), surplus // 2))
    squares = []
    for _ in range(DRAWS):
        outside, inside = np.split(rng.permutation(points), [left])
        fitted = fit(points_ND[inside], values_N[inside], activation)
        squares.append((fitted.at(points_ND[outside]) - values_N[outside]) ** 2)
    return float(np.sqrt(np.concatenate(squares).mean()))


def _solved(terms_NC: Array, values_N: Array) -> Array:
    return np.linalg.lstsq(terms_NC, values_N, rcond=None)[0].astype(np.float64, copy=False)


def _sigmoid(value: Array) -> Array:
    return 0.5 * (1 + np.tanh(value / 2))
