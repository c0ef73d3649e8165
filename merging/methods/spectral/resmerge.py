"""ResMerge: task vectors without their leading directions, averaged on the sphere, and a little of these directions."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any, Iterator, Mapping

from mergeline.merging.algebra import directions
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import NotNegative, PositiveCount

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDING = 1e-12  # a residual of less than it, of its task vector, is none


def _wrong(params: Mapping[str, Any], experts: int) -> Iterator[str]:
    if params["src_beta_min"] > params["src_beta_max"]:
        yield f"src_beta_min {params['src_beta_min']:g} is above src_beta_max {params['src_beta_max']:g}; swap them"


@method(
    paper="2606.02252",
    code="sunyd0303-cpu/ResMerge-release@e990128e",
    scale=1.0,
    keys="block_linear",
    other="mean",
    needs=("base",),
    check=_wrong,
    spectral=lambda rows, columns, experts: 8 * rows * columns,
)
def resmerge(
    x: Slot,
    *,
    rank_topk: PositiveCount = 1,
    src_beta_min: NotNegative = 0.7,
    src_beta_max: NotNegative = 1.0,
    head_ratio_budget: NotNegative = 0.2,
) -> Tensor:
    """base + scale * (A + C): the residuals of task vectors averaged on the sphere, and a share of their leading parts.

    H_t is the leading part of tau_t, R_t the rest. A goes in the direction of the sum of the unit residuals; the more
    these agree, the longer it is. C goes in the direction of the mean of the H_t, the longer the more these agree. Made
    for language models that reinforcement learning has tuned. Matrices that lie in no block, which `keys: matrices`
    adds, have b = src_beta_max. Other tensors add the mean task vector.

    Formula:
        Hₜ = P_k(τₜ), k = rank_topk;  Rₜ = τₜ − Hₜ
        q = Σₜ Rₜ / ‖Rₜ‖;  c = mean cosine of Rₜ and q;  p = mean cosine of pairs of the Rₜ
        b = src_beta_max − (src_beta_max − src_beta_min) · ((p + 1) / 2 + (c + 1) / 2) / 2
        A = c^b · mean ‖Rₜ‖ · q / ‖q‖, but the mean of the Rₜ where c ≤ 1/√T
        C = head_ratio_budget · (mean of max(0, cosine) over pairs of the Hₜ) · ‖A‖ · ΣHₜ / ‖ΣHₜ‖
        θ₀ + scale · (A + C)
    Parameters:
        rank_topk: how many singular directions of a task vector are its leading part
        src_beta_min: the exponent of full agreement
        src_beta_max: the exponent of none
        head_ratio_budget: the length of C over that of A, were the leading parts the same
    Spectral work:
        the leading directions of every matrix and expert, which `--factors` keeps
    Trap:
        One expert does not come back: of its leading part only `head_ratio_budget` times the length of the rest is
        added. Where residuals are nearly orthogonal c is about 1/√T, and the merge jumps as it passes it.
    """
    heads: list[tuple[Tensor, Tensor, Tensor]] = []
    sum_MN, unit_MN, head_MN = (torch.zeros_like(x.reference, dtype=torch.float64) for _ in range(3))
    norms = []
    for t in range(len(x.experts)):
        tau_MN = directions.task_vector(x, t)
        least = _ROUNDING * float(tau_MN.norm())
        u_MK, s_K, v_NK = directions.leading_triplets(x, t, rank_topk, tau_MN)
        u_MK, s_K, v_NK = u_MK[:, :rank_topk], s_K[:rank_topk], v_NK[:, :rank_topk]
        if len(s_K):
            heads.append((u_MK, s_K, v_NK))
        own_MN = (u_MK * s_K) @ v_NK.T
        head_MN.add_(own_MN)
        tau_MN.sub_(own_MN)
        norm = float(tau_MN.norm())
        norms.append(norm if norm > least else 0.0)
        if norms[-1]:
            sum_MN.add_(tau_MN)
            unit_MN.add_(tau_MN, alpha=1 / norm)
    beta = (src_beta_min, src_beta_max) if x.view.role.layer is not None else (src_beta_max, src_beta_max)
    backbone_MN = _on_the_sphere(sum_MN, unit_MN, norms, *beta)
    length = head_ratio_budget * _agreement(heads) * float(backbone_MN.norm())
    if length and (size := float(head_MN.norm())):
        backbone_MN.add_(head_MN, alpha=length / size)
    return backbone_MN


def _on_the_sphere(sum_MN: Tensor, unit_MN: Tensor, norms: list[float], least: float, most: float) -> Tensor:
    """A, of the sum of residuals, that of unit residuals, and their norms."""
    count, length = len(norms), float(unit_MN.norm())
    coherence = length / count
    if coherence <= count**-0.5:
        return sum_MN / count
    # |q|^2 holds every residual's product with itself, and that of each pair twice.
    units = sum(norm > 0 for norm in norms)
    pairs = (length**2 - units) / (count * (count - 1)) if count > 1 else 1.0
    score = ((pairs + 1) / 2 + (coherence + 1) / 2) / 2
    exponent = most - (most - least) * min(max(score, 0.0), 1.0)
    return unit_MN * (coherence**exponent * (sum(norms) / count) / length)


def _agreement(heads: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """The mean over pairs of their cosines, those below 0 as 0; 1 of one, 0 of none."""
    found = [
        max(0.0, float(((u.T @ other_u) * (v.T @ other_v) * s[:, None] * other_s).sum() / (s.norm() * other_s.norm())))
        for (u, s, v), (other_u, other_s, other_v) in combinations(heads, 2)
    ]  # fmt: skip
    return min(1.0, sum(found) / len(found)) if found else float(bool(heads))
