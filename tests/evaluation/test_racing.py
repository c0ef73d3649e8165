"""Races: parts are all examples once, what is bad is dropped early, and what is as good rarely."""

from __future__ import annotations

import numpy as np
import pytest

from mergeline.evaluation.racing import is_surely_worse, parts, race, worse_by

SIZES = {"a": 400, "b": 100}


def outcomes(rng: np.random.Generator, share: float) -> dict[str, np.ndarray]:
    return {task: (rng.random(size) < share).astype(np.float64) for task, size in SIZES.items()}


def raced(own, best, seed=0, error=0.05, looks=5):
    seen = []

    def measure(part):
        seen.append(part)
        return {task: own[task][which] for task, which in part.items()}

    return race(measure, parts(SIZES, looks, seed), best, SIZES, error), seen


def test_parts_are_all_examples_once_in_growing_shares_of_each_task():
    cut = parts(SIZES, 5, seed=3)
    for task, size in SIZES.items():
        assert sorted(np.concatenate([part[task] for part in cut])) == [*range(size)]
        ends = np.cumsum([len(part[task]) for part in cut])
        assert [*ends] == [-(-size // 2**k) for k in (5, 4, 3, 2, 1, 0)]
    again, other = parts(SIZES, 5, seed=3), parts(SIZES, 5, seed=4)
    assert all(np.array_equal(a[t], b[t]) for a, b in zip(cut, again) for t in SIZES)
    assert not np.array_equal(cut[0]["a"], other[0]["a"])
    few = parts({"a": 3}, 5, seed=0)
    assert sum(len(part["a"]) for part in few) == 3 and all(len(part["a"]) for part in few)


def test_the_first_is_measured_whole_and_the_bad_are_dropped_soon():
    rng = np.random.default_rng(0)
    best, bad = outcomes(rng, 0.8), outcomes(rng, 0.3)
    first, seen = raced(best, None)
    assert first.outcomes and first.seen == 500 and len(seen) == 6
    assert all(np.array_equal(first.outcomes[task], best[task]) for task in SIZES)
    found, _ = raced(bad, best)
    assert found.outcomes is None and found.seen < 100
    means = {task: float(own.mean()) for task, own in best.items()}
    assert sum(found.means.values()) < sum(means.values())
    better, _ = raced(best, bad)
    assert better.seen == 500 and better.means == means


@pytest.mark.parametrize("error", [0.05, 0.2])
def test_what_is_as_good_on_all_examples_is_dropped_no_more_often_than_is_said(error):
    dropped, draws = 0, 400
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        best = outcomes(rng, 0.7)
        own = {task: rng.permutation(best[task]) for task in SIZES}
        dropped += raced(own, best, seed=seed, error=error)[0].outcomes is None
    # Three deviations of a binomial count above what is said.
    assert dropped <= draws * error + 3 * np.sqrt(draws * error * (1 - error))


def test_the_standard_error_is_that_of_samples_without_replacement():
    rng = np.random.default_rng(1)
    best, own = outcomes(rng, 0.7), outcomes(rng, 0.6)
    whole = np.mean([float((best[task] - own[task]).mean()) for task in SIZES])
    found = []
    for seed in range(500):
        part = parts(SIZES, 2, seed)[0]
        found.append(worse_by(*({t: o[t][part[t]] for t in SIZES} for o in (best, own)), SIZES))
    differences, errors = np.array(found).T
    assert differences.mean() == pytest.approx(whole, abs=0.01)
    assert errors.mean() == pytest.approx(differences.std(), rel=0.1)
    assert not is_surely_worse(best, best, SIZES, 0.05, 1)
