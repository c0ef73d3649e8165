"""The algebra that methods are composed of: pure functions on stacked tensors.

Shape suffixes: T experts, M rows out, N columns in, K kept directions; `_TX` is T stacked tensors of any shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Iterable, Sequence

from merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from merging.slots import Slot, Unit, View

_PIECE = 1 << 17  # elements


def on_cpu(tensor: Tensor) -> bool:
    """Whether NumPy and SciPy can take it, which sort and decompose faster than torch there."""
    return tensor.device.type == "cpu"


# ---------------------------------------------------------------------------------------------- combining


def weighted_sum(
    tensors: Iterable[Tensor], weights: Sequence[float] | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Sum over experts of weight x tensor, one at a time, in float64 or `dtype`; `None` means weight 1 for all."""
    sum_X: Tensor | None = None
    for t, tensor_X in enumerate(tensors):
        weight = 1.0 if weights is None else float(weights[t])
        if sum_X is None:
            sum_X = tensor_X.to(dtype or torch.float64, copy=True)
            if weight != 1.0:
                sum_X.mul_(weight)
        else:  # converted first: adding float32 to float64 is three times slower; in pieces that caches hold
            for sum_P, piece_P in zip(sum_X.view(-1).split(_PIECE), tensor_X.reshape(-1).split(_PIECE)):
                sum_P.add_(piece_P.to(sum_P.dtype), alpha=weight)
    assert sum_X is not None
    return sum_X


