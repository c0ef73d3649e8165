"""The algebra against plain definitions: torch.kthvalue, a float64 SVD, loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from merging import operators as ops

SIDES = st.integers(1, 12)


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------- thresholds


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 60)), elements=FINITE), st.data())
def test_kth_magnitudes_is_kthvalue_in_any_chunking(values, data):
    x_TN = torch.from_numpy(values)
    kth = data.draw(st.integers(1, x_TN.shape[1]))
    cuts = sorted(data.draw(st.sets(st.integers(0, x_TN.shape[1]), max_size=4)))
    chunks = list(torch.tensor_split(x_TN, cuts, dim=1))
    found = ops.kth_magnitudes(lambda: chunks, kth)
    assert torch.equal(found, x_TN.abs().kthvalue(kth, dim=1).values)


def test_kth_magnitudes_over_tensors_of_all_shapes():
    tensors = [
        torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
        for shape in ((50, 4), (9,), (2, 3, 4))
    ]
    flat_TN = torch.cat([t.reshape(2, -1) for t in tensors], dim=1).abs()
    for kth in (1, 100, flat_TN.shape[1]):
        assert torch.equal(ops.kth_magnitudes(lambda: tensors, kth), flat_TN.kthvalue(kth, dim=1).values)


@given(hnp.arrays(np.float32, (2, 12), elements=st.sampled_from([0, 1, -1, 2, -2, 3])), st.floats(0.01, 1))
def test_keep_largest_keeps_exactly_so_many(values, density):
    x_TN = torch.from_numpy(values)
    kept_TN = ops.keep_largest(x_TN, density)
    count = max(1, int(density * 12))
    for row, kept in zip(x_TN, kept_TN):
        assert torch.equal(kept.abs().sort().values[-count:], row.abs().sort().values[-count:])
        assert (kept != 0).sum() <= count
        assert torch.equal(kept[kept != 0], row[kept != 0])


def test_keep_at_least_keeps_equals():
    x_TN = torch.tensor([[1.0, -2.0, 2.0, 3.0], [1.0, -2.0, 2.0, 3.0]])
    kept = ops.keep_at_least(x_TN, torch.tensor([2.0, 3.0]))
    assert kept.tolist() == [[0, -2, 2, 3], [0, 0, 0, 3]]


# --------------------------------------------------------------------------------------- combining


@given(
    hnp.arrays(np.float32, (3, 8), elements=st.integers(-3, 3).map(float)), st.sampled_from([-1.0, 0.0, 1.0])
)
def test_elect_signs(values, zero):
    expected = [np.sign(column.sum()) or zero for column in values.T]
    assert ops.elect_signs(torch.from_numpy(values), zero).tolist() == expected


@pytest.mark.parametrize(
    ("reduce", "expected"), [("mean", [2.0, 0.0, -1.0]), ("sum", [4.0, 0.0, -1.0]), ("max", [3.0, 0.0, -1.0])]
)
def test_disjoint_merge(reduce, expected):
    x_TN = torch.tensor([[1.0, 0.0, 0.0], [3.0, 0.0, -1.0]])
    assert ops.disjoint_merge(x_TN, reduce).tolist() == expected


def test_weighted_sum_adds_in_float64():
    x_TN = torch.tensor([[1.0], [1e-9], [-1.0]])
    assert ops.weighted_sum(x_TN, [1.0, 2.0, 1.0]).item() == pytest.approx(2e-9, rel=1e-6)
    assert ops.weighted_sum(x_TN, None).item() == pytest.approx(1e-9, rel=1e-6)


# --------------------------------------------------------------------------------------- spectral


@given(SIDES, SIDES, st.integers(0, 99), st.data())
def test_projection_on_the_leading_directions_is_the_truncated_svd(rows, columns, seed, data):
    a = matrix(rows, columns, seed)
    k = data.draw(st.integers(1, min(rows, columns)))
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    energy, vectors = ops.spectrum(a)
    assert torch.allclose(energy, s**2, atol=1e-10)
    assert torch.allclose(vectors.T @ vectors, torch.eye(len(energy), dtype=torch.float64), atol=1e-10)
    truncated = (u[:, :k] * s[:k]) @ vh[:k]
    assert torch.allclose(ops.project(a, vectors[:, :k]), truncated, atol=1e-7)
    u_K, s_K, v_K = ops.leading_triplets(a, vectors[:, :k])
    assert torch.allclose((u_K * s_K) @ v_K.T, truncated, atol=1e-7)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_spectrum_of_a_matrix_of_deficient_rank(shape):
    a = matrix(shape[0], 1, 0) @ matrix(1, shape[1], 1)
    energy, vectors = ops.spectrum(a)
    assert energy[0] > 0 and (energy >= 0).all() and (energy[1:] < 1e-12 * energy[0]).all()
    assert torch.allclose(ops.project(a, vectors[:, :1]), a, atol=1e-12)
    assert (ops.spectrum(torch.zeros(shape))[0] == 0).all()


@given(SIDES, SIDES, st.integers(0, 99))
def test_polar_is_the_orthogonal_factor(rows, columns, seed):
    x = matrix(rows, columns, seed)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    assert torch.allclose(ops.polar(x), u @ vh, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_polar_is_orthogonal_where_the_matrix_is_singular(rank):
    x = matrix(6, rank, 0) @ matrix(rank, 4, 1)
    q = ops.polar(x)
    assert torch.allclose(q.T @ q, torch.eye(4, dtype=torch.float64), atol=1e-10)


def test_orthogonal_sum_of_orthogonal_factors_is_their_sum():
    q, _ = torch.linalg.qr(matrix(6, 4, 0))
    p, _ = torch.linalg.qr(matrix(5, 4, 1))
    s = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    factors = [(q[:, :2], s[:2], p[:, :2]), (q[:, 2:], s[2:], p[:, 2:])]
    assert torch.allclose(ops.orthogonal_sum(factors), (q * s) @ p.T, atol=1e-12)


@pytest.mark.parametrize(
    ("fraction", "side", "rank"),
    [(0.29, 100, 28), (0.57, 100, 56), (0.12, 4, 1), (0.001, 9, 1), (0.5, 7, 3), (1.0, 7, 7)],
)
def test_rank_of_truncates_as_the_official_code(fraction, side, rank):
    assert ops.rank_of(fraction, (side, side + 3)) == ops.rank_of(fraction, (side + 3, side)) == rank


@pytest.mark.parametrize(("share", "rank"), [(0.1, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.9, 3), (1.0, 3)])
def test_rank_for_energy(share, rank):
    assert ops.rank_for_energy(torch.tensor([2.0, 1.0, 1.0, 0.0], dtype=torch.float64), share) == rank


def test_rank_for_energy_of_nothing_is_one_at_most_full():
    assert 1 <= ops.rank_for_energy(torch.zeros(3, dtype=torch.float64), 0.8) <= 3
