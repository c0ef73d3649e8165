"""Leading directions, singular triplets and polar factors of matrices, in float64.

Shape suffixes: M rows out, N columns in, R = min(M, N) the smaller side, K kept directions. The Gram matrix of the
smaller side in float64 is as exact as a float64 SVD for leading directions and polar factors at a fraction of its
cost; in float32 it would lose up to 13 % of a merge. On the CPU the steps are SciPy's (OpenBLAS) BLAS and LAPACK, on
an accelerator torch's. Who calls them limits BLAS to one thread (`merging.engine.machine.one_thread`).
"""

from __future__ import annotations

from math import acosh
from typing import TYPE_CHECKING, Callable, Iterable

from mergeline.merging.algebra.device import on_cpu
from mergeline.merging.algebra.linear import gram, outer
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_STEPS = 40  # of Newton-Schulz, after which a matrix is too close to singular for it
SMALL = 128  # sides below it are decomposed whole
_DEFECT = 1e-11  # accepted residual (of the largest eigenvalue) and loss of orthogonality of an eigenvector
_FILTERS = 60  # cycles after which an iteration that does not converge is given up
_TINY = 2.0**-1022  # the smallest normal float64
_SINGULAR = 1e-13  # an eigenvalue of a Gram matrix, relative to its largest, too small for an inverse root


