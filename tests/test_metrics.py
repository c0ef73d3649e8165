import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from evaluation.metrics import bootstrap_mean, mcnemar, normalised, paired, wilson
from merging.errors import UserError

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

correct = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.lists(st.booleans(), min_size=1, max_size=40).map(np.array),
    min_size=1,
    max_size=4,
)


@st.composite
def two_models(draw):
    a = draw(correct)
    return a, {
        task: np.array(draw(st.lists(st.booleans(), min_size=c.size, max_size=c.size)))
        for task, c in a.items()
    }


def test_wilson_of_a_published_example():
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3: 81 of 263.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


@given(st.integers(1, 10_000), st.floats(0, 1), st.floats(0.5, 0.999))
def test_wilson_holds_the_share_and_is_symmetric(n, share, confidence):
    k = round(share * n)
    lower, upper = wilson(k, n, confidence)
    assert 0 <= lower <= k / n <= upper <= 1
    mirrored = wilson(n - k, n, confidence)
    assert (1 - mirrored.upper, 1 - mirrored.lower) == pytest.approx((lower, upper))


def test_wilson_rejects_impossible_counts():
    for k, n in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError):
            wilson(k, n)


@given(correct)
def test_the_mean_weighs_tasks_equally_and_lies_in_its_interval(c):
    estimate = bootstrap_mean(c)
    assert estimate.mean == pytest.approx(sum(map(np.mean, c.values())) / len(c))
    assert estimate.lower - 1e-9 <= estimate.mean <= estimate.upper + 1e-9
    assert bootstrap_mean(dict(reversed(c.items()))) == pytest.approx(estimate)


def test_binomial_counts_are_the_bootstrap_of_examples():
    rng = np.random.default_rng(1)
    c = {"small": rng.random(50) < 0.3, "large": rng.random(400) < 0.8}
    resampled = [np.mean([rng.choice(v, v.size).mean() for v in c.values()]) for _ in range(4000)]
    assert bootstrap_mean(c, draws=20_000)[1:] == pytest.approx(
        np.quantile(resampled, [0.025, 0.975]), abs=0.004
    )


def test_multinomial_counts_are_the_paired_bootstrap_of_examples():
    rng = np.random.default_rng(2)
    a = {"small": rng.random(50) < 0.5, "large": rng.random(400) < 0.8}
    b = {task: np.where(rng.random(v.size) < 0.8, v, ~v) for task, v in a.items()}
    rows = {task: rng.integers(0, v.size, (4000, v.size)) for task, v in a.items()}
    resampled = np.mean([a[task][r].mean(1) - b[task][r].mean(1) for task, r in rows.items()], 0)
    assert paired(a, b, draws=20_000)[1:3] == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.004)


@given(two_models())
def test_a_comparison_is_antisymmetric_up_to_its_draws(models):
    a, b = models
    there, back = paired(a, b), paired(b, a)
    assert there.difference == pytest.approx(bootstrap_mean(a).mean - bootstrap_mean(b).mean)
    assert there.difference == pytest.approx(-back.difference) and there.p == back.p
    assert there.lower - 1e-9 <= there.difference <= there.upper + 1e-9


@given(correct)
def test_a_model_does_not_differ_from_itself(c):
    assert paired(c, c) == (0, 0, 0, 1)


@given(two_models(), st.floats(0.5, 0.8), st.floats(0.9, 0.99))
def test_more_confidence_means_a_wider_interval(models, narrow, wide):
    inner, outer = paired(*models, confidence=narrow), paired(*models, confidence=wide)
    assert outer.lower <= inner.lower <= inner.upper <= outer.upper


def test_models_measured_on_other_examples_cannot_be_compared():
    right = np.array([True, False])
    for other in ({"b": right}, {"a": right[:1]}, {"a": right, "b": right}):
        with pytest.raises(ValueError, match="same tasks and examples"):
            paired({"a": right}, other)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_binomial_test(only_a, only_b):
    n, few = only_a + only_b, min(only_a, only_b)
    assert mcnemar(only_a, only_b) == pytest.approx(
        min(1, 2 * sum(math.comb(n, k) for k in range(few + 1)) / 2**n)
    )


def test_mcnemar_on_many_examples_is_exact_and_does_not_overflow():
    assert mcnemar(0, 10) == 2 / 1024
    assert 0 <= mcnemar(2000, 9000) < 1e-300
    assert mcnemar(5000, 5000) == 1


@given(st.dictionaries(st.text(min_size=1), st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1))
def test_normalised_accuracy_is_the_mean_of_ratios(tasks):
    assume(all(expert > 1e-6 for _, expert in tasks.values()))
    accuracy, expert = {t: a for t, (a, _) in tasks.items()}, {t: e for t, (_, e) in tasks.items()}
    assert normalised(accuracy, expert) == pytest.approx(np.mean([a / e for a, e in tasks.values()]))
    assert normalised(expert, expert) == pytest.approx(1)


def test_an_expert_without_a_correct_example_is_named():
    with pytest.raises(UserError, match="digits"):
        normalised({"digits": 0.1}, {"digits": 0.0})
