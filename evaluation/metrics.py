"""Accuracies with intervals, and whether one model is better than another. Accuracies are fractions of one.

Intervals are for the sampling of test examples only: neither for training seeds nor for the choice of tasks.
"""

from __future__ import annotations

import hashlib
import math
from statistics import NormalDist
from typing import Mapping, NamedTuple

import numpy as np

from merging.errors import UserError

Correct = Mapping[str, np.ndarray]  # task -> which examples a model gets right, bool (N)


class Interval(NamedTuple):
    lower: float
    upper: float


class Estimate(NamedTuple):
    mean: float
    lower: float
    upper: float


class Paired(NamedTuple):
    difference: float
    lower: float
    upper: float
    p: float


def wilson(correct: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for an accuracy of `correct` out of `n` (Wilson, 1927)."""
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"{correct} correct out of {n}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, scale = correct / n, 1 + z**2 / n
    centre = (share + z**2 / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / scale
    # In theory the interval holds the share and lies in [0, 1]; rounding must not undo this.
    return Interval(max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def bootstrap_mean(correct: Correct, draws: int = 2000, seed: int = 0, confidence: float = 0.95) -> Estimate:
    """Mean over tasks of the accuracy on each, with a percentile bootstrap interval.

    Examples are resampled within each task. How many of N resampled examples are correct is binomial, so the
    counts are drawn directly. To compare two models use `paired`, not the overlap of two of these.
    """
    means = [c.mean() for c in correct.values()]
    resampled = [_rng(task, seed).binomial(c.size, c.mean(), draws) / c.size for task, c in correct.items()]
    return Estimate(float(np.mean(means)), *_percentiles(np.mean(resampled, axis=0), confidence))


def bootstrap_ratio(
    above_N: np.ndarray, below_N: np.ndarray, draws: int = 2000, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """sum(above) / sum(below) over N documents, with a percentile bootstrap interval over the documents."""
    chosen_DN = np.random.default_rng(seed).integers(0, len(above_N), (draws, len(above_N)))
    resampled = above_N[chosen_DN].sum(1) / below_N[chosen_DN].sum(1)
    return Estimate(float(above_N.sum() / below_N.sum()), *_percentiles(resampled, confidence))


def paired(a: Correct, b: Correct, draws: int = 2000, seed: int = 0, confidence: float = 0.95) -> Paired:
    """Mean accuracy over tasks of `a` minus that of `b`, both measured on the same examples.

    The interval is a percentile bootstrap: examples are resampled within each task, the same for both models.
    The difference depends on how many examples only `a` and how many only `b` gets right, so these counts are
    drawn directly.

    p is McNemar's exact two-sided test on the discordant examples of all tasks pooled. It weighs examples
    equally where the difference weighs tasks equally, so the two may disagree when tasks differ much in size.

    Raises:
        ValueError: the two were not measured on the same tasks and examples.
    """
    if a.keys() != b.keys() or any(a[task].shape != b[task].shape for task in a):
        raise ValueError("only models that were measured on the same tasks and examples can be compared")
    difference, resampled, only_a, only_b = 0.0, np.zeros(draws), 0, 0
    for task in a:
        n, wins, losses = a[task].size, int((a[task] & ~b[task]).sum()), int((~a[task] & b[task]).sum())
        counts = _rng(task, seed).multinomial(n, [wins / n, losses / n, (n - wins - losses) / n], draws)
        difference += (wins - losses) / n / len(a)
        resampled += (counts[:, 0] - counts[:, 1]) / n / len(a)
        only_a, only_b = only_a + wins, only_b + losses
    return Paired(difference, *_percentiles(resampled, confidence), mcnemar(only_a, only_b))


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p: how often a fair coin splits the discordant examples at least this unevenly."""
    n = only_a + only_b
    term = tail = 1  # binomial coefficients, summed in whole numbers
    for k in range(min(only_a, only_b)):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


def normalised(accuracy: Mapping[str, float], expert: Mapping[str, float]) -> float:
    """Mean over tasks of accuracy divided by that of the task's own expert (not the ratio of the means)."""
    for task in accuracy:
        if not expert[task]:
            raise UserError(f"{task}: its expert has no example right, so nothing can be measured against it")
    return sum(accuracy[task] / expert[task] for task in accuracy) / len(accuracy)


def _rng(task: str, seed: int) -> np.random.Generator:
    """Depends on the task's name, not on its place among others."""
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(task.encode()).digest()[:8])])


def _percentiles(resampled: np.ndarray, confidence: float) -> Interval:
    lower, upper = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(lower), float(upper))
