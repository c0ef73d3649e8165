"""The algebra against plain definitions: torch.kthvalue, stable sorts, loops."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator, Sequence
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from mergeline.merging.algebra import combine, quantiles, sparsify, sums
from mergeline.merging.algebra.slots import integer_sum

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
SMALL = st.integers(-3, 3).map(float)  # many ties, zeros and sums that cancel
STACKS = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 8)), elements=SMALL)
SIGNS = st.sampled_from([-1.0, 0.0, 1.0])
WEIGHTS = st.lists(st.sampled_from([-1.0, 0.5, 1.0, 2.0]), min_size=4, max_size=4)


@contextmanager
def computed(way: str) -> Iterator[None]:
    """As on the CPU, by NumPy; or as on an accelerator, by torch."""
    here = lambda _: way == "numpy"  # noqa: E731
    with patch.object(quantiles, "on_cpu", here), patch.object(sparsify, "on_cpu", here):
        yield


both_ways = pytest.mark.parametrize("way", ["numpy", "torch"])


# --------------------------------------------------------------------------------------- combining


def test_weighted_sum_adds_in_float64():
    tensors = [torch.tensor([1.0]), torch.tensor([1e-9]), torch.tensor([-1.0])]
    assert sums.weighted_sum(tensors, [1.0, 2.0, 1.0]).item() == pytest.approx(2e-9, rel=1e-6)
    assert sums.weighted_sum(tensors).item() == pytest.approx(1e-9, rel=1e-6)
    assert sums.weighted_sum(iter(tensors)).dtype == torch.float64
    assert sums.weighted_sum(tensors, None, torch.float32).dtype == torch.float32
    assert [t.item() for t in tensors] == pytest.approx([1.0, 1e-9, -1.0])  # not added into the first


@given(hnp.arrays(np.float32, 5, elements=FINITE), st.integers(1, 9))
def test_the_mean_of_copies_is_the_copy(values, count):
    x = torch.from_numpy(values)
    assert torch.equal(sums.mean([x] * count).float(), x)
    short = x.clamp(-1e37, 1e37).bfloat16()  # its sums are exact in float32
    assert torch.equal(sums.mean([short] * count, torch.float32).bfloat16(), short)


@given(STACKS, WEIGHTS)
def test_total_is_the_weighted_sum_in_the_tensors_own_dtype(values, weights):
    tau_TX = torch.from_numpy(values)
    before = tau_TX.clone()
    weights = weights[: len(values)]
    assert np.array_equal(sums.total(tau_TX), values.sum(0))
    assert np.array_equal(sums.total(list(tau_TX), weights), np.array(weights, np.float32) @ values)
    assert sums.total(tau_TX.double()).dtype == torch.float64 and torch.equal(tau_TX, before)


@given(STACKS, WEIGHTS, SIGNS)
def test_elect_signs(values, weights, zero):
    tau_TX = torch.from_numpy(values)
    weights = weights[: len(values)]
    assert combine.elect_signs(tau_TX, None, zero).tolist() == [np.sign(c.sum()) or zero for c in values.T]
    expected = [np.sign(np.dot(weights, column)) or zero for column in values.T]
    assert combine.elect_signs(tau_TX, weights, zero).tolist() == expected


@given(STACKS, st.lists(SIGNS, min_size=8, max_size=8), st.none() | WEIGHTS)
def test_orthant_sum_takes_what_agrees_with_the_sign(values, signs, weights):
    tau_TX, sign_X = torch.from_numpy(values), torch.tensor(signs[: values.shape[1]])
    sums, counts = [], []
    for column, sign in zip(values.T, sign_X.tolist()):
        weighted = [(w * v, w) for v, w in zip(column, weights or [1.0] * 4) if w * v * sign > 0]
        sums.append(sum(v for v, _ in weighted))
        counts.append(sum(w for _, w in weighted))
    sum_X, count_X = combine.orthant_sum(tau_TX, sign_X, weights)
    assert sum_X.tolist() == sums and count_X.tolist() == counts
    assert np.array_equal(tau_TX, values) and sign_X.tolist() == signs[: values.shape[1]]


@given(STACKS, st.lists(SIGNS, min_size=8, max_size=8))
def test_largest_aligned(values, signs):
    sign_X = torch.tensor(signs[: values.shape[1]])
    expected = [
        max([v for v in column if v * sign > 0], key=abs, default=0.0)
        for column, sign in zip(values.T, sign_X.tolist())
    ]
    assert combine.largest_aligned(torch.from_numpy(values), sign_X).tolist() == expected


@pytest.mark.parametrize("shape", [(7,), (2, 3), (2, 1, 3, 1), (0,)])
@both_ways
def test_gram_holds_all_inner_products_in_float64(way, shape):
    tensors = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    rows_TN = tensors.double().reshape(3, tensors[0].numel())
    with computed(way):
        gram_TT = combine.gram(list(tensors))
    assert gram_TT.dtype == torch.float64 and torch.equal(gram_TT, gram_TT.T)
    assert torch.allclose(gram_TT, rows_TN @ rows_TN.T, rtol=1e-14)


# --------------------------------------------------------------------------------------- thresholds


class Chunks:
    """A view whose blocks are given: (T, n) each."""

    def __init__(self, blocks: Sequence[Tensor]):
        self._blocks = blocks

    def blocks(self, unit: str) -> Iterator[Tensor]:
        assert unit == "row"
        return iter(self._blocks)


def kth_smallest(views: Sequence[Sequence[Tensor]], kth_TK: Sequence[Sequence[int]]) -> list[list[float]]:
    total = lambda f: integer_sum(f(Chunks(blocks)) for blocks in views)  # noqa: E731
    return quantiles.kth_smallest(total, list, "row", kth_TK)


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 60)),
        elements=FINITE | SMALL | st.sampled_from([-0.0, 1e-45, 3.4e38]),
    ),
    st.data(),
)
@both_ways
def test_kth_smallest_is_kthvalue_in_any_chunking(way, values, data):
    x_TN = torch.from_numpy(values)
    count = x_TN.shape[1]
    places = data.draw(st.integers(1, 3))
    kth_TK = [[data.draw(st.integers(1, count)) for _ in range(places)] for _ in x_TN]
    cuts = sorted(data.draw(st.sets(st.integers(0, count), max_size=4)))
    blocks = torch.tensor_split(x_TN, cuts, dim=1)  # some of them empty
    first = data.draw(st.integers(1, len(blocks)))
    with computed(way):
        found = kth_smallest([views for views in (blocks[:first], blocks[first:]) if views], kth_TK)
    assert found == [[row.abs().kthvalue(k).values.item() for k in kth_K] for row, kth_K in zip(x_TN, kth_TK)]


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 30)), elements=FINITE | SMALL))
@both_ways
def test_kth_smallest_is_told_how_many_are_not_zero(way, values):
    x_TN = torch.from_numpy(values)
    told = []

    def place(nonzero: list[int]) -> None:
        told.append(nonzero)

    with computed(way):
        assert quantiles.kth_smallest_of(lambda f: f(Chunks([x_TN])), list, "row", place) is None
    assert told == [torch.count_nonzero(x_TN, dim=1).tolist()]


def test_kth_smallest_of_many_in_one_bin():
    """Values whose upper halves agree are told apart by their lower ones."""
    x_1N = (torch.arange(5000).flip(0) % 700 + 0x3F800000).to(torch.int32).view(torch.float32)[None]
    order = x_1N[0].sort().values.tolist()
    for kth in (1, 2, 700, 2500, 5000):
        assert kth_smallest([[x_1N[:, :1234], x_1N[:, 1234:]]], [[kth]]) == [[order[kth - 1]]]


def test_kth_smallest_over_tensors_of_all_shapes():
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(2, *shape, generator=generator) for shape in ((50, 4), (9,), (2, 3, 4))]
    flat_TN = torch.cat([t.reshape(2, -1) for t in tensors], dim=1).abs()
    for kth in (1, 100, flat_TN.shape[1]):
        assert kth_smallest([[t] for t in tensors], [[kth], [kth]]) == [
            [v] for v in flat_TN.kthvalue(kth).values.tolist()
        ]


@given(hnp.arrays(np.float32, st.integers(1, 30), elements=FINITE | SMALL), st.data())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keep_at_least_keeps_equals(dtype, values, data):
    threshold = abs(float(data.draw(st.sampled_from(list(values)) | FINITE)))
    x_X = torch.from_numpy(values).to(dtype)
    kept_X = sparsify.keep_at_least(x_X, threshold)
    assert kept_X.dtype == dtype
    assert kept_X.tolist() == [v if abs(v) >= threshold else 0.0 for v in values.tolist()]
    assert np.array_equal(x_X, values)


def test_thresholds_are_compared_in_float32():
    """A threshold is a float32; a float64 that rounds to it is its equal."""
    x_X = torch.tensor([1 / 3, -1 / 3], dtype=torch.float64)
    threshold = x_X.float().abs()[0].item()
    assert threshold > 1 / 3
    assert torch.equal(sparsify.keep_at_least(x_X, threshold), x_X)
    assert torch.equal(sparsify.keep_between(x_X, threshold, threshold), x_X)


@given(hnp.arrays(np.float32, st.integers(1, 30), elements=SMALL), st.integers(0, 3), st.integers(0, 3))
@pytest.mark.parametrize("bound", [float, torch.tensor])
@both_ways
def test_keep_between_keeps_equals(way, bound, values, least, most):
    with computed(way):
        kept_X = sparsify.keep_between(torch.from_numpy(values), bound(float(least)), bound(float(most)))
    assert kept_X.tolist() == [v if least <= abs(v) <= most else 0.0 for v in values.tolist()]


ROWS = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 12)), elements=SMALL | FINITE | st.just(-0.0)
)


@given(ROWS)
@both_ways
def test_row_ranks_are_those_of_a_stable_sort(way, values):
    order = np.argsort(np.abs(values), axis=-1, kind="stable")
    expected = np.empty_like(order)
    np.put_along_axis(expected, order, np.arange(values.shape[1])[None].repeat(len(values), 0), -1)
    with computed(way):
        assert np.array_equal(quantiles.row_ranks(torch.from_numpy(values)), expected)


@given(ROWS, st.data())
@both_ways
def test_row_order_is_the_sorted_magnitudes(way, values, data):
    places = data.draw(st.lists(st.integers(0, values.shape[1] - 1), min_size=1, max_size=3))
    with computed(way):
        found = quantiles.row_order(torch.from_numpy(values), places)
    for place, column in zip(places, found, strict=True):
        assert np.array_equal(column, np.sort(np.abs(values), axis=-1)[:, place : place + 1])
