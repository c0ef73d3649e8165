"""LiNeS: layers further from the input keep more of what a merge changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mergeline.merging.algebra import combine
from mergeline.merging.algebra.slots import Slot, View, Views
from mergeline.merging.methods.bound import Inner
from mergeline.merging.methods.contract import Look, method
from mergeline.merging.methods.parameters import NotNegative

if TYPE_CHECKING:
    from torch import Tensor


def found_alpha(views: Views, merge: Inner) -> float:
    """(|sum of tau|_1 / |merged tau|_1) / T, over the whole model."""

    def lengths(view: View) -> tuple[float, float]:
        summed = merged = 0.0
        for x, update_X in merge.updates(view):
            summed += float(combine.plain_update(x, "sum").abs().sum())
            merged += float(update_X.abs().sum())
        return summed, merged

    summed, merged = (sum(values) for values in zip(*views.each(lengths)))
    return summed / merged / views.experts if merged else 1 / views.experts


@method(
    paper="2410.17146",
    code="wang-kee/LiNeS@43a7bdd5",
    needs=("base",),
    measure=Look(found_alpha, over=lambda params: "model" if params["alpha"] == "auto" else None),
    inner_defaults={"scale": 1.0},
)
def lines(
    x: Slot,
    merge: Inner,
    *,
    inner: str = "task_arithmetic",
    alpha: NotNegative | Literal["auto"] = "auto",
    beta: NotNegative = 0.5,
) -> Tensor:
    """base + (alpha + beta * l / (L - 1)) * what another method adds to the base, in block l of L.

    The inner method's parameters stand beside these; its `scale` is 1 unless it is given.

    Formula:
        θ₀ + (alpha + beta · l / (L − 1)) · (what the inner method adds), in block l of L
    Parameters:
        alpha: the factor of the first block, and of what is in none; auto makes up for the L1 norm that the
            inner method lost
        beta: what the last block gets more than the first
    Needs:
        tensors in numbered blocks
    Trap:
        What lies outside of numbered blocks, the last norm and the head too, gets the smallest factor, alpha.
    """
    least = x.found if isinstance(alpha, str) else alpha
    return merge.update().mul_(least + beta * (x.view.depth or 0.0))
