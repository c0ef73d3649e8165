"""DOP: experts merged one after the other, each step the least change of what both sides' directions carry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterator, Literal, Mapping

from mergeline.merging.algebra import decompositions, directions
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.algebra.sums import weighted_sum
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import Note, method
from mergeline.merging.methods.parameters import Rate

if TYPE_CHECKING:
    from torch import Tensor

    Triplets = tuple[Tensor, Tensor, Tensor]

Space = Literal["uv", "u", "v"]
_LEAST = 1e-12  # of the sum of curvatures: one below it says nothing


def _pointless(params: Mapping[str, Any], experts: int) -> Iterator[str]:
    if experts > 1 and params["alpha"] in (0, 1):
        kept = "first" if params["alpha"] else "last"
        yield Note(
            f"alpha {params['alpha']:g} hears only the {kept} expert in its own directions; 0.8 balances both"
        )


def _halved(x: Slot, **_: Any) -> Tensor:
    """The mean of the merge so far and the next expert, over all experts: (X)."""
    count = len(x.experts)
    shares = [0.5 ** min(count - t, count - 1) for t in range(count)]
    return weighted_sum(x.experts, shares).sub_(x.reference)


@method(
    paper="Continual Model Merging without Data: Dual Projections for Balancing Stability and Plasticity, NeurIPS 2025",
    code="tanganke/fusion_bench@54c9e8c9",
    scale=1.0,
    keys="block_linear",
    other=_halved,
    needs=("base",),
    check=_pointless,
    spectral=lambda rows, columns, experts: 16 * rows * columns + 6 * min(rows, columns) ** 2,
)
def dop(x: Slot, *, alpha: Rate = 0.8, svd_epsilon: Rate = 0.99999, svd_proj_space: Space = "uv") -> Tensor:
    """base + scale * W, folded over the experts: W has the least alpha * loss(W before) + (1 - alpha) * loss(next).

    The loss of a task vector D with the singular triplets U S V^T is |S U^T (W - D)|^2 + |(W - D) V S|^2: what its own
    left and right directions carry should stay, the more the larger their singular values. The official code takes 200
    steps of Adam, by default with weights that multi-objective descent (MGDA) moves on from alpha; here the weights are
    fixed (its `mgda: false`) and the minimum is exact, the solution of a Sylvester equation. In directions of which no
    loss says anything W is the mean of both. The experts' order is theirs in the recipe; the official code shuffles it.
    Other tensors are the mean of the merge so far and the next expert, as there.

    Formula:
        W₁ = τ₁;  Wₜ = argmin_W alpha · L(W; Wₜ₋₁) + (1 − alpha) · L(W; τₜ)
        L(W; D) = ‖S Uᵀ (W − D)‖² + ‖(W − D) V S‖²,  U S Vᵀ = D without its last triplets
        that is (Σ a P) W + W (Σ a R) = Σ a (P D + D R), of both D with their weights a;  P = U S² Uᵀ, R = V S² Vᵀ
        θ₀ + scale · W_T
    Parameters:
        alpha: the weight of the merge so far; the next expert has 1 − alpha
        svd_epsilon: triplets count while the sum of singular values up to them is below this share; 1 is all of them
        svd_proj_space: left directions (u), right ones (v) or both
    Spectral work:
        a decomposition of every expert but the last result's, which `--factors` keeps, one of every step's merge, and
        two of sums of two of them
    Trap:
        The order of the experts changes the result, and in tensors that are no block matrices the last expert weighs a
        half. `svd_epsilon` is a share of the sum of singular values, not of squares, and the search is strict: the
        triplet with which the share is reached is dropped, so that 0.99999 leaves out at least the last one, and of
        task vectors of rank one nothing is kept: two of them give their mean. The documentation writes S^(1/2), the
        code uses S.
    """
    merged_MN = directions.task_vector(x, 0)
    for t in range(1, len(x.experts)):
        tau_MN = directions.task_vector(x, t)
        sides = (
            (alpha, _cut(decompositions.singular_triplets(merged_MN), svd_epsilon)),
            (1 - alpha, _cut(directions.leading_triplets(x, t, min(x.shape), tau_MN), svd_epsilon)),
        )
        merged_MN = _nearest(merged_MN, tau_MN, sides, svd_proj_space)
    return merged_MN


def _cut(triplets: Triplets, epsilon: float) -> Triplets:
    """The leading triplets whose singular values sum to less than a share of all; all of them for 1."""
    u_MK, s_K, v_NK = triplets
    kept = len(s_K) if epsilon == 1 else int((s_K.cumsum(0) < epsilon * s_K.sum()).sum())
    return u_MK[:, :kept], s_K[:kept], v_NK[:, :kept]


def _nearest(
    first_MN: Tensor, second_MN: Tensor, sides: tuple[tuple[float, Triplets], ...], space: Space
) -> Tensor:
    """The minimum of both weighted losses that is nearest to the mean: (M, N).

    The displacement E from the mean solves A E + E B = G, -2 G the gradient there. A and B are sums of two matrices of
    low rank, so in their eigenvectors the equation falls apart into numbers.
    """
    half_MN = (first_MN - second_MN) / 2
    slope_MN = torch.zeros_like(half_MN)
    lefts, rights = [half_MN[:, :0]], [half_MN.T[:, :0]]
    for sign, (weight, (u_MK, s_K, v_NK)) in zip((1, -1), sides):
        if "u" in space:
            slope_MN.addmm_(u_MK * s_K.square(), u_MK.T @ half_MN, alpha=sign * weight)
            lefts.append(u_MK * (s_K * weight**0.5))
        if "v" in space:
            slope_MN.addmm_(half_MN @ v_NK, (v_NK * s_K.square()).T, alpha=sign * weight)
            rights.append(v_NK * (s_K * weight**0.5))
    a_I, q_MI = _eigenpairs(lefts)
    b_J, r_NJ = _eigenpairs(rights)
    left_IN, right_MJ = q_MI.T @ slope_MN, slope_MN @ r_NJ
    core_IJ = q_MI.T @ right_MJ
    both_IJ = core_IJ / (a_I[:, None] + b_J)
    left_IN = (left_IN - core_IJ @ r_NJ.T) / a_I[:, None]
    right_MJ = (right_MJ - q_MI @ core_IJ) / b_J
    return (first_MN + second_MN).div_(2).addmm_(q_MI, both_IJ @ r_NJ.T + left_IN).addmm_(right_MJ, r_NJ.T)


def _eigenpairs(roots: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Eigenvalues (K,) and eigenvectors (M, K) of the sum of root root^T, but for those that say nothing."""
    q_MK, s_K, _ = decompositions.singular_triplets(torch.cat(roots, dim=1))
    energy_K = s_K.square()
    counts_K = energy_K > _LEAST * energy_K.sum()
    return energy_K[counts_K], q_MK[:, counts_K]
