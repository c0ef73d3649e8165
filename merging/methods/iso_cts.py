"""Iso-CTS: Iso-C with its weakest directions given to the single tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Le

from merging import operators as ops
from merging import spectral
from merging.keys import Keys, is_matrix
from merging.lazy import torch
from merging.methods import method
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor


@method(
    family="spectral",
    paper="2502.04959",
    code="danielm1405/iso-merging@d34010af",
    reference="pretrained",
    unit="matrix",
    needs_base=True,
    spectral=True,
    beside=lambda rows, columns, experts: 6 * rows * columns,
)
def iso_cts(
    x: Slot,
    *,
    scale: float = 1.0,
    common_fraction: Annotated[float, Ge(0), Le(1)] = 0.8,
    keys: Keys = "matrices",
) -> Tensor:
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
    base = x.base.double()
    if not is_matrix(x.name, x.shape, keys):
        return base + scale * ops.plain_update(x.experts, base, "mean")
    update = x.share(("iso_cts", common_fraction), lambda: _update(x, base, common_fraction))
    return torch.add(base, update, alpha=scale)


def _update(x: Slot, base_MN: Tensor, common_fraction: float) -> Tensor:
    count, side = len(x.experts), min(x.shape)
    each = min(round((side - int(side * common_fraction)) / count), side // count)
    parts = [spectral.singular_triplets(ops.plain_update(x.experts, base_MN, "sum"), side - each * count)]
    common_MK = parts[0][0]
    for t in range(count if each else 0):
        own_MN = spectral.task_vector(x, t, base_MN)
        energy = own_MN.square().sum()
        own_MN -= common_MK @ (common_MK.T @ own_MN)
        parts.append(spectral.singular_triplets(own_MN, each, energy))
    u_MK, s_K, v_NK = (torch.cat(kind, dim=-1) for kind in zip(*parts))
    return (spectral.partial_polar(u_MK) * (s_K.sum() / side)) @ spectral.partial_polar(v_NK).T
