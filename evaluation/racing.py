"""Races: a model is compared with the best so far on growing parts of the examples, and dropped when surely worse.

An outcome says how well a model did on an example; larger is better. What counts is the mean over tasks of the mean
outcome of each, on all N examples of every task. Both models are seen on the same n of them, drawn without replacement,
so that the mean difference D of n paired outcomes of each of T tasks estimates the difference on all, with the variance

    V = 1/T^2 sum_t s_t^2 / n_t (1 - n_t / N_t),

s_t^2 the variance of the differences of a task and the last factor the correction for a finite population (Cochran,
Sampling Techniques, 1977, eq. 5.12). A model is dropped where D / sqrt(V) is above Student's quantile of 1 - error /
looks: by Bonferroni's inequality a model that is as good on all examples is dropped at one of the looks with a
probability of at most `error`, as far as D is normal, which of small parts with few differences it is not quite
(benchmarks/search.py counts how often it happens).

Shape suffixes: N examples of a task; n of a part.
"""

from __future__ import annotations

import math
from typing import Callable, Mapping, NamedTuple, Sequence

import numpy as np

Part = dict[str, np.ndarray]  # task -> which of its examples, int64 (n), ascending


def parts(sizes: Mapping[str, int], looks: int, seed: int) -> list[Part]:
    """All examples of each task in an order drawn from `seed`, cut into looks + 1 parts.

    sizes: task -> how many examples it has. The first k + 1 parts together are a share of 2^(k - looks) of each task,
    of which the first is never without an example of any.
    """
    rng = np.random.default_rng([seed % 2**63, 0x7ACE])
    order = {task: rng.permutation(size) for task, size in sizes.items()}
    ends = [
        {task: math.ceil(size / 2 ** (looks - k)) for task, size in sizes.items()} for k in range(looks + 1)
    ]
    before = [dict.fromkeys(sizes, 0), *ends]
    cut = [
        {task: np.sort(order[task][start[task] : end[task]]) for task in sizes}
        for start, end in zip(before, ends)
    ]
    return [part for part in cut if any(map(len, part.values()))]


class Raced(NamedTuple):
    """What a race found of a model: its outcomes on all examples, or, where it was dropped, estimates alone.

    means: task -> its mean outcome; of a dropped model that of the best one, less what it is worse by on the part that
    was seen. seen: on how many examples it was measured. outcomes: task -> (N); None where it was dropped.
    """

    means: dict[str, float]
    seen: int
    outcomes: dict[str, np.ndarray] | None


def race(
    measure: Callable[[Part], Mapping[str, np.ndarray]],
    cut: Sequence[Part],
    best: Mapping[str, np.ndarray] | None,
    sizes: Mapping[str, int],
    error: float,
) -> Raced:
    """Measure a model part by part, until it is surely worse than `best` or all parts are measured.

    measure: gives the outcome of each of the n examples of a part. best: the outcomes (N) of the best model so far, on
    all examples; None where there is none. error: of dropping a model that is no worse.
    """
    own: dict[str, np.ndarray] = {task: np.zeros(size) for task, size in sizes.items()}
    known: dict[str, np.ndarray] = {task: np.zeros(0, np.int64) for task in sizes}
    seen = 0
    for k, part in enumerate(cut):
        found = measure(part)
        for task, where in part.items():
            own[task][where] = found[task]
            known[task] = np.concatenate([known[task], where])
            seen += len(where)
        if best is None or k == len(cut) - 1:
            continue
        beside = {task: best[task][where] for task, where in known.items()}
        now = {task: own[task][where] for task, where in known.items()}
        if is_surely_worse(beside, now, sizes, error, len(cut) - 1):
            means = {t: float(best[t].mean() - (beside[t].mean() - now[t].mean())) for t in sizes}
            return Raced(means, seen, None)
    return Raced({task: float(outcome_N.mean()) for task, outcome_N in own.items()}, seen, own)


def worse_by(
    best: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], sizes: Mapping[str, int]
) -> tuple[float, float]:
    """D, by how much `other` is worse than `best`, and its standard error, from the same n examples of each task.

    best, other: task -> outcome of each of n examples. sizes: how many examples each task has in all.
    """
    gains = [(best[task] - other[task], size) for task, size in sizes.items()]
    difference = sum(float(gain_n.mean()) for gain_n, _ in gains) / len(gains)
    variances = [
        float(gain_n.var(ddof=1)) / len(gain_n) * (1 - len(gain_n) / size)
        for gain_n, size in gains
        if len(gain_n) > 1
    ]
    return difference, math.sqrt(sum(variances)) / len(gains)


def is_surely_worse(
    best: Mapping[str, np.ndarray],
    other: Mapping[str, np.ndarray],
    sizes: Mapping[str, int],
    error: float,
    looks: int,
) -> bool:
    """Whether `other` is dropped at one of so many looks; see above."""
    from scipy.special import stdtrit

    difference, deviation = worse_by(best, other, sizes)
    freedom = sum(max(0, len(other[task]) - 1) for task in sizes)
    if difference <= 0 or not freedom or not deviation:
        return False
    return bool(difference / deviation > stdtrit(freedom, 1 - error / looks))
