"""Means of outcomes with intervals, and whether one model is better than another.

An outcome says how well a model did on one test example: 1 or 0 where an answer is right or wrong, any other finite
number where a score is graded; larger is better. The mean of outcomes 0 and 1 is an accuracy, a fraction of one.

Intervals are for the sampling of test examples only: neither for training seeds nor for the choice of tasks.
"""

from __future__ import annotations

import hashlib
import math
from statistics import NormalDist
from typing import Iterator, Mapping, NamedTuple

import numpy as np

from mergeline.evaluation.measures import Measure
from mergeline.merging.errors import UserError

Outcomes = Mapping[str, np.ndarray]  # task -> the outcome of every example, float or bool (N)

_ELEMENTS = 1 << 22  # of resampled examples in memory at a time


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


def is_right_or_wrong(outcome_N: np.ndarray) -> bool:
    """Whether every outcome is 0 or 1."""
    return bool(np.isin(outcome_N, (0, 1)).all())


def interval(outcome_N: np.ndarray, confidence: float = 0.95) -> Interval:
    """Of one task's mean outcome: Wilson's where examples are right or wrong, else a percentile bootstrap."""
    if is_right_or_wrong(outcome_N):
        return wilson(int(outcome_N.sum()), len(outcome_N), confidence)
    return Interval(*bootstrap_mean({"": outcome_N}, confidence=confidence)[1:])