def leading(gram_RR: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k leading eigenpairs of a symmetric float64 matrix: (K,), descending, and (R, K); on an accelerator, of many.

    Reads the lower triangle. Up to k = R/3 without the full decomposition, but as exact: on the CPU by reduction to
    tridiagonal form, all eigenvalues, inverse iteration for k of them and back-transformation of these k (LAPACK
    Users' Guide, 3rd ed., section 2.4.4); on an accelerator by products of matrices alone. Where their own checks fail,
    the full decomposition answers.
    """
    side = gram_RR.shape[-1]
    if side >= SMALL and 0 < 3 * k <= side:
        pairs = (_by_inverse_iteration if on_cpu(gram_RR) else _by_filtering)(gram_RR, k)
        if pairs is not None:
            return pairs
    energy_R, q_RR = eigenpairs(gram_RR)
    return energy_R[..., side - k :].flip(-1).clamp(min=0), q_RR[..., side - k :].flip(-1).contiguous()


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
    # In torch's own memory: the last bits of a product can depend on how its factors are aligned.
    return torch.from_numpy(energy_K).flip(0).clamp_(min=0), torch.from_numpy(q_RK).flip(1).contiguous()


def _by_filtering(gram_RR: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """`leading` by subspace iteration with Chebyshev filters (Zhou & Saad 2007); None if it does not converge.

    A block of 1.6 k vectors, whose Ritz values below the kth bound what is damped, is filtered until the residual of
    the k leading ones, over their distance to the block's last, is 1e-10.
    """
    side = gram_RR.shape[-1]
    scale = gram_RR.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None]
    if not bool(((scale > 0) & scale.isfinite()).all()):
        return None
    gram_RR = (gram_RR.tril() + gram_RR.tril(-1).mT) / scale[..., None]
    width = min(side, int(1.6 * k) + 8)
    start = torch.randn(side, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_RP = _orthonormal(start.to(gram_RR.device).expand(*gram_RR.shape[:-2], side, width))
    for _ in range(_FILTERS):
        product_RP = gram_RR @ x_RP
        energy_P, turn_PP = torch.linalg.eigh(x_RP.mT @ product_RP)
        energy_P, turn_PP = energy_P.flip(-1), turn_PP.flip(-1)
        x_RP, product_RP = x_RP @ turn_PP, product_RP @ turn_PP
        top, kth, damped = (energy_P[..., i] for i in (0, k - 1, -1))
        if not bool(((damped > 0) & (damped < kth)).all()):
            return None
        residual = (product_RP - x_RP * energy_P[..., None, :])[..., :k].norm(dim=(-2, -1))
        if bool((residual <= 1e-10 * (kth - damped)).all()):
            return energy_P[..., :k] * scale, x_RP[..., :k].contiguous()
        # The degree that amplifies the first direction by no more than what Cholesky QR can undo.
        spread = float((2 * top / damped - 1).max())
        degree = max(1, min(20, int(acosh(1e7) / acosh(max(spread, 1.0001)))))
        edge = damped[..., None, None]
        before, after = x_RP, product_RP * (2 / edge) - x_RP
        for _ in range(degree - 1):
            before, after = after, (gram_RR @ after) * (4 / edge) - 2 * after - before
        x_RP = _orthonormal(after / after.norm(dim=-2, keepdim=True))
    return None


def _orthonormal(x_RP: Tensor) -> Tensor:
    """An orthonormal basis of the columns, by Cholesky QR twice (Yamamoto et al. 2015), or else by Householder."""
    for _ in range(2):
        lower_PP, failed = torch.linalg.cholesky_ex(x_RP.mT @ x_RP)
        if bool(failed.any()):
            return torch.linalg.qr(x_RP).Q
        x_RP = torch.linalg.solve_triangular(lower_PP.mT, x_RP, upper=True, left=False)
    return x_RP


def eigenpairs(gram_RR: Tensor) -> tuple[Tensor, Tensor]:
    """All eigenpairs, ascending, of a symmetric float64 matrix, of which the lower triangle is read."""
    if not on_cpu(gram_RR):
        return torch.linalg.eigh(gram_RR)
    from scipy.linalg import eigh

    energy_R, q_RR = eigh(gram_RR.numpy(), driver="evd", check_finite=False)
    return torch.from_numpy(energy_R), torch.from_numpy(q_RR)


def largest_singular_value(a_MN: Tensor) -> Tensor:
    """The spectral norm."""
    return leading(gram(a_MN), 1)[0][0].sqrt()


def projected(a_MN: Tensor, q_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (M, K) and (N, K) whose product is the part of `a` in K directions of its smaller side."""
    if a_MN.shape[0] < a_MN.shape[1]:
        return q_RK, a_MN.T @ q_RK
    return a_MN @ q_RK, q_RK


def triplets(a_MN: Tensor, q_RK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (M, K), s (K,), V (N, K) of `a` from the K leading singular vectors of its smaller side."""
    if a_MN.shape[0] < a_MN.shape[1]:
        v, s, u = triplets(a_MN.T, q_RK)
        return u, s, v
    us = a_MN @ q_RK
    s = us.norm(dim=0)
    return us / s.clamp(min=torch.finfo(s.dtype).tiny), s, q_RK


def singular_triplets(
    a_MN: Tensor, k: int | None = None, energy: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """U (M, K), s (K,), V (N, K) of the k leading (None: all) singular values that are more than noise, descending.

    energy: the square of the norm that noise is measured by, if it is not that of the matrix itself.
    """
    energy_K, q_RK = leading(gram(a_MN), min(a_MN.shape) if k is None else min(k, *a_MN.shape))
    energy = a_MN.square().sum() if energy is None else energy
    return triplets(a_MN, q_RK[:, above_noise(energy_K, energy)])


def balanced(u_MK: Tensor, s_K: Tensor, v_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (M, K) and (K, N) of U diag(s) V^T, each with the square root of s."""
    root_K = s_K.sqrt()
    return u_MK * root_K, (v_NK * root_K).T


def recompressed(left_MK: Tensor, right_KN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (M, L), s (L,), V (N, L) of the product of two float64 factors, without forming it; L = min(M, K, N)."""
    q_MK, r_KK = torch.linalg.qr(left_MK)
    p_NK, t_KK = torch.linalg.qr(right_KN.T)
    u_KL, s_L, vt_LK = torch.linalg.svd(r_KK @ t_KK.T, full_matrices=False)
    return q_MK @ u_KL, s_L, p_NK @ vt_LK.T


def above_noise(energy_L: Tensor, of: Tensor) -> Tensor:
    """Which eigenvalues of a Gram matrix of norm `of` are more than its rounding: (L,) bool."""
    return energy_L > len(energy_L) * torch.finfo(torch.float64).eps * of.clamp(min=_TINY)


def polar(a_MN: Tensor) -> Tensor:
    """The matrix with orthonormal columns (rows, where M < N) nearest to a float64 matrix of full rank.

    A (A^T A)^(-1/2), on an accelerator by products of matrices alone; from the singular vectors where A is too close
    to singular for that.
    """
    if a_MN.shape[0] < a_MN.shape[1]:
        return polar(a_MN.T).T
    if not a_MN.numel():
        return a_MN
    if not on_cpu(a_MN):
        found = _by_newton_schulz(a_MN)
        if found is not None:
            return found
    energy_N, q_NN = eigenpairs(gram(a_MN))
    if not energy_N[0] > _SINGULAR * energy_N[-1]:
        u_MN, _, vt_NN = torch.linalg.svd(a_MN, full_matrices=False)
        return u_MN @ vt_NN
    return a_MN @ outer(q_NN * energy_N**-0.25)


def _by_newton_schulz(a_MN: Tensor) -> Tensor | None:
    """`polar` by Newton-Schulz iteration (Higham 2008, chapter 8); None if it does not converge in time."""
    bound = (a_MN.abs().sum(0).max() * a_MN.abs().sum(1).max()).sqrt()  # of the largest singular value
    if not bool(bound > 0):
        return None
    p_MN = a_MN / bound
    one_NN = torch.eye(a_MN.shape[1], dtype=a_MN.dtype, device=a_MN.device)
    for _ in range(_STEPS):
        defect_NN = p_MN.mT @ p_MN - one_NN
        p_MN = p_MN - 0.5 * (p_MN @ defect_NN)
        if float(defect_NN.norm()) < 1e-7:  # squared by the step just taken
            return p_MN
    return None


def partial_polar(a_MN: Tensor) -> Tensor:
    """U V^T over the singular vectors of a float64 matrix whose singular values are not numerically zero."""
    if a_MN.shape[0] < a_MN.shape[1]:
        return partial_polar(a_MN.T).T
    if not a_MN.numel():
        return a_MN
    energy_N, q_NN = eigenpairs(gram(a_MN))
    root_N = torch.where(above_noise(energy_N, energy_N[-1]), energy_N.clamp(min=_TINY) ** -0.25, 0.0)
    return a_MN @ outer(q_NN * root_N)


def evened(a_MN: Tensor) -> Tensor:
    """A float64 matrix whose singular values, but those that are numerically zero, are all at the mean of min(M, N)."""
    polar_MN = partial_polar(a_MN)
    return polar_MN.mul_((polar_MN * a_MN).sum() / min(a_MN.shape))


def raised(a_MN: Tensor, share: float) -> Tensor:
    """A float64 matrix whose singular values are raised to the one with which the largest hold `share` of their sum.

    Those that are numerically zero stay so.
    """
    if a_MN.shape[0] < a_MN.shape[1]:
        return raised(a_MN.T, share).T
    energy_N, q_NN = leading(gram(a_MN), a_MN.shape[1])
    value_N = energy_N.sqrt()
    held_N = value_N.cumsum(0) / value_N.sum().clamp(min=_TINY)
    least = value_N[min(int((held_N < share).sum()), len(value_N) - 1)]
    factor_N = torch.where(above_noise(energy_N, energy_N[0]), least / value_N.clamp(min=_TINY), 1.0).clamp(
        min=1
    )
    return a_MN @ outer(q_NN * factor_N.sqrt())


def raised_to(a_MN: Tensor, power: float) -> Tensor:
    """A float64 matrix with its singular values raised to a power, and the norm that it had.

    Those that are numerically zero stay so.
    """
    u_MK, s_K, v_NK = singular_triplets(a_MN)
    raised_K = s_K**power
    return (u_MK * (raised_K * (s_K.norm() / raised_K.norm().clamp(min=_TINY)))) @ v_NK.T


def polar_by_gram(a_MN: Tensor) -> Tensor:
    """A (A^T A)^(-1/2) by an eigendecomposition in float32, as the official TSV code has it beside its SVD.

    What `polar` is exact to 1e-9 in, this is wrong in by percents where columns are nearly dependent.
    """
    narrow_MN = a_MN.float()
    energy_N, q_NN = torch.linalg.eigh(narrow_MN.mT @ narrow_MN)
    root_NN = (q_NN / (energy_N.abs().sqrt() + 1e-12)) @ q_NN.mT
    return (narrow_MN @ root_NN).double()


def orthogonal_sum(
    factors: Iterable[tuple[Tensor, Tensor, Tensor]], polar: Callable[[Tensor], Tensor] = polar
) -> Tensor:
    """TSV-M's sum: polar(U) diag(s) polar(V)^T of the concatenated factors U (M, K), s (K,), V (N, K) (2412.00081)."""
    us, ss, vs = (list(parts) for parts in zip(*factors))
    u, s, v = torch.cat(us, dim=-1), torch.cat(ss), torch.cat(vs, dim=-1)
    del us, vs  # as large again as what they were made into
    return polar(u).mul_(s) @ polar(v).T
