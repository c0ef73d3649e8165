"""Spectral pieces of merges, in float64: leading directions, projections, polar factors.

Shape suffixes: M rows out, N columns in, R = min(M, N) the smaller side, K kept directions. The Gram matrix of the
smaller side in float64 is as exact as a float64 SVD for leading directions and polar factors at a fraction of its
cost; in float32 it would lose up to 13 % of a merge. On the CPU the steps are SciPy's (OpenBLAS) BLAS and LAPACK, on
an accelerator torch's. Who calls them limits BLAS to one thread (`merging.engine.one_thread`).
"""

from __future__ import annotations

from math import acosh, pi
from typing import TYPE_CHECKING, Any, Iterable, Iterator, Sequence

from merging.lazy import torch
from merging.operators import descend, on_cpu

if TYPE_CHECKING:
    from torch import Tensor

    from merging.slots import Slot

_GPU_BLOCK = 256  # columns of a block of a Gram matrix on an accelerator
_BATCH_BYTES = 1 << 31  # float64 task vectors that an accelerator decomposes at once
_STEPS = 40  # of Newton-Schulz, after which a matrix is too close to singular for it
_SMALL = 128  # sides below it are decomposed whole
_DEFECT = 1e-11  # accepted residual (of the largest eigenvalue) and loss of orthogonality of an eigenvector
_FILTERS = 60  # cycles after which an iteration that does not converge is given up
_TINY = 2.0**-1022  # the smallest normal float64
_SINGULAR = 1e-13  # an eigenvalue of a Gram matrix, relative to its largest, too small for an inverse root


# ---------------------------------------------------------------------------------------------- of slots


def task_vector(x: Slot, t: int, start_MN: Tensor) -> Tensor:
    """Expert t minus what task vectors are measured from: (M, N) float64."""
    return x.experts[t].to(torch.float64, copy=True).sub_(start_MN)


def directions(
    x: Slot, t: int, start_MN: Tensor, tau_MN: Tensor, reference: Any, rank: int | None
) -> tuple[Tensor, Tensor]:
    """Squared singular values (L,) and singular vectors (R, L) of the smaller side of tau, expert t minus start.

    The `rank` leading ones or more (None: all), see `_count`. They are kept in the factor store, if there is one.
    `reference` says, as JSON values, what the task vector was measured from.
    """
    count = _count(x, rank)

    def make() -> dict[str, Tensor]:
        if on_cpu(tau_MN):
            energy_L, q_RL = leading(gram(tau_MN), count)
        else:
            energy_L, q_RL = _among_equals(x, t, start_MN, reference, count)
        return {"energy": energy_L, "vectors": q_RL}

    key = None if x.store is None else _dependencies(x, t, reference)
    found = make() if key is None else x.store.recall({"directions": count, **key}, make)
    return found["energy"].to(tau_MN.device), found["vectors"].to(tau_MN.device)