def bootstrap_mean(
    outcomes: Outcomes, draws: int = 2000, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """Mean over tasks of the mean outcome on each, with a percentile bootstrap interval.

    Examples are resampled within each task. How many of N resampled examples are right is binomial, so where examples
    are right or wrong the counts are drawn directly. To compare two models use `paired`, not the overlap of two of
    these.
    """
    means = [np.mean(outcome_N, dtype=np.float64) for outcome_N in outcomes.values()]
    resampled = [_resampled_mean(outcome_N, _rng(task, seed), draws) for task, outcome_N in outcomes.items()]
    return Estimate(float(np.mean(means)), *_percentiles(np.mean(resampled, axis=0), confidence))


def bootstrap_ratio(
    above_N: np.ndarray, below_N: np.ndarray, draws: int = 2000, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """sum(above) / sum(below) over N documents, with a percentile bootstrap interval over the documents."""
    chosen_DN = np.random.default_rng(seed).integers(0, len(above_N), (draws, len(above_N)))
    resampled = above_N[chosen_DN].sum(1) / below_N[chosen_DN].sum(1)
    return Estimate(float(above_N.sum() / below_N.sum()), *_percentiles(resampled, confidence))


def paired(a: Outcomes, b: Outcomes, draws: int = 2000, seed: int = 0, confidence: float = 0.95) -> Paired:
    """Mean outcome over tasks of `a` minus that of `b`, both measured on the same examples.

    The interval is a percentile bootstrap: examples are resampled within each task, the same for both models. Where
    examples are right or wrong, the difference depends on how many only `a` and how many only `b` gets right, so these
    counts are drawn directly.

    p is of the examples of all tasks pooled, two-sided: McNemar's exact test on the discordant ones where examples are
    right or wrong, else the test that McNemar's is a case of, by random swaps of the two outcomes of an example. It
    weighs examples equally where the difference weighs tasks equally, so the two may disagree when tasks differ much
    in size.

    Raises:
        ValueError: the two were not measured on the same tasks and examples.
    """
    if a.keys() != b.keys() or any(a[task].shape != b[task].shape for task in a):
        raise ValueError("only models that were measured on the same tasks and examples can be compared")
    gains = {task: a[task].astype(np.float64) - b[task] for task in a}
    counted = {task: is_right_or_wrong(a[task]) and is_right_or_wrong(b[task]) for task in a}
    difference, resampled = 0.0, np.zeros(draws)
    for task, gain_N in gains.items():
        rng = _rng(task, seed)
        if counted[task]:
            n, wins, losses = gain_N.size, int((gain_N > 0).sum()), int((gain_N < 0).sum())
            counts = rng.multinomial(n, [wins / n, losses / n, (n - wins - losses) / n], draws)
            difference += (wins - losses) / n / len(a)
            resampled += (counts[:, 0] - counts[:, 1]) / n / len(a)
        else:
            difference += float(gain_N.mean()) / len(a)
            resampled += _resampled_mean(gain_N, rng, draws) / len(a)
    pooled_N = np.concatenate([*gains.values()])
    if all(counted.values()):
        p = mcnemar(int((pooled_N > 0).sum()), int((pooled_N < 0).sum()))
    else:
        p = sign_flips(pooled_N, draws, seed)
    return Paired(difference, *_percentiles(resampled, confidence), p)


def in_scores(found: Paired, measure: Measure) -> Paired:
    """The difference of two means of scores, of that of their outcomes."""
    return Paired(
        measure.turned(found.difference), *measure.turned_interval(found.lower, found.upper), found.p
    )


def sign_flips(gain_N: np.ndarray, draws: int = 2000, seed: int = 0) -> float:
    """Two-sided p of paired differences, by random sign flips (Fisher, 1935): how often their sum is as far from zero.

    At least 1 / (draws + 1), for the flips that leave everything as it is are one of the draws.
    """
    gain_N = gain_N[gain_N != 0]
    reached = abs(gain_N.sum()) - 1e-12 * np.abs(gain_N).sum()  # rounding depends on the order of a sum
    as_far, rng = 1, np.random.default_rng(seed)
    for count in _batches(draws, gain_N.size):
        signs_DN = rng.integers(0, 2, (count, gain_N.size)) * 2 - 1
        as_far += int((np.abs(signs_DN @ gain_N) >= reached).sum())
    return as_far / (draws + 1)


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


def _resampled_mean(outcome_N: np.ndarray, rng: np.random.Generator, draws: int) -> np.ndarray:
    """The means of bootstrap samples of one task's outcomes, (draws,)."""
    if is_right_or_wrong(outcome_N):
        return rng.binomial(outcome_N.size, np.mean(outcome_N, dtype=np.float64), draws) / outcome_N.size
    chosen = (rng.integers(0, outcome_N.size, (d, outcome_N.size)) for d in _batches(draws, outcome_N.size))
    return np.concatenate([outcome_N[chosen_DN].mean(1, dtype=np.float64) for chosen_DN in chosen])


def _batches(draws: int, size: int) -> Iterator[int]:
    """Numbers of draws that are in memory together, of samples of `size` examples each."""
    most = max(1, _ELEMENTS // max(1, size))
    for start in range(0, draws, most):
        yield min(most, draws - start)


def _rng(task: str, seed: int) -> np.random.Generator:
    """Depends on the task's name, not on its place among others."""
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(task.encode()).digest()[:8])])


def _percentiles(resampled: np.ndarray, confidence: float) -> Interval:
    lower, upper = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(lower), float(upper))


def spearman_outcomes(a_N: np.ndarray, b_N: np.ndarray) -> np.ndarray:
    """What each of N pairs adds to Spearman's rank correlation, (N): their mean is the correlation.

    With x and y the standardised ranks, of equal values the mean rank, and rho the mean of x y, it is
    rho + x y - rho (x^2 + y^2) / 2: rho and its influence function at the pair, so that intervals for the mean are
    those of the correlation for large N. All zeros where one of the two is constant.
    """
    from scipy.stats import rankdata

    ranks = [rankdata(values_N) for values_N in (a_N, b_N)]
    deviations = [rank_N.std() for rank_N in ranks]
    if not all(deviations):
        return np.zeros(len(a_N))
    x_N, y_N = ((rank_N - rank_N.mean()) / deviation for rank_N, deviation in zip(ranks, deviations))
    rho = float(np.mean(x_N * y_N))
    return rho + x_N * y_N - rho * (x_N**2 + y_N**2) / 2
