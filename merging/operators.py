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


def plain_update(experts: Sequence[Tensor], base_X: Tensor, other: str) -> Tensor:
    """What a tensor without matrix treatment adds to a float64 base, as `other` says (see `merging.keys`): (X)."""
    if other == "pretrained":
        return torch.zeros_like(base_X)
    if other == "mean":
        return mean(experts).sub_(base_X)
    return weighted_sum(experts).sub_(base_X, alpha=len(experts))


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


def largest(tau_TX: Sequence[Tensor]) -> Tensor:
    """The entry of largest magnitude, of equal ones the last: (X)."""
    largest_X = tau_TX[0]
    for tau_X in tau_TX[1:]:
        largest_X = torch.where(tau_X.abs() >= largest_X.abs(), tau_X, largest_X)
    return largest_X


def gram(tensors: Sequence[Tensor]) -> Tensor:
    """All inner products of T tensors of one shape, in float64, on the CPU: (T, T)."""
    stack_TN = torch.stack([tensor.reshape(-1) for tensor in tensors]).double()
    gram_TT = (stack_TN @ stack_TN.T).cpu()
    return gram_TT.tril() + gram_TT.tril(-1).T


def merge_signed(
    tau_TX: Sequence[Tensor], weights: Sequence[float] | None, elect: bool, normalize: bool
) -> Tensor:
    """Weighted sum of task vectors, or `elect`: of those entries that agree with the elected sign; positive if none is.

    `normalize` divides by the weights that were summed, where that is not 0: (X).
    """
    if not elect:
        share = sum(weights or [1.0] * len(tau_TX)) if normalize else 1.0
        return total(tau_TX, weights) if share in (0.0, 1.0) else total(tau_TX, weights).div_(share)
    sum_X, weight_X = orthant_sum(tau_TX, elect_signs(tau_TX, weights, 1.0), weights)
    return sum_X / torch.where(weight_X == 0, 1.0, weight_X) if normalize else sum_X


def combination(x: Slot, coefficients: Sequence[float]) -> Tensor:
    """base + sum of coefficient * task vector; without a base, the sum of coefficient * expert: (X)."""
    sum_X = weighted_sum(x.experts, coefficients, x.precision)
    return sum_X if x.base is None else sum_X.add_(x.base, alpha=1 - sum(coefficients))


def vectors(x: Slot) -> Sequence[Tensor]:
    """What a geometric mean is taken of: the task vectors or, without a base, the experts; T times (X)."""
    return x.experts if x.base is None else x.task_vectors


def squared_norms(view: View) -> Tensor:
    """Squared Euclidean norms of one tensor's task vectors: (T,) float64 on the CPU."""
    norms_T = torch.zeros(len(view.source.experts), dtype=torch.float64)
    for x in view.blocks("element"):
        norms_T += torch.stack([tau_X.double().square().sum() for tau_X in x.task_vectors]).cpu()
    return norms_T


def arc(cosine: Tensor, t: float, straight: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of two vectors with these cosines for the point at t of their arc; of their chord where `straight`."""
    angle = cosine.arccos()
    sine = torch.where(straight, 1.0, angle.sin())
    first = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / sine)
    return first, torch.where(straight, t, (t * angle).sin() / sine)


# ---------------------------------------------------------------------------------------------- masks


def task_mask(tau_X: Tensor, merged_tau_X: Tensor, threshold: float) -> Tensor:
    """Where a merged task vector serves an expert: |tau| > threshold * |merged - tau| (TALL-masks, 2405.07813)."""
    return tau_X.abs() > (merged_tau_X - tau_X).abs_().mul_(threshold)


def consensus(tau_TX: Sequence[Tensor], merged_tau_X: Tensor, threshold: float, min_tasks: int) -> Tensor:
    """The merged task vector, zero where it serves fewer than `min_tasks` experts: (X)."""
    count_X = torch.zeros_like(merged_tau_X)
    for tau_X in tau_TX:
        count_X += task_mask(tau_X, merged_tau_X, threshold)
    return merged_tau_X * (count_X >= min_tasks)


# ---------------------------------------------------------------------------------------------- descending


def descend(
    slope: Callable[[Tensor], Tensor],
    like_X: Tensor,
    *,
    optimizer: str,
    learning_rate: float,
    iterations: int,
    momentum: float = 0.0,
) -> Tensor:
    """Where Adam, or SGD with momentum, gets from zero in so many steps along a gradient, as torch's own do: (X)."""
    at_X, mean_X, square_X = (torch.zeros_like(like_X) for _ in range(3))
    for step in range(1, iterations + 1):
        slope_X = slope(at_X)
        if optimizer == "sgd":
            at_X -= mean_X.mul_(momentum).add_(slope_X).mul(learning_rate)
            continue
        mean_X.lerp_(slope_X, 0.1)
        square_X.mul_(0.999).addcmul_(slope_X, slope_X, value=0.001)
        size_X = square_X.sqrt().div_((1 - 0.999**step) ** 0.5).add_(1e-8)
        at_X.addcdiv_(mean_X, size_X, value=-learning_rate / (1 - 0.9**step))
    return at_X


# ---------------------------------------------------------------------------------------------- sparsifying


def for_each(value: float | Sequence[float], experts: int) -> list[float]:
    """One number an expert, of one for all or of a list."""
    return list(value) if isinstance(value, Sequence) else [value] * experts


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


def magnitude_thresholds(each: Each, kth_T: Sequence[int]) -> list[float]:
    """The k-th smallest magnitude of each expert's task vector, over all blocks of all views; 0 for k = 0."""
    if not any(kth_T):
        return [0.0] * len(kth_T)
    places = [[max(kth, 1)] for kth in kth_T]
    found = kth_smallest(each, lambda x: x.task_vectors, "element", lambda _: places)
    return [threshold if kth else 0.0 for kth, [threshold] in zip(kth_T, found)]


def trimmed(x: Slot, thresholds: Sequence[float]) -> list[Tensor]:
    """The task vectors without the entries below each one's threshold: T times (X)."""
    return [keep_at_least(tau_X, threshold) for tau_X, threshold in zip(x.task_vectors, thresholds)]


def place_of_largest(elements: int, density: float) -> int:
    """The place of the smallest of the int(elements * density) largest, one or more; 0 if that is all."""
    return 0 if density >= 1 else elements - max(1, int(elements * density)) + 1


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
