"""Order statistics of magnitudes, over a tensor or a model, exact and without a sort; and ranks within rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Iterable, Sequence

from mergeline.merging.algebra.device import on_cpu
from mergeline.merging.algebra.slots import Slot, Unit, View
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Total = Callable[[Callable[["View"], "Tensor"]], "Tensor"]  # the sum of what a function counts in every view


def magnitude_bits(tau_X: Tensor) -> Tensor:
    """|x| in float32 as integers of the same order: (numel,) int32."""
    return tau_X.reshape(-1).float().abs().view(torch.int32)


def kth_smallest(
    total: Total, rows: Callable[[Slot], Iterable[Tensor]], unit: Unit, places: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Order statistics of the float32 magnitudes over all blocks of all views, for each row that `rows(slot)` yields.

    places: which are looked for (from 1, ascending), a list a row. Exact, without a sort and without holding anything:
    the bits of a non-negative float32 order like an integer, so one histogram of their upper half finds the bin of a
    place and a second, of the lower half inside that bin, the value.
    """
    found = kth_smallest_of(total, rows, unit, lambda _: places)
    assert found is not None
    return found


def kth_smallest_of(
    total: Total,
    rows: Callable[[Slot], Iterable[Tensor]],
    unit: Unit,
    kth: Callable[[list[int]], Sequence[Sequence[int]] | None],
) -> list[list[float]] | None:
    """The same for places that depend on how many entries of each row are not zero, which `kth` is told.

    If it says None, so is the answer.
    """

    # One less than the bits, so that zero has a bin of its own.
    def upper(view: View) -> Tensor:
        return _histograms(view, unit, rows, (1 << 15) + 1, lambda less, _: [(less >> 16).add_(1)])

    counts_T1B = total(upper)
    places = kth(counts_T1B[:, 0, 1:].sum(1).tolist())
    if places is None:
        return None
    kth_TK = torch.tensor([list(row) for row in places])
    bin_TK, before_TK = _locate(counts_T1B.expand(-1, kth_TK.shape[1], -1), kth_TK)
    upper_TK = bin_TK - 1

    def lower(view: View) -> Tensor:
        bins = upper_TK.tolist()
        return _histograms(view, unit, rows, 1 << 16, lambda less, t: _inside(less, bins[t]))

    lower_TK, _ = _locate(total(lower), kth_TK - before_TK)
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


def _locate(counts_TKB: Tensor, kth_TK: Tensor) -> tuple[Tensor, Tensor]:
    """The bin that holds the kth entry, and how many entries lie before that bin: (T, K), (T, K)."""
    total_TKB = counts_TKB.cumsum(-1)
    bin_TK1 = torch.searchsorted(total_TKB, kth_TK[..., None].contiguous())
    before_TK1 = total_TKB.gather(-1, bin_TK1) - counts_TKB.gather(-1, bin_TK1)
    return bin_TK1[..., 0], before_TK1[..., 0]


def magnitude_thresholds(total: Total, kth_T: Sequence[int]) -> list[float]:
    """The k-th smallest magnitude of each expert's task vector, over all blocks of all views; 0 for k = 0."""
    if not any(kth_T):
        return [0.0] * len(kth_T)
    places = [[max(kth, 1)] for kth in kth_T]
    found = kth_smallest(total, lambda x: x.task_vectors, "element", places)
    return [threshold if kth else 0.0 for kth, [threshold] in zip(kth_T, found)]


def place_of_largest(elements: int, density: float) -> int:
    """The place of the smallest of the int(elements * density) largest, one or more; 0 if that is all."""
    return 0 if density >= 1 else elements - max(1, int(elements * density)) + 1


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