def mean(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Mean over experts in float64 or `dtype`: copies of one tensor give back that tensor, bit for bit."""
    return weighted_sum(tensors, dtype=dtype).div_(len(tensors))


def weighted_mean(x: Slot, weight: Callable[[int], Tensor]) -> Tensor:
    """Sum of weight * expert over the sum of the weights, entry by entry, in `x.precision`; where it is 0, the mean.

    `weight(t)` gives expert t's: (X).
    """
    sum_X, weights_X = (torch.zeros(x.shape, dtype=x.precision, device=x.experts[0].device) for _ in "ab")
    for t, expert_X in enumerate(x.experts):
        weight_X = weight(t).to(x.precision)
        sum_X.addcmul_(weight_X, expert_X.to(x.precision))
        weights_X += weight_X
    nothing_X = weights_X == 0
    if nothing_X.any():
        return torch.where(nothing_X, mean(x.experts, x.precision), sum_X / weights_X)
    return sum_X.div_(weights_X)


def total(tau_TX: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Sum over experts of weight x tensor, in the tensors' own dtype."""
    sum_X = tau_TX[0].clone() if weights is None else tau_TX[0] * weights[0]
    for t in range(1, len(tau_TX)):
        sum_X.add_(tau_TX[t], alpha=1.0 if weights is None else weights[t])
    return sum_X


def elect_signs(tau_TX: Sequence[Tensor], weights: Sequence[float] | None, zero: float) -> Tensor:
    """Sign of the sum over experts, `zero` where they cancel (TIES, 2306.01708): (X)."""
    return total(tau_TX, weights).sign_().add_(zero / 2).sign_()


def orthant_sum(
    tau_TX: Sequence[Tensor], sign_X: Tensor, weights: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """Sum and total weight of the entries of each position that have the elected sign (zeros have none): (X), (X).

    With weights it is the weighted entry whose sign must agree.
    """
    sum_X, count_X = torch.zeros_like(sign_X), torch.zeros_like(sign_X)
    for t, tau_X in enumerate(tau_TX):
        weight = 1.0 if weights is None else float(weights[t])
        aligned_X = (tau_X * sign_X).mul_(weight).clamp_(min=0)
        sum_X += aligned_X
        count_X.add_(aligned_X.sign_(), alpha=weight)
    return sum_X.mul_(sign_X), count_X


def largest_aligned(tau_TX: Sequence[Tensor], sign_X: Tensor) -> Tensor:
    """The entry of largest magnitude among those of the elected sign, 0 where there is none: (X)."""
    largest_X = torch.zeros_like(sign_X)
    for tau_X in tau_TX:
        largest_X = torch.maximum(largest_X, tau_X * sign_X)
    return largest_X * sign_X


def gram(tensors: Sequence[Tensor]) -> Tensor:
    """All inner products of T tensors of one shape, in float64, on the CPU: (T, T)."""
    stack_TN = torch.stack([tensor.reshape(-1) for tensor in tensors]).double()
    gram_TT = (stack_TN @ stack_TN.T).cpu()
    return gram_TT.tril() + gram_TT.tril(-1).T


# ---------------------------------------------------------------------------------------------- sparsifying

Each = Callable[[Callable[["View"], "Tensor"]], Iterable["Tensor"]]  # a function of every view, in order


def magnitude_bits(tau_X: Tensor) -> Tensor:
    """|x| in float32 as integers of the same order: (numel,) int32."""
    return tau_X.reshape(-1).float().abs().view(torch.int32)


def kth_smallest(
    each: Each,
    rows: Callable[[Slot], Iterable[Tensor]],
    unit: Unit,
    kth: Callable[[list[int]], Sequence[Sequence[int]] | None],
) -> list[list[float]] | None:
    """Order statistics of the float32 magnitudes over all blocks of all views, for each row that `rows(slot)` yields.

    `kth` is told how many entries of each row are not zero, and says which places (from 1, ascending) are looked for,
    a list a row; or None, and so is the answer. Exact, without a sort and without holding anything: the bits of a
    non-negative float32 order like an integer, so one histogram of their upper half finds the bin of a place and a
    second, of the lower half inside that bin, the value. One less than the bits, so that zero has a bin of its own.
    """

    def upper(view: View) -> Tensor:
        return _histograms(view, unit, rows, (1 << 15) + 1, lambda less, _: [(less >> 16).add_(1)])

    counts_T1B = _total(each(upper))
    places = kth(counts_T1B[:, 0, 1:].sum(1).tolist())
    if places is None:
        return None
    kth_TK = torch.tensor([list(row) for row in places])
    bin_TK, before_TK = _locate(counts_T1B.expand(-1, kth_TK.shape[1], -1), kth_TK)
    upper_TK = bin_TK - 1

    def lower(view: View) -> Tensor:
        bins = upper_TK.tolist()
        return _histograms(view, unit, rows, 1 << 16, lambda less, t: _inside(less, bins[t]))

    lower_TK, _ = _locate(_total(each(lower)), kth_TK - before_TK)
    return ((upper_TK << 16) + lower_TK + 1).to(torch.int32).view(torch.float32).tolist()


def _inside(values: Tensor, uppers: Sequence[int]) -> list[Tensor]:
    """For each upper half, the lower halves of the integers that have it."""
    if not on_cpu(values):
        return [values[values >> 16 == upper] & 0xFFFF for upper in uppers]
    import numpy as np

    array = values.numpy()  # its boolean indexing is eight times faster
    halves = array >> 16
    return [torch.from_numpy(array[halves == upper] & np.int32(0xFFFF)) for upper in uppers]


def _histograms(
    view: View,
    unit: Unit,
    rows: Callable[[Slot], Iterable[Tensor]],
    bins: int,
    keys: Callable[[Tensor, int], Sequence[Tensor]],
) -> Tensor:
    """How often each of K kinds of keys occurs in the magnitudes, less one, of each row: (T, K, bins)."""
    histograms: list[list[_Histogram]] = []
    for x in view.blocks(unit):
        for t, row in enumerate(rows(x)):
            found = keys(magnitude_bits(row).sub_(1), t)
            if t == len(histograms):
                histograms.append([_Histogram(bins) for _ in found])
            for histogram, values in zip(histograms[t], found):
                histogram.add(values)
    if not histograms:
        return torch.zeros(1, 1, bins, dtype=torch.int64)
    return torch.stack([torch.stack([h.counts() for h in row]) for row in histograms])


class _Histogram:
    """Counts of small integers, which are counted a large portion at a time."""

    def __init__(self, bins: int):
        self._counts = torch.zeros(bins, dtype=torch.int64)
        self._waiting = torch.empty(
            4 * bins, dtype=torch.int32
        )  # in one place: many small pieces would scatter memory
        self._elements = 0

    def add(self, values: Tensor) -> None:
        if self._elements + len(values) > len(self._waiting):
            self._count(self._waiting[: self._elements])
            self._elements = 0
        if len(values) > len(self._waiting):
            self._count(values)
            return
        self._waiting[self._elements : self._elements + len(values)] = values
        self._elements += len(values)

    def _count(self, values: Tensor) -> None:
        self._counts += torch.bincount(values, minlength=len(self._counts)).cpu()

    def counts(self) -> Tensor:
        self._count(self._waiting[: self._elements])
        self._elements = 0
        return self._counts


def _total(counts: Iterable[Tensor]) -> Tensor:
    total: Tensor | None = None
    for count in counts:
        total = count if total is None else total.add_(count)
    assert total is not None
    return total


def _locate(counts_TKB: Tensor, kth_TK: Tensor) -> tuple[Tensor, Tensor]:
    """The bin that holds the kth entry, and how many entries lie before that bin: (T, K), (T, K)."""
    total_TKB = counts_TKB.cumsum(-1)
    bin_TK1 = torch.searchsorted(total_TKB, kth_TK[..., None].contiguous())
    before_TK1 = total_TKB.gather(-1, bin_TK1) - counts_TKB.gather(-1, bin_TK1)
    return bin_TK1[..., 0], before_TK1[..., 0]


def keep_at_least(tau_X: Tensor, threshold: float) -> Tensor:
    """Zero the entries whose float32 magnitude is below the threshold; equals are kept."""
    if threshold <= 0:
        return tau_X
    if tau_X.dtype == torch.float64:
        return tau_X * (tau_X.float().abs() >= threshold)
    below = torch.nextafter(torch.tensor(threshold), torch.tensor(0.0))
    return torch.nn.functional.hardshrink(tau_X, below.item())  # keeps what is greater


def keep_between(tau_X: Tensor, least: float | Tensor, most: float | Tensor) -> Tensor:
    """Zero the entries whose float32 magnitude is below `least` or above `most`; equals are kept."""
    if isinstance(most, float) and tau_X.dtype == torch.float32:
        kept_X = keep_at_least(tau_X, least)
        return kept_X - torch.nn.functional.hardshrink(kept_X, most)
    size_X = tau_X.float().abs()
    return tau_X * ((size_X >= least) & (size_X <= most))


def row_ranks(tau_MN: Tensor) -> Tensor:
    """The rank of each entry's magnitude within its row, from 0; equal ones in the order of their columns: (M, N)."""
    columns = tau_MN.shape[-1]
    if on_cpu(tau_MN):
        import numpy as np

        # Magnitude above, column below: sorting such integers is exact, stable, and vectorised in numpy.
        packed_MN = magnitude_bits(tau_MN).reshape(tau_MN.shape).numpy().astype(np.int64)
        packed_MN <<= 32
        packed_MN |= np.arange(columns)
        packed_MN.sort(axis=-1)
        packed_MN &= 0xFFFFFFFF
        order_MN = torch.from_numpy(packed_MN)
    else:
        order_MN = tau_MN.float().abs().argsort(dim=-1, stable=True)
    place_MN = torch.arange(columns, dtype=torch.float32, device=order_MN.device).expand(order_MN.shape)
    return torch.empty_like(order_MN, dtype=torch.float32).scatter_(-1, order_MN, place_MN)


def row_order(tau_MN: Tensor, places: Sequence[int]) -> list[Tensor]:
    """The magnitudes that stand at some places (from 0, ascending) of each row: (M, 1) each."""
    if on_cpu(tau_MN):
        import numpy as np

        bits_MN = magnitude_bits(tau_MN).reshape(tau_MN.shape).numpy()
        sorted_MN = torch.from_numpy(np.sort(bits_MN, axis=-1)).view(torch.float32)
    else:
        sorted_MN = tau_MN.float().abs().sort(dim=-1).values
    return [sorted_MN[:, p : p + 1].clone() for p in places]


def task_mask(tau_X: Tensor, merged_tau_X: Tensor, threshold: float) -> Tensor:
    """Where a task vector matters to its own task (TALL masks, 2405.07813): |tau| > threshold * |merged - tau|: (X) bool."""
    return tau_X.abs() > (merged_tau_X - tau_X).abs_().mul_(threshold)
