"""The algebra that methods are composed of: pure functions on stacked tensors.

Shape suffixes: T experts, M rows out, N columns in, K kept directions; `_TX` is T stacked tensors of any shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Iterable, Sequence

from merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


# ---------------------------------------------------------------------------------------------- combining


def mean(x_TX: Tensor) -> Tensor:
    """Mean over experts, accumulated in float64: copies of one tensor give back that tensor, bit for bit."""
    return x_TX.sum(0, dtype=torch.float64) / len(x_TX)


def weighted_sum(x_TX: Tensor, weights: Sequence[float] | None) -> Tensor:
    """Sum over experts of weight x tensor in float64; `None` means weight 1 for all."""
    if weights is None:
        return x_TX.sum(0, dtype=torch.float64)
    w_T = torch.tensor(weights, dtype=torch.float64, device=x_TX.device)
    return torch.einsum("t,t...->...", w_T, x_TX.double())


def elect_signs(x_TX: Tensor, zero: float) -> Tensor:
    """Sign of the sum over experts, `zero` where they cancel (TIES, 2306.01708)."""
    sign = x_TX.sum(0).sign()
    return torch.where(sign == 0, torch.full_like(sign, zero), sign)


def disjoint_merge(x_TX: Tensor, reduce: str) -> Tensor:
    """Merge the non-zero entries of each position: their `mean`, `sum`, or the one of `max` magnitude."""
    if reduce == "max":
        return x_TX.gather(0, x_TX.abs().argmax(0, keepdim=True))[0]
    total = x_TX.sum(0)
    return total / (x_TX != 0).sum(0).clamp(min=1) if reduce == "mean" else total


# ---------------------------------------------------------------------------------------------- sparsifying


def magnitudes(x_TX: Tensor) -> Tensor:
    """|x| in float32, one row an expert: (T, numel)."""
    return x_TX.reshape(len(x_TX), -1).float().abs()


def kth_magnitudes(stream: Callable[[], Iterable[Tensor]], kth: int) -> Tensor:
    """Per expert, the `kth` smallest (from 1) float32 magnitude over all tensors of a stream.

    Exact, without a sort and without holding the stream: the bits of a non-negative float32 order like an integer,
    so one histogram of their upper half finds the bin and a second, of the lower half, the value. `stream` is called
    twice and yields stacks (T, ...) of task vectors; returns (T,) float32.
    """
    upper = _histogram(stream, lambda bits, _: bits >> 16, 1 << 15)
    bin_T, before_T = _locate(upper, torch.full((len(upper),), kth))
    lower = _histogram(stream, lambda bits, t: bits[bits >> 16 == bin_T[t]] & 0xFFFF, 1 << 16)
    low_T, _ = _locate(lower, kth - before_T)
    return ((bin_T << 16) | low_T).to(torch.int32).view(torch.float32)


def _histogram(
    stream: Callable[[], Iterable[Tensor]], key: Callable[[Tensor, int], Tensor], bins: int
) -> Tensor:
    counts: list[Tensor] = []
    for x_TX in stream():
        rows = magnitudes(x_TX).view(torch.int32)
        new = [torch.bincount(key(row, t), minlength=bins) for t, row in enumerate(rows)]
        counts = [a + b for a, b in zip(counts, new)] if counts else new
    return torch.stack(counts)


def _locate(counts: Tensor, kth_T: Tensor) -> tuple[Tensor, Tensor]:
    """Per row, the bin that holds the kth entry and how many entries lie before that bin."""
    total = counts.cumsum(1)
    bin_T = torch.searchsorted(total, kth_T[:, None].contiguous())[:, 0]
    return bin_T, total.gather(1, bin_T[:, None])[:, 0] - counts.gather(1, bin_T[:, None])[:, 0]


def keep_at_least(x_TX: Tensor, threshold_T: Tensor) -> Tensor:
    """Zero the entries whose magnitude is below their expert's threshold; equals are kept."""
    keep = magnitudes(x_TX) >= threshold_T[:, None].to(x_TX.device)
    return x_TX * keep.reshape(x_TX.shape)


def keep_largest(x_TX: Tensor, density: float) -> Tensor:
    """Keep exactly max(1, int(density * numel)) entries of largest magnitude of each expert's tensor."""
    flat = x_TX.reshape(len(x_TX), -1)
    if density >= 1 or flat.shape[1] == 0:
        return x_TX
    index = flat.abs().topk(max(1, int(density * flat.shape[1])), dim=1).indices
    return torch.zeros_like(flat).scatter_(1, index, flat.gather(1, index)).reshape(x_TX.shape)


# ---------------------------------------------------------------------------------------------- spectral


def spectrum(a_MN: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values (R,), descending, and orthonormal singular vectors (R, R) of the smaller side.

    R = min(M, N). By eigendecomposition of the float64 Gram matrix of the smaller side: as exact as a float64 SVD
    for the leading directions at a fraction of its cost (in float32 the Gram matrix would lose up to 13 % of a merge).
    """
    a = a_MN.double()
    gram = a @ a.T if a.shape[0] < a.shape[1] else a.T @ a
    energy, vectors = torch.linalg.eigh(gram)
    return energy.flip(0).clamp(min=0), vectors.flip(1)


def project(a_MN: Tensor, q_RK: Tensor) -> Tensor:
    """The part of `a` inside the span of `q`, singular vectors of its smaller side: P_k(a) for the K leading ones."""
    return q_RK @ (q_RK.T @ a_MN) if a_MN.shape[0] < a_MN.shape[1] else (a_MN @ q_RK) @ q_RK.T


def rank_of(fraction: float, shape: Sequence[int]) -> int:
    """max(1, int(fraction * min(M, N))), truncated in double precision as the official CART code does."""
    return max(1, int(fraction * min(shape)))


def rank_for_energy(energy_R: Tensor, share: float) -> int:
    """The smallest rank whose squared singular values hold `share` of their sum."""
    held = energy_R.cumsum(0) / energy_R.sum().clamp(min=torch.finfo(energy_R.dtype).tiny)
    return min(int((held < share).sum()) + 1, len(energy_R))


def polar(x_MK: Tensor) -> Tensor:
    """The orthogonal polar factor U V^T of a float64 matrix.

    By the eigendecomposition of the smaller Gram matrix; where that is numerically singular, by SVD.
    """
    if x_MK.shape[0] < x_MK.shape[1]:
        return polar(x_MK.T).T
    w_K, q_KK = torch.linalg.eigh(x_MK.T @ x_MK)
    if w_K[0] <= 1e-13 * w_K[-1]:
        u, _, vh = torch.linalg.svd(x_MK, full_matrices=False)
        return u @ vh
    return x_MK @ ((q_KK * w_K.rsqrt()) @ q_KK.T)


def orthogonal_sum(factors: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """TSV-M's sum: polar(U) diag(s) polar(V)^T of the concatenated factors U (M, K), s (K,), V (N, K) (2412.00081)."""
    u, s, v = (torch.cat(parts, dim=-1) for parts in zip(*factors))
    return (polar(u) * s) @ polar(v).T


def leading_triplets(a_MN: Tensor, q_RK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (M, K), s (K,), V (N, K) of `a` from the K leading singular vectors of its smaller side."""
    if a_MN.shape[0] < a_MN.shape[1]:
        v, s, u = leading_triplets(a_MN.T, q_RK)
        return u, s, v
    us = a_MN @ q_RK
    s = us.norm(dim=0)
    return us / s.clamp(min=torch.finfo(s.dtype).tiny), s, q_RK
