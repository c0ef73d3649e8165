"""Quadratics that stand in for scores, and fronts: as the official code of MAP has them, and what always holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import GOLDENS
from safetensors.numpy import load_file

from mergeline.merging.algebra.fronts import evolved, front, scattered, spread
from mergeline.merging.algebra.surrogate import Surrogate, bootstrap_error, count, enough, fit, terms


def beats(a, b):
    return (a >= b).all() and (a > b).any()


def hypervolume(values_N2):
    """The area between the origin and a front of two tasks."""
    area = top = 0.0
    for x, y in sorted(map(tuple, values_N2), reverse=True):
        area, top = area + x * max(0.0, y - top), max(top, y)
    return area


@pytest.mark.parametrize(("activation", "atol"), [("identity", 1e-5), ("sigmoid", 1e-3)])
def test_quadratics_are_those_of_the_official_code(activation, atol):
    held = load_file(GOLDENS / "unit-map-fit2d.safetensors")
    for task in range(2):
        found = fit(held["points2"], held["metric2"][:, task], activation)
        np.testing.assert_allclose(found.coefficients_C, held[f"params_{activation}"][task], atol=atol)
        if activation == "sigmoid":
            np.testing.assert_allclose(found.at(held["points2"]), held["pred_sigmoid"][:, task], atol=1e-5)


def test_what_the_official_code_picks_for_a_preference_is_as_good_here():
    held = load_file(GOLDENS / "unit-map-fit2d.safetensors")
    fitted = [Surrogate(coefficients_C, "sigmoid") for coefficients_C in held["params_sigmoid"]]
    preferred = np.array([1.0, 2.0])

    def values(points_ND):
        return np.stack([one.at(points_ND) for one in fitted], axis=1)

    best = (values(evolved(values, scattered(4, 2, 0), 0)) @ preferred).max()
    picked = (values(held["pick_pref_1_2"][None]) @ preferred).item()
    assert best >= picked - 1e-6 and best == pytest.approx(picked, abs=2e-3)


def test_the_front_has_the_hypervolume_of_the_official_codes():
    held = load_file(GOLDENS / "unit-map-pareto.safetensors")
    fitted = [Surrogate(coefficients_C, "sigmoid") for coefficients_C in held["params_sigmoid"]]

    def values(points_ND):  # the official box is that of -3 and 3
        return np.stack([one.at(6 * points_ND - 3) for one in fitted], axis=1)

    found = hypervolume(values(evolved(values, scattered(4, 2, 0), 0)))
    assert found >= 0.99 * 0.7555194986305142
    assert found >= hypervolume(held["nsga3_points"])


@given(st.integers(1, 5), st.integers(0, 9), st.sampled_from(["identity", "sigmoid"]))
def test_a_planted_quadratic_is_found(numbers, seed, activation):
    planted = Surrogate(np.random.default_rng(seed).normal(size=count(numbers)), activation)
    points_ND = scattered(enough(numbers) + 5, numbers, seed)
    values_N = planted.at(points_ND)
    found = fit(points_ND, values_N, activation)
    elsewhere_KD = scattered(50, numbers, seed + 1)
    np.testing.assert_allclose(found.at(elsewhere_KD), planted.at(elsewhere_KD), atol=1e-5)
    assert bootstrap_error(points_ND, values_N, activation, seed) < 1e-4


def test_terms_and_their_count():
    points_12 = np.array([[2.0, 3.0]])
    assert terms(points_12).tolist() == [[4, 9, 6, 2, 3, 1]]
    assert [count(n) for n in (1, 2, 8)] == [3, 6, 45] and enough(2) == 8


def test_the_error_of_a_quadratic_that_does_not_fit_is_said():
    points_ND = scattered(30, 2, 0)
    assert bootstrap_error(points_ND, np.sin(9 * points_ND[:, 0]), "identity", 0) > 0.3


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=12))
def test_a_front_has_once_whatever_nothing_beats(rows):
    values_NT = np.array(rows, float)
    kept = front(values_NT)
    assert len({tuple(values_NT[i]) for i in kept}) == len(kept)
    for i, value_T in enumerate(values_NT):
        beaten = any(beats(other_T, value_T) for other_T in values_NT)
        assert beaten != any((values_NT[k] == value_T).all() and k <= i for k in kept)


def test_a_front_that_is_evolved_lies_in_the_cube_and_on_the_true_one():
    """Of distances to two corners in three numbers: the front is the line between them."""
    ends = np.array([[0.2, 0.2, 0.2], [1.2, 0.2, 0.2]])  # the second is beyond the cube

    def values(points_ND):
        return -np.linalg.norm(points_ND[:, None] - ends, axis=2)

    found = evolved(values, scattered(10, 3, 1), 1)
    assert found.min() >= 0 and found.max() <= 1
    assert np.abs(found[:, 1:] - 0.2).max() < 0.05 and np.ptp(found[:, 0]) > 0.7
    assert len(front(values(found))) == len(found)
    assert np.array_equal(found, evolved(values, scattered(10, 3, 1), 1))


def test_points_are_spread_from_end_to_end():
    values_KT = np.array([[x, 100 - x] for x in (50.0, 51, 0, 100, 25)])
    assert spread(values_KT, 0) in ([0, 2, 3, 4, 1], [0, 3, 2, 4, 1])


@pytest.mark.parametrize("numbers", [1, 2, 8])
def test_scattered_points_fill_the_cube(numbers):
    found = scattered(64, numbers, 3)
    assert found.shape == (64, numbers) and 0 <= found.min() and found.max() < 1
    for number_N in found.T:
        assert (np.sort(number_N) * 64).astype(int).tolist() == list(range(64))
    assert not np.array_equal(found, scattered(64, numbers, 4))
