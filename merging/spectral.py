"""Spectral pieces of merges, in float64: leading directions, projections, polar factors.

Shape suffixes: M rows out, N columns in, R = min(M, N) the smaller side, K kept directions. The Gram matrix of the
smaller side in float64 is as exact as a float64 SVD for leading directions and polar factors at a fraction of its
cost; in float32 it would lose up to 13 % of a merge. On the CPU the steps are SciPy's (OpenBLAS) BLAS and LAPACK, on
an accelerator torch's. Who calls them limits BLAS to one thread (`merging.engine.one_thread`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Sequence

from merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from merging.slots import Slot

_GPU_BLOCK = 256  # columns of a block of a Gram matrix on an accelerator
_SMALL = 128  # sides below it are decomposed whole
_DEFECT = 1e-11  # accepted residual (of the largest eigenvalue) and loss of orthogonality of an eigenvector
_SINGULAR = 1e-13  # an eigenvalue of a Gram matrix, relative to its largest, too small for an inverse root


# ---------------------------------------------------------------------------------------------- of slots


def directions(x: Slot, t: int, tau_MN: Tensor, reference: Any, rank: int | None) -> tuple[Tensor, Tensor]:
    """Squared singular values (L,) and singular vectors (R, L) of the smaller side of expert t's task vector.

    The `rank` leading ones or more (None: all): L is one of three shares of R, so that nearby ranks find the very same
    vectors. They are kept for the other points of a sweep and in the factor store. `reference` says, as JSON values,
    what the task vector was measured from.
    """
    side = min(tau_MN.shape)
    count = next(
        (side // n for n in (8, 4) if side >= _SMALL and rank is not None and rank <= side // n), side
    )

    def make() -> dict[str, Tensor]:
        energy_L, q_RL = leading(gram(tau_MN), count)
        return {"energy": energy_L, "vectors": q_RL}

    def recall() -> dict[str, Tensor]:
        store = x.view.source.store
        return (
            store.recall({"directions": count, **_dependencies(x, t, reference)}, make) if store else make()
        )

    found = x.remember(("directions", count, t, str(reference)), recall)
    return found["energy"].to(tau_MN.device), found["vectors"].to(tau_MN.device)


def _dependencies(x: Slot, t: int, reference: Any) -> dict[str, Any]:
    """The digests of everything that the task vector of expert t depends on."""
    source, name = x.view.source, x.name
    own = source.digest(source.experts[t], name)
    if reference == "pretrained":
        return {"reference": reference, "expert": own, "base": source.digest("base", name)}
    base = source.digest("base", name) if reference != "mean" and source.has_base else None
    others = [source.digest(expert, name) for expert in source.experts]
    return {"reference": reference, "expert": own, "experts": others, "base": base}


# ---------------------------------------------------------------------------------------------- low rank


def gram(a_MN: Tensor) -> Tensor:
    """Gram matrix of the smaller side, (R, R) float64; only its lower triangle is valid."""
    a_MR = a_MN.double() if a_MN.shape[0] >= a_MN.shape[1] else a_MN.double().T
    if a_MR.device.type == "cpu":
        from scipy.linalg import blas

        if a_MR.is_contiguous():
            return torch.from_numpy(blas.dsyrk(1.0, a_MR.numpy().T, trans=0, lower=1))
        return torch.from_numpy(blas.dsyrk(1.0, a_MR.numpy(), trans=1, lower=1))
    side = a_MR.shape[1]
    gram_RR = a_MR.new_zeros(side, side)
    for start in range(0, side, _GPU_BLOCK):
        stop = start + _GPU_BLOCK
        gram_RR[start:stop, :stop] = a_MR[:, start:stop].T @ a_MR[:, :stop]
    return gram_RR


def leading(gram_RR: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k leading eigenpairs of a symmetric float64 matrix: (K,), descending, and (R, K).

    Reads the lower triangle. Up to k = R/3 on the CPU: reduction to tridiagonal form, all eigenvalues, inverse
    iteration for k of them, back-transformation of these k (LAPACK Users' Guide, 3rd ed., section 2.4.4). As exact as
    the full decomposition, which answers if a check fails.
    """
    side = gram_RR.shape[0]
    if gram_RR.device.type == "cpu" and side >= _SMALL and 0 < 3 * k <= side:
        pairs = _by_inverse_iteration(gram_RR, k)
        if pairs is not None:
            return pairs
    energy_R, q_RR = eigenpairs(gram_RR)
    return energy_R[side - k :].flip(0).clamp(min=0), q_RR[:, side - k :].flip(1)


