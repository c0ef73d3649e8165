"""FR-Merging: task vectors without some of their spatial frequencies, added up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterator, Mapping, Sequence

from mergeline.merging.algebra import directions
from mergeline.merging.algebra.slots import Slot, View, Views
from mergeline.merging.algebra.sums import weighted_sum
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import Look, Note, method
from mergeline.merging.methods.parameters import NotNegative

if TYPE_CHECKING:
    from torch import Tensor


def lengths(views: Views) -> list[float]:
    """The mean magnitude of a tensor's task vectors; of a matrix, which is filtered first, nothing."""

    def sizes(view: View) -> list[float]:
        if view.is_matrix or view.role.module is None:
            return []
        found = [0.0] * views.experts
        for x in view.blocks("element"):
            found = [size + float(tau_X.double().abs().sum()) for size, tau_X in zip(found, x.task_vectors)]
        return found

    [found] = views.each(sizes)
    return found


def _odd(params: Mapping[str, Any], experts: int) -> Iterator[str]:
    ratio = params["filter_ratio"]
    square = "the whole of a square matrix" if ratio >= 0.5**0.5 else "nearly the whole of a square matrix"
    if ratio >= 0.6:
        yield Note(
            f"filter_ratio {ratio:g} is in shorter sides whatever the longer one is: it keeps {square}, and cuts long "
            "matrices, as of packed attention and MLPs"
        )


def _rest(x: Slot, *, with_align: bool, **_: Any) -> Tensor | None:
    """The sum of the task vectors of what attention and MLPs have beside matrices; of other tensors nothing."""
    if x.view.role.module is None:
        return None
    return weighted_sum(x.task_vectors, _aligned(x.found) if with_align else None)


@method(
    paper="2411.16815",
    code="Zhengsh123/FREE-Merging@36c0f415",
    scale=0.7,
    keys="block_linear",
    other=_rest,
    needs=("base",),
    measure=Look(lengths, over=lambda params: "tensor" if params["with_align"] else None),
    check=_odd,
    spectral=lambda rows, columns, experts: (experts + 6) * rows * columns,
)
def free(x: Slot, *, filter_ratio: NotNegative = 0.7, with_align: bool = True) -> Tensor:
    """base + scale * sum of a_t * F(tau_t), F the frequencies of the 2-D Fourier transform near its middle index.

    The transform is not shifted, so that its middle index is the highest frequency: F is a high-pass filter. It keeps
    the frequencies whose indices lie within `filter_ratio` times the shorter side of the middle, in Euclidean distance;
    those at a distance of exactly a tenth of the shorter side (rounded down) count twice, as in the official code. What
    attention and MLPs have beside matrices, biases, adds its task vectors unfiltered; other tensors stay the base's.

    This is FR-Merging, the one model. The FREE of the paper adds an expert of the 1 % largest entries for each task,
    and a router that chooses among them while the model runs: no checkpoint, and not here.

    Formula:
        F(τ) = Re ifft2(fft2(τ) ⊙ m), m = [d ≤ max(r, s)] + [d = s ≤ r]
        r = filter_ratio · min(M, N), s = ⌊min(M, N) / 10⌋
        d(i, j) = the distance of (i, j) to (⌊M / 2⌋, ⌊N / 2⌋)
        aₜ = the largest mean |F(τₛ)| of all s over that of t; 1 without with_align
        θ₀ + scale · Σₜ aₜ F(τₜ)
    Parameters:
        scale: what the sum is multiplied by: 0.7 for 8 tasks, 0.15 for 30 in the official code
        filter_ratio: the radius of what is kept, in shorter sides
        with_align: bring the task vectors of a tensor to the mean magnitude of the largest
    Spectral work:
        a Fourier transform of every matrix and expert, and back; of their sum alone without with_align
    Trap:
        The radius ignores the aspect ratio. Of a square matrix 0.7 keeps all but the corners (0.9998 of 768 x 768),
        of packed attention 2304 x 768 it keeps 0.42, of MLPs 3072 x 768 0.32: the same model merges in another way
        with its attention packed or not, and unpacked square weights are not filtered at all. The order of rows and
        columns, which means nothing to a model, decides what a frequency is.
    """
    if not with_align:
        return _filtered(weighted_sum(x.experts).sub_(x.reference, alpha=len(x.experts)), filter_ratio)
    parts = [_filtered(directions.task_vector(x, t), filter_ratio) for t in range(len(x.experts))]
    return weighted_sum(parts, _aligned([float(part.abs().sum()) for part in parts]))


def _aligned(sizes: Sequence[float]) -> list[float]:
    """What brings each size to the largest; 1 for one that is 0."""
    return [max(sizes) / size if size else 1.0 for size in sizes]


def _filtered(tau_MN: Tensor, ratio: float) -> Tensor:
    """F of a matrix: (M, N)."""
    rows, columns = tau_MN.shape
    place_M, place_N = (torch.arange(side, device=tau_MN.device) for side in (rows, columns))

    def kept(place_M: Tensor, place_N: Tensor) -> Tensor:
        distance_MN = (place_M[:, None] - rows // 2).square() + (place_N - columns // 2).square()
        distance_MN = distance_MN.double().sqrt()
        inner, outer = min(rows, columns) // 10, ratio * min(rows, columns)
        return (distance_MN <= max(inner, outer)).double().add_((distance_MN == inner) & (inner <= outer))

    # The real part of what a mask lets through is what the mean of it and its mirror image lets through, which is even:
    # half of the frequencies are enough.
    half_N = place_N[: columns // 2 + 1]
    mask_MN = (kept(place_M, half_N) + kept(-place_M % rows, -half_N % columns)).div_(2)
    return torch.fft.irfft2(torch.fft.rfft2(tau_MN).mul_(mask_MN), s=(rows, columns))