def _among_equals(x: Slot, t: int, start_MN: Tensor, reference: Any, count: int) -> tuple[Tensor, Tensor]:
    """`directions` on an accelerator, which decomposes the task vectors of several experts, equal in shape, at once."""
    size = max(1, min(len(x.experts), _BATCH_BYTES // (8 * x.elements)))
    first = t // size * size

    def make() -> tuple[Tensor, Tensor]:
        batch = range(first, min(first + size, len(x.experts)))
        return leading(gram(torch.stack([task_vector(x, i, start_MN) for i in batch])), count)

    energy_TL, q_TRL = x.remember(("directions", count, str(reference), first), make)
    return energy_TL[t - first], q_TRL[t - first]


def factors(
    x: Slot, t: int, start_MN: Tensor, reference: Any, rank: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared singular values (L,), and factors (M, L) and (N, L) whose product is the task vector's leading part.

    The product of their first k columns is P_k of it. Points of a sweep share them.
    """

    def make() -> tuple[Tensor, Tensor, Tensor]:
        tau_MN = task_vector(x, t, start_MN)
        energy_L, q_RL = directions(x, t, start_MN, tau_MN, reference, rank)
        left_ML, right_NL = projected(tau_MN, q_RL)
        return energy_L, left_ML.to(dtype), right_NL.to(dtype)

    return x.share(("factors", _count(x, rank), t, str(reference), dtype), make)


def leading_triplets(
    x: Slot, t: int, start_MN: Tensor, tau_MN: Tensor, reference: Any, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """U (M, K), s (K,), V (N, K): the k leading singular triplets of tau, expert t minus start, but for mere noise."""
    energy_L, q_RL = directions(x, t, start_MN, tau_MN, reference, k)
    kept = min(k, int(above_noise(energy_L, energy_L.sum()).sum()))
    return triplets(tau_MN, q_RL[:, :kept])


def triplets_of_tasks(x: Slot, base_MN: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """`leading_triplets` of every expert's task vector."""
    for t in range(len(x.experts)):
        yield leading_triplets(x, t, base_MN, task_vector(x, t, base_MN), "pretrained", k)


def common_directions(x: Slot, start_MN: Tensor, reference: Any) -> tuple[Tensor, Tensor]:
    """Squared singular values (K,), descending, and left singular vectors (M, K) of all task vectors side by side.

    Those that are more than noise. Kept in the factor store, if there is one; see `directions`.
    """

    def make() -> dict[str, Tensor]:
        taus = (task_vector(x, t, start_MN) for t in range(len(x.experts)))
        energy_M, q_MM = leading(sum(inner(tau_MN.T) for tau_MN in taus), x.shape[0])
        kept_M = above_noise(energy_M, energy_M.sum())
        return {"energy": energy_M[kept_M], "vectors": q_MM[:, kept_M]}

    key = {"common directions": [], **_dependencies(x, 0, [reference])}
    found = make() if x.store is None else x.store.recall(key, make)
    return found["energy"].to(start_MN.device), found["vectors"].to(start_MN.device)


def rank_for_task(rank: float | str, x: Slot) -> int:
    """`rank_of`, or for `1/T` an even share of the directions, which may be none: int(min(M, N) * (1 / T))."""
    return int(min(x.shape) * (1 / len(x.experts))) if rank == "1/T" else rank_of(rank, x.shape)


def _count(x: Slot, rank: int | None) -> int:
    """How many directions are computed for a rank: one of three shares of R, so that nearby ranks find the same."""
    side = min(x.shape)
    return next(
        (side // n for n in (8, 4) if side >= _SMALL and rank is not None and rank <= side // n), side
    )


def _dependencies(x: Slot, t: int, reference: Any) -> dict[str, Any] | None:
    """The shape, and the digests of everything that the task vector of expert t depends on; None if unknown."""
    source, name = x.view.source, x.name
    if x.reference is None or x.changes is None:
        return None
    if reference == "pretrained":
        reference = x.reference
    elif reference != "mean" and x.reference != "pretrained":
        reference = [reference, x.reference]
    own = {"shape": x.shape, "reference": reference, "expert": source.digest(source.experts[t], name)}
    if x.changes:  # they may be drawn
        own |= {"changes": x.changes, "seed": source.seed, "number": t, "tensor": name}
        own |= {"names": list(source.experts)}
    elif reference == "pretrained":
        return own | {"base": source.digest("base", name)}
    base = None
    if source.has_base and (x.changes or reference != "mean"):
        base = source.digest("base", name)
    others = [source.digest(expert, name) for expert in source.experts]
    return own | {"experts": others, "base": base}


def weighted_factors(x: Slot, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Factors (M, K) and (K, N) of the weighted sum of what experts, all adapters, add; K the sum of their ranks."""
    lefts, rights = zip(*(x.factors(t) for t in range(len(x.experts))))
    return torch.cat([weight * left_MR for weight, left_MR in zip(weights, lefts)], dim=1), torch.cat(rights)


# ---------------------------------------------------------------------------------------------- low rank


def gram(a_MN: Tensor) -> Tensor:
    """Gram matrix of the smaller side, (R, R) float64; only its lower triangle is valid. (T, M, N) gives (T, R, R)."""
    return inner(a_MN if a_MN.shape[-2] >= a_MN.shape[-1] else a_MN.mT)


def inner(a_MN: Tensor) -> Tensor:
    """A^T A, (N, N) float64; only its lower triangle is valid. (T, M, N) gives (T, N, N)."""
    a_MN = a_MN.double()
    if on_cpu(a_MN):
        from scipy.linalg import blas

        if a_MN.is_contiguous():
            return torch.from_numpy(blas.dsyrk(1.0, a_MN.numpy().T, trans=0, lower=1))
        return torch.from_numpy(blas.dsyrk(1.0, a_MN.numpy(), trans=1, lower=1))
    side = a_MN.shape[-1]
    inner_NN = a_MN.new_zeros(*a_MN.shape[:-2], side, side)
    for start in range(0, side, _GPU_BLOCK):
        stop = start + _GPU_BLOCK
        inner_NN[..., start:stop, :stop] = a_MN[..., start:stop].mT @ a_MN[..., :stop]
    return inner_NN


def mirrored(lower_NN: Tensor) -> Tensor:
    """The symmetric matrix of a lower triangle, in its place."""
    return lower_NN.tril_().add_(lower_NN.tril(-1).T)


def leading(gram_RR: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k leading eigenpairs of a symmetric float64 matrix: (K,), descending, and (R, K); on an accelerator, of many.

    Reads the lower triangle. Up to k = R/3 without the full decomposition, but as exact: on the CPU by reduction to
    tridiagonal form, all eigenvalues, inverse iteration for k of them and back-transformation of these k (LAPACK
    Users' Guide, 3rd ed., section 2.4.4); on an accelerator by products of matrices alone. Where their own checks fail,
    the full decomposition answers.
    """
    side = gram_RR.shape[-1]
    if side >= _SMALL and 0 < 3 * k <= side:
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


def dct(a_MN: Tensor, inverse: bool = False) -> Tensor:
    """The orthonormal DCT-II of each row of a float64 matrix, or what it undoes: (M, N)."""
    if on_cpu(a_MN):
        from scipy import fft

        return torch.from_numpy((fft.idct if inverse else fft.dct)(a_MN.numpy(), norm="ortho"))
    place_N = torch.arange(a_MN.shape[1], dtype=a_MN.dtype, device=a_MN.device)
    basis_NN = torch.cos(pi / len(place_N) * (place_N[:, None] + 0.5) * place_N) * (2 / len(place_N)) ** 0.5
    basis_NN[:, 0] /= 2**0.5
    return a_MN @ (basis_NN.T if inverse else basis_NN)


def rank_of(fraction: float, shape: Sequence[int], rounding: str = "floor") -> int:
    """max(1, int(fraction * min(M, N))), truncated in double precision as the official CART code does.

    `ceil` rounds up, from a thousandth on, as the official SWUDI code does.
    """
    return max(1, int(fraction * min(shape) + (0.999 if rounding == "ceil" else 0)))


def rank_for_energy(energy_R: Tensor, share: float) -> int:
    """The smallest rank whose squared singular values hold `share` of their sum."""
    held = energy_R.cumsum(0) / energy_R.sum().clamp(min=torch.finfo(energy_R.dtype).tiny)
    return min(int((held < share).sum()) + 1, len(energy_R))


# ---------------------------------------------------------------------------------------------- polar factors


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
    return a_MN @ _outer(q_NN * energy_N**-0.25)


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
    return a_MN @ _outer(q_NN * root_N)


def evened(a_MN: Tensor) -> Tensor:
    """A float64 matrix whose singular values, but those that are numerically zero, are all at the mean of min(M, N)."""
    polar_MN = partial_polar(a_MN)
    return polar_MN.mul_((polar_MN * a_MN).sum() / min(a_MN.shape))


def above_noise(energy_L: Tensor, of: Tensor) -> Tensor:
    """Which eigenvalues of a Gram matrix of norm `of` are more than its rounding: (L,) bool."""
    return energy_L > len(energy_L) * torch.finfo(torch.float64).eps * of.clamp(min=_TINY)


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
    factor_N = torch.where(above_noise(energy_N, energy_N[0]), least / value_N.clamp(min=_TINY), 1.0).clamp(min=1)
    return a_MN @ _outer(q_NN * factor_N.sqrt())


def raised_to(a_MN: Tensor, power: float) -> Tensor:
    """A float64 matrix with its singular values raised to a power, and the norm that it had.

    Those that are numerically zero stay so.
    """
    u_MK, s_K, v_NK = singular_triplets(a_MN)
    raised_K = s_K**power
    return (u_MK * (raised_K * (s_K.norm() / raised_K.norm().clamp(min=_TINY)))) @ v_NK.T


def _outer(y_NN: Tensor) -> Tensor:
    """Y Y^T."""
    return mirrored(inner(y_NN.T))


def orthogonal_sum(factors: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """TSV-M's sum: polar(U) diag(s) polar(V)^T of the concatenated factors U (M, K), s (K,), V (N, K) (2412.00081)."""
    us, ss, vs = (list(parts) for parts in zip(*factors))
    u, s, v = torch.cat(us, dim=-1), torch.cat(ss), torch.cat(vs, dim=-1)
    del us, vs  # as large again as what they were made into
    return polar(u).mul_(s) @ polar(v).T


# ---------------------------------------------------------------------------------------------- least interference


def interference(
    start_MN: Tensor, terms: Iterable[tuple[Tensor, Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Curvature C (N, N) and slope G (M, N) of WUDI's loss (2503.08099) at a float64 start: d -> 2 (d C + G).

    The loss of a merged task vector W is the sum over terms (target (M, N), rows (L, N), size) of
    |(W - target) rows^T|^2 / size; terms of size 0 say nothing. It is quadratic: C is the sum of rows^T rows / size, G
    of (start - target) rows^T rows / size, and the gradient at start + d is 2 (d C + G).
    """
    slope_MN = torch.zeros_like(start_MN)
    curvature_NN = start_MN.new_zeros(start_MN.shape[1], start_MN.shape[1])
    for target_MN, rows_LN, size in terms:
        if not size > 0:
            continue
        apart_MN, inner_NN = (start_MN - target_MN).div_(size), inner(rows_LN)
        if rows_LN.shape[0] < rows_LN.shape[1]:
            slope_MN.addmm_(apart_MN @ rows_LN.T, rows_LN)
        else:
            slope_MN.addmm_(apart_MN, mirrored(inner_NN))
        curvature_NN.add_(inner_NN.div_(size))
    return mirrored(curvature_NN), slope_MN


def interference_of_tasks(x: Slot, base_MN: Tensor, start_MN: Tensor) -> tuple[Tensor, Tensor]:
    """`interference` where every task vector is the target, the rows and, as its squared norm, the size of a term."""
    taus = (task_vector(x, t, base_MN) for t in range(len(x.experts)))
    return interference(start_MN, ((tau_MN, tau_MN, tau_MN.square().sum()) for tau_MN in taus))


def descended(curvature_NN: Tensor, slope_MN: Tensor, dtype: torch.dtype, **optimizer: Any) -> Tensor:
    """The displacement by which an optimiser (see `operators.descend`) lowers a loss of this curvature and slope.

    Each step is one product of matrices, in `dtype`; the slope at the start, in which task vectors cancel, is exact.
    """
    curvature_NN, slope_MN = curvature_NN.to(dtype), slope_MN.to(dtype)
    return descend(
        lambda at_MN: torch.addmm(slope_MN, at_MN, curvature_NN).mul_(2), slope_MN, **optimizer
    ).double()


def damped_minimum(curvature_NN: Tensor, slope_MN: Tensor, damping: float) -> Tensor:
    """The displacement to the minimum of such a loss plus damping * (mean eigenvalue of C) * |displacement|^2."""
    added = damping * curvature_NN.diagonal().mean()
    if not added > 0:
        return torch.zeros_like(slope_MN)
    curvature_NN.diagonal().add_(added)
    if on_cpu(slope_MN):
        from scipy.linalg import cho_factor, cho_solve

        factor = cho_factor(curvature_NN.numpy(), lower=True, overwrite_a=True, check_finite=False)
        return torch.from_numpy(-cho_solve(factor, slope_MN.numpy().T, check_finite=False).T)
    return -torch.cholesky_solve(slope_MN.T, torch.linalg.cholesky(curvature_NN)).T
