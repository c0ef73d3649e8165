"""Order statistics of magnitudes, over a tensor or a model, exact and without a sort; and ranks within rows."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Callable, Iterable, Sequence

from mergeline.merging.algebra.device import on_cpu
from mergeline.merging.algebra.slots import Slot, Unit, View
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_HALF = 1 << 16  # numbers that half of the bits can be
_ZERO = _HALF // 2 - 1  # no finite number has it for the upper half of its bits
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
        return _histograms(view, unit, rows, _HALF // 2 + 1, lambda row, _: [(_less(row) >> 16).add_(1)])

    counts_T1B = total(upper)
    places = kth(counts_T1B[:, 0, 1:].sum(1).tolist())
    if places is None:
        return None
    kth_TK = torch.tensor([list(row) for row in places])
    bin_TK, before_TK = _locate(counts_T1B.expand(-1, kth_TK.shape[1], -1), kth_TK)
    upper_TK = bin_TK - 1

    def lower(view: View) -> Tensor:
        bins = upper_TK.tolist()
        return _histograms(view, unit, rows, _HALF, lambda row, t: _inside(_less(row), bins[t]))

    lower_TK, _ = _locate(total(lower), kth_TK - before_TK)
    return _joined(upper_TK, lower_TK)


def _less(tau_X: Tensor) -> Tensor:
    """The bits of the magnitudes, less one: (numel,) int32."""
    return magnitude_bits(tau_X).sub_(1)


def _signed(tau_X: Tensor) -> Tensor:
    """The bits less one, with the sign's: (numel,) int32. The upper half of zeros is _ZERO, maybe with a sign's bit."""
    return tau_X.reshape(-1).float().view(torch.int32).sub(1)


def _joined(upper_TK: Tensor, lower_TK: Tensor) -> list[list[float]]:
    """The magnitudes whose bits, less one, have these halves."""
    return ((upper_TK << 16) + lower_TK + 1).to(torch.int32).view(torch.float32).tolist()


def _inside(values: Tensor, uppers: Sequence[int]) -> list[Tensor]:
    """For each upper half, the lower halves of the integers that have it."""
    if not on_cpu(values):
        return [values[values >> 16 == upper] & 0xFFFF for upper in uppers]
    import numpy as np

    array = values.numpy()  # its boolean indexing is eight times faster
    halves = array >> 16
    return [torch.from_numpy(array[halves == upper] & np.int32(0xFFFF)) for upper in uppers]


def _inside_by_sign(values: Tensor, upper: int) -> Tensor:
    """The lower halves of those that have an upper half, whatever the sign's bit, which comes before them."""
    mask, wanted = _ZERO << 16, (upper & _ZERO) << 16
    if on_cpu(values):
        import numpy as np

        array = values.numpy()
        chosen = torch.from_numpy(array[(array & np.int32(mask)) == np.int32(wanted)])
    else:
        chosen = values[(values & mask) == wanted]
    return ((chosen >> 15) & _HALF).bitwise_or_(chosen & 0xFFFF)


def _histograms(
    view: View,
    unit: Unit,
    rows: Callable[[Slot], Iterable[Tensor]],
    bins: int,
    keys: Callable[[Tensor, int], Sequence[Tensor]],
) -> Tensor:
    """How often each of K kinds of `keys`, which are given a row and its number, occurs in each: (T, K, bins)."""
    histograms: list[list[_Histogram]] = []
    for x in view.blocks(unit):
        for t, row in enumerate(rows(x)):
            found = keys(row, t)
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


def thresholds_and_signs(total: Total, kth_T: Sequence[int]) -> tuple[list[float], int]:
    """The same, and how many more of all entries that reach their threshold are positive than negative.

    Histograms that tell signs apart say both, so that the model is read no third time.
    """
    histograms = partial(_histograms, unit="element", rows=lambda x: x.task_vectors)

    def upper(view: View) -> Tensor:
        return histograms(
            view, bins=_HALF, keys=lambda row, _: [(_signed(row) >> 16).bitwise_and_(_HALF - 1)]
        )

    counts_T2B = total(upper)[:, 0].unflatten(1, (2, -1))  # of positive numbers, and of negative ones
    zero_T1, counts_T2B = counts_T2B[..., _ZERO:].sum(1), counts_T2B[..., :_ZERO]
    kth_T1 = torch.tensor(kth_T)[:, None].clamp(min=1)
    bin_T1, before_T1 = _locate(torch.cat([zero_T1, counts_T2B.sum(1)], -1)[:, None], kth_T1)
    upper_T1 = bin_T1 - 1

    def lower(view: View) -> Tensor:
        uppers = upper_T1[:, 0].tolist()
        return histograms(
            view, bins=2 * _HALF, keys=lambda row, t: [_inside_by_sign(_signed(row), uppers[t])]
        )

    lower_T2B = total(lower)[:, 0].unflatten(1, (2, -1))
    lower_T1, _ = _locate(lower_T2B.sum(1, keepdim=True), kth_T1 - before_T1)
    threshold_T = [v if kth else 0.0 for kth, [v] in zip(kth_T, _joined(upper_T1, lower_T1))]
    more = 0
    for t, (bin, least) in enumerate(zip(bin_T1[:, 0].tolist(), lower_T1[:, 0].tolist())):
        more += _more(counts_T2B[t, :, bin:])
        if bin > 0:  # else zeros have this upper half
            more += _more(lower_T2B[t, :, least:])
    return threshold_T, more


def _more(counts_2B: Tensor) -> int:
    positive, negative = counts_2B.sum(1).tolist()
    return positive - negative


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
