import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mergeline.evaluation import metrics
from mergeline.evaluation.metrics import (
    bootstrap_mean,
    interval,
    mcnemar,
    normalised,
    paired,
    sign_flips,
    wilson,
)
from mergeline.merging.errors import UserError

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


# Outcomes that are graded, not right or wrong

graded = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.lists(st.floats(-5, 5).map(lambda x: round(x, 3)), min_size=1, max_size=30).map(np.array),
    min_size=1,
    max_size=3,
)


@st.composite
def two_graded_models(draw):
    a = draw(graded)
    values = st.floats(-5, 5).map(lambda x: round(x, 3))
    return a, {
        task: np.array(draw(st.lists(values, min_size=o.size, max_size=o.size))) for task, o in a.items()
    }


@given(two_models())
def test_right_and_wrong_as_numbers_change_no_digit(models):
    """Booleans, 0 and 1 of any type: the same intervals and the same tests."""
    a, b = models
    for kind in (np.float32, np.float64, np.int32):
        x, y = ({task: o.astype(kind) for task, o in m.items()} for m in models)
        assert bootstrap_mean(x) == bootstrap_mean(a) and paired(x, y) == paired(a, b)
        for task, o in x.items():
            assert interval(o) == wilson(int(a[task].sum()), a[task].size)


@given(graded)
def test_the_mean_of_graded_outcomes_lies_in_its_interval(outcomes):
    estimate = bootstrap_mean(outcomes)
    assert estimate.mean == pytest.approx(np.mean([o.mean() for o in outcomes.values()]), abs=1e-9)
    spans = [np.ptp(o) for o in outcomes.values()]
    assert (
        estimate.lower - 1e-9 <= estimate.upper and estimate.upper - estimate.lower <= np.mean(spans) + 1e-9
    )


def test_the_interval_of_graded_outcomes_is_that_of_their_mean():
    outcome_N = np.random.default_rng(3).normal(-2.0, 1.5, 900)
    lower, upper = interval(outcome_N)
    half = 1.96 * outcome_N.std() / 30
    assert (lower, upper) == pytest.approx((outcome_N.mean() - half, outcome_N.mean() + half), abs=0.02)


def test_few_examples_in_memory_draw_from_the_same_distribution(monkeypatch):
    outcome_N = np.random.default_rng(4).normal(size=200)
    whole = bootstrap_mean({"a": outcome_N}, draws=8000)
    monkeypatch.setattr(metrics, "_ELEMENTS", 300)
    assert bootstrap_mean({"a": outcome_N}, draws=8000) == pytest.approx(whole, abs=0.02)


@given(two_graded_models())
def test_a_comparison_of_graded_outcomes_is_antisymmetric(models):
    a, b = models
    there, back = paired(a, b), paired(b, a)
    assert there.difference == pytest.approx(bootstrap_mean(a).mean - bootstrap_mean(b).mean, abs=1e-9)
    assert there.difference == pytest.approx(-back.difference, abs=1e-12) and there.p == back.p
    assert 0 < there.p <= 1
    assert paired(a, a) == (0, 0, 0, 1)


def test_sign_flips_find_what_mcnemar_finds():
    """On right and wrong examples both are one test, drawn or exact."""
    for wins, losses in ((12, 4), (30, 25), (9, 0), (3, 3)):
        gain_N = np.repeat([1.0, -1.0, 0.0], [wins, losses, 40])
        assert sign_flips(gain_N, draws=40_000) == pytest.approx(mcnemar(wins, losses), abs=0.01)


def test_sign_flips_keep_their_level_and_see_a_shift():
    rng = np.random.default_rng(5)
    null = [sign_flips(rng.normal(size=60), draws=400, seed=i) for i in range(300)]
    assert 0.02 < np.mean(np.array(null) <= 0.05) < 0.09
    assert sign_flips(rng.normal(0.6, 1.0, 60)) < 0.01


def test_of_tasks_that_differ_each_has_its_own_kind_of_draws():
    rng = np.random.default_rng(6)
    a = {"right": rng.random(200) < 0.7, "graded": rng.normal(1.0, 1.0, 200)}
    b = {"right": rng.random(200) < 0.5, "graded": rng.normal(0.0, 1.0, 200)}
    found = paired(a, b)
    assert 0 < found.lower < found.difference < found.upper and found.p == pytest.approx(1 / 2001)


def test_spearman_is_the_mean_of_what_pairs_add_and_its_interval_is_the_bootstrap_s():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    a = rng.normal(size=600)
    b = np.round(a + rng.normal(size=600), 1)  # with ties
    outcomes = metrics.spearman_outcomes(a, b)
    assert outcomes.mean() == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    chosen = [rng.integers(0, 600, 600) for _ in range(1000)]
    own = np.std([spearmanr(a[i], b[i]).statistic for i in chosen])
    assert np.std(outcomes) / np.sqrt(600) == pytest.approx(own, rel=0.1)


def test_spearman_of_a_constant_is_nothing():
    assert not metrics.spearman_outcomes(np.ones(5), np.arange(5.0)).any()
