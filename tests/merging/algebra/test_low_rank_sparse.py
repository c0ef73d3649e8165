"""Low rank and sparse rows: as the official code begins, and by the laws of each."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from places import GOLDENS
from safetensors.torch import load_file

from mergeline.merging.algebra.low_rank_sparse import rank_for_parameters, row_count, split

PARAMETER_RATIO = 0.4  # of the case


def drawn(seed: int, rows: int, columns: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=draws, dtype=torch.float64)


def test_factors_and_rest_are_those_of_the_official_code():
    held = {
        name: tensor.double()
        for name, tensor in load_file(GOLDENS / "unit-mcsmoe-losparse.safetensors").items()
    }
    weight_MN = held["losparse.W"]
    rank = rank_for_parameters(PARAMETER_RATIO, weight_MN.shape)
    assert rank == held["losparse.L"].shape[1]
    found = split(weight_MN, rank, len(weight_MN))
    expected_MN = held["losparse.L"] @ held["losparse.R"]
    torch.testing.assert_close(found.left_MK @ found.right_KN, expected_MN, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.rows_PN, held["losparse.S"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.left_MK.abs(), held["losparse.L"].abs(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.right_KN.abs(), held["losparse.R"].abs(), atol=1e-5, rtol=1e-4)


shapes = st.tuples(st.integers(1, 7), st.integers(1, 7))


@given(st.integers(0, 99), shapes, st.floats(0.01, 1), st.floats(0, 1))
def test_as_many_numbers_are_kept_as_was_asked_for(seed, shape, ratio, share):
    rows, columns = shape
    rank, kept = rank_for_parameters(ratio, shape), row_count(share, shape)
    found = split(drawn(seed, rows, columns), rank, kept)
    assert found.left_MK.shape == (rows, rank) and found.right_KN.shape == (rank, columns)
    assert int(found.kept_M.sum()) == kept and found.rows_PN.shape == (kept, columns)
    asked, of_one = ratio * rows * columns, rows + columns  # a rank more has that many numbers more
    assert (rank - 1) * of_one < asked + 1e-9 and (rank * of_one > asked - 1e-9 or rank == min(shape))


@given(st.integers(0, 99), shapes)
def test_all_rows_or_full_rank_lose_nothing(seed, shape):
    a_MN = drawn(seed, *shape)
    for rank, kept in ((1, shape[0]), (min(shape), 0)):
        torch.testing.assert_close(split(a_MN, rank, kept).dense(), a_MN)


@given(st.integers(0, 99), shapes, st.data())
def test_kept_rows_are_exact_and_those_that_the_cut_leaves_most_of(seed, shape, data):
    a_MN, kept = drawn(seed, *shape), data.draw(st.integers(0, shape[0]))
    found = split(a_MN, 1, kept)
    torch.testing.assert_close(found.dense()[found.kept_M], a_MN[found.kept_M])
    left_M = (a_MN - found.left_MK @ found.right_KN).abs().mean(1)
    assert max(left_M[~found.kept_M], default=0) <= min(left_M[found.kept_M], default=torch.inf)


def test_kept_rows_hold_what_rounding_the_factors_lost():
    a_MN = drawn(0, 12, 9)
    found = split(a_MN, 3, 12, torch.bfloat16)
    rest_MN = a_MN - found.left_MK.double() @ found.right_KN.double()
    assert found.rows_PN.dtype == torch.bfloat16 and found.rows_PN.equal(rest_MN.bfloat16())


def test_nothing_is_kept_of_nothing():
    found = split(torch.zeros(3, 4, dtype=torch.float64), 2, 1)
    assert found.dense().equal(torch.zeros(3, 4, dtype=torch.float64)) and found.kept_M.tolist() == [
        True,
        False,
        False,
    ]
