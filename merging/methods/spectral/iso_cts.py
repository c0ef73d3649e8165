"""Iso-CTS: Iso-C with its weakest directions given to the single tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.algebra import combine, decompositions, directions
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import Rate

if TYPE_CHECKING:
    from torch import Tensor


@method(
    paper="2502.04959",
    code="danielm1405/iso-merging@d34010af",
    scale=1.0,
    keys="matrices",
    other="mean",
    needs=("base",),
    spectral=lambda rows, columns, experts: 6 * rows * columns,
)
def iso_cts(x: Slot, *, common_fraction: Rate = 0.8) -> Tensor:
    """base + scale * (mean singular value) * polar(U) polar(V)^T of common and task directions; others: + scale * mean.

    Of R = min(M, N) directions int(common_fraction * R) are the leading ones of the sum of the task vectors; the rest
    is shared evenly by the tasks (rounded half to even), each the leading ones of its task vector without what the
    common left vectors span. Directions in which nothing changed, where the official code takes arbitrary ones, are
    left out.

    Formula:
        of R = min(M, N) directions, int(common_fraction · R) are the leading U S Vᵀ of Σₜ τₜ,
        the others, the same number a task, the leading ones of τₜ without what the common left vectors span
        θ₀ + scale · mean(S) · polar(U) · polar(V)ᵀ, of all directions together
    Parameters:
        common_fraction: share of the directions that is common to all tasks
    Spectral work:
        decompositions of the sum and of every expert, and two polar factors a matrix
    Trap:
        Where R · (1 − common_fraction) is less than half the number of experts, no task gets a direction and
        it is iso_c.
    """
    count, side = len(x.experts), min(x.shape)
    each = min(round((side - int(side * common_fraction)) / count), side // count)
    parts = [decompositions.singular_triplets(combine.plain_update(x, "sum"), side - each * count)]
    common_MK = parts[0][0]
    for t in range(count if each else 0):
        own_MN = directions.task_vector(x, t)
        energy = own_MN.square().sum()
        own_MN -= common_MK @ (common_MK.T @ own_MN)
        parts.append(decompositions.singular_triplets(own_MN, each, energy))
    u_MK, s_K, v_NK = (torch.cat(kind, dim=-1) for kind in zip(*parts))
    left_MK = decompositions.partial_polar(u_MK) * (s_K.sum() / side)
    return left_MK @ decompositions.partial_polar(v_NK).T