def _by_inverse_iteration(gram_RR: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """`leading` on the CPU; None if the eigenvectors are not certified."""
    from scipy.linalg import lapack

    side = gram_RR.shape[0]
    reflectors_RR, diagonal_R, beside, tau, _ = lapack.dsytrd(gram_RR.numpy(), lower=1, lwork=64 * side)
    scale = abs(diagonal_R).max() + 2 * abs(beside).max()
    if not 0 < scale < float("inf"):
        return None
    energy_R, failed = lapack.dsterf(diagonal_R, beside)
    energy_K = energy_R[side - k :]
    one_block = [1] * k + [0] * (side - k), [side] + [0] * (side - 1)
    q_RK, astray = lapack.dstein(diagonal_R, beside, energy_K, *one_block)
    residual_RK = (diagonal_R[:, None] - energy_K) * q_RK
    residual_RK[1:] += beside[:, None] * q_RK[:-1]
    residual_RK[:-1] += beside[:, None] * q_RK[1:]
    overlap_KK = q_RK.T @ q_RK
    overlap_KK[range(k), range(k)] -= 1
    exact = abs(residual_RK).max() <= _DEFECT * scale and abs(overlap_KK).max() <= _DEFECT  # False with NaN
    if failed or astray or not exact:
        return None
    q_RK[1:], _, _ = lapack.dormqr("L", "N", reflectors_RR[1:, :-1], tau, q_RK[1:], 64 * k + 65 * 64)
    return torch.from_numpy(energy_K[::-1].copy()).clamp_(min=0), torch.from_numpy(q_RK[:, ::-1].copy())


def eigenpairs(gram_RR: Tensor) -> tuple[Tensor, Tensor]:
    """All eigenpairs, ascending, of a symmetric float64 matrix, of which the lower triangle is read."""
    if gram_RR.device.type != "cpu":
        return torch.linalg.eigh(gram_RR)
    from scipy.linalg import eigh

    energy_R, q_RR = eigh(gram_RR.numpy(), driver="evd", check_finite=False)
    return torch.from_numpy(energy_R), torch.from_numpy(q_RR)


def add_projection(total_MN: Tensor, a_MN: Tensor, q_RK: Tensor) -> Tensor:
    """total += the part of `a` inside the span of `q`, singular vectors of its smaller side: P_k(a)."""
    dtype = total_MN.dtype
    if a_MN.shape[0] < a_MN.shape[1]:
        return total_MN.addmm_(q_RK.to(dtype), (q_RK.T @ a_MN).to(dtype))
    return total_MN.addmm_((a_MN @ q_RK).to(dtype), q_RK.T.to(dtype))


def triplets(a_MN: Tensor, q_RK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (M, K), s (K,), V (N, K) of `a` from the K leading singular vectors of its smaller side."""
    if a_MN.shape[0] < a_MN.shape[1]:
        v, s, u = triplets(a_MN.T, q_RK)
        return u, s, v
    us = a_MN @ q_RK
    s = us.norm(dim=0)
    return us / s.clamp(min=torch.finfo(s.dtype).tiny), s, q_RK


def rank_of(fraction: float, shape: Sequence[int]) -> int:
    """max(1, int(fraction * min(M, N))), truncated in double precision as the official CART code does."""
    return max(1, int(fraction * min(shape)))


def rank_for_energy(energy_R: Tensor, share: float) -> int:
    """The smallest rank whose squared singular values hold `share` of their sum."""
    held = energy_R.cumsum(0) / energy_R.sum().clamp(min=torch.finfo(energy_R.dtype).tiny)
    return min(int((held < share).sum()) + 1, len(energy_R))


# ---------------------------------------------------------------------------------------------- polar factors


def polar(a_MN: Tensor) -> Tensor:
    """The matrix with orthonormal columns (rows, where M < N) nearest to a float64 matrix of full rank.

    A (A^T A)^(-1/2); from the singular vectors where A is too close to singular for that.
    """
    if a_MN.shape[0] < a_MN.shape[1]:
        return polar(a_MN.T).T
    energy_N, q_NN = eigenpairs(gram(a_MN))
    if not energy_N[0] > _SINGULAR * energy_N[-1]:
        u_MN, _, vt_NN = torch.linalg.svd(a_MN, full_matrices=False)
        return u_MN @ vt_NN
    return a_MN @ _outer(q_NN * energy_N**-0.25)


def partial_polar(a_MN: Tensor) -> Tensor:
    """U V^T over the singular vectors of a float64 matrix whose singular values are not numerically zero."""
    if a_MN.shape[0] < a_MN.shape[1]:
        return partial_polar(a_MN.T).T
    energy_N, q_NN = eigenpairs(gram(a_MN))
    eps = torch.finfo(torch.float64).eps
    kept_N = energy_N > len(energy_N) * eps * energy_N[-1].clamp(min=torch.finfo(torch.float64).tiny)
    root_N = torch.where(kept_N, energy_N.clamp(min=torch.finfo(torch.float64).tiny) ** -0.25, 0.0)
    return a_MN @ _outer(q_NN * root_N)


def _outer(y_NN: Tensor) -> Tensor:
    """Y Y^T."""
    lower_NN = gram(y_NN.T)
    return lower_NN.tril() + lower_NN.tril(-1).T


def orthogonal_sum(factors: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """TSV-M's sum: polar(U) diag(s) polar(V)^T of the concatenated factors U (M, K), s (K,), V (N, K) (2412.00081)."""
    u, s, v = (torch.cat(parts, dim=-1) for parts in zip(*factors))
    return (polar(u) * s) @ polar(v).T
