"""The algebra that methods are composed of: pure functions on stacked tensors.

Shape suffixes: T experts, M rows out, N columns in, K kept directions; `_TX` is T stacked tensors of any shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Iterable, Sequence

from merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from merging.slots import Slot, Unit, View


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
        else:  # converted first: adding float32 to float64 is three times slower
            sum_X.add_(tensor_X.to(sum_X.dtype), alpha=weight)
    assert sum_X is not None
    return sum_X


def mean(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Mean over experts in float64 or `dtype`: copies of one tensor give back that tensor, bit for bit."""
    return weighted_sum(tensors, dtype=dtype).div_(len(tensors))


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
    rows_TN = [tensor.reshape(-1).double() for tensor in tensors]
    if not on_cpu(rows_TN[0]):
        stack_TN = torch.stack(rows_TN)
        return (stack_TN @ stack_TN.T).cpu()
    gram_TT = torch.empty(len(rows_TN), len(rows_TN), dtype=torch.float64)
    for i, row_N in enumerate(rows_TN):
        for j in range(i + 1):
            gram_TT[i, j] = gram_TT[j, i] = torch.dot(row_N, rows_TN[j])
    return gram_TT


# ---------------------------------------------------------------------------------------------- sparsifying

Each = Callable[[Callable[["View"], "Tensor"]], Iterable["Tensor"]]  # a function of every view, in order


def magnitude_bits(tau_X: Tensor) -> Tensor:
    """|x| in float32 as integers of the same order: (numel,) int32."""
    return tau_X.reshape(-1).float().abs().view(torch.int32)


def kth_smallest(
    each: Each, rows: Callable[[Slot], Iterable[Tensor]], unit: Unit, kth_T: Sequence[int]
) -> list[float]:
    """The kth smallest (from 1) float32 magnitude over all blocks of all views, for each row that `rows(slot)` yields.

    Exact, without a sort and without holding anything: the bits of a non-negative float32 order like an integer, so
    one histogram of their upper half finds the bin and a second, of the lower half inside that bin, the value.
    """
    kth = torch.tensor(list(kth_T))

    def upper(view: View) -> Tensor:
        return _histograms(view, unit, rows, 1 << 15, lambda bits, _: bits >> 16)

    bin_T, before_T = _locate(_total(each(upper)), kth)
    bins = bin_T.tolist()

    def lower(view: View) -> Tensor:
        return _histograms(view, unit, rows, 1 << 16, lambda bits, t: _inside(bits, bins[t]))

    low_T, _ = _locate(_total(each(lower)), kth - before_T)
    return ((bin_T << 16) | low_T).to(torch.int32).view(torch.float32).tolist()


def _inside(bits: Tensor, bin: int) -> Tensor:
    """The lower halves of the integers whose upper half is `bin`."""
    if not on_cpu(bits):
        return bits[bits >> 16 == bin] & 0xFFFF
    import numpy as np

    values = bits.numpy()  # its boolean indexing is eight times faster
    return torch.from_numpy(values[values >> 16 == bin] & np.int32(0xFFFF))


def _histograms(
    view: View,
    unit: Unit,
    rows: Callable[[Slot], Iterable[Tensor]],
    bins: int,
    key: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """How often each key occurs in the magnitudes of each row: (T, bins)."""
    histograms: list[_Histogram] = []
    for x in view.blocks(unit):
        for t, row in enumerate(rows(x)):
            if t == len(histograms):
                histograms.append(_Histogram(bins))
            histograms[t].add(key(magnitude_bits(row), t))
    return (
        torch.stack([h.counts() for h in histograms])
        if histograms
        else torch.zeros(1, bins, dtype=torch.int64)
    )


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


def _locate(counts: Tensor, kth_T: Tensor) -> tuple[Tensor, Tensor]:
    """Per row, the bin that holds the kth entry and how many entries lie before that bin."""
    total = counts.cumsum(1)
    bin_T = torch.searchsorted(total, kth_T[:, None].contiguous())[:, 0]
    return bin_T, total.gather(1, bin_T[:, None])[:, 0] - counts.gather(1, bin_T[:, None])[:, 0]


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
