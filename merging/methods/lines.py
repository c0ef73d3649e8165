"""LiNeS: layers further from the input keep more of what a merge changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from merging import operators as ops
from merging.methods import Inner, method
from merging.rules import block_counts, depth
from merging.slots import Inputs, Slot, View

if TYPE_CHECKING:
    from torch import Tensor


def norms(inputs: Inputs, merge: Inner, *, alpha: float | str, **_: Any) -> dict[str, Any]:
    """How many blocks the model has; and alpha, if it is to be found: (|sum of tau|_1 / |merged tau|_1) / T."""
    counts = block_counts(view.name for view in inputs.views)
    if alpha != "auto":
        return {"alpha": alpha, "blocks": counts}

    def lengths(view: View) -> tuple[float, float]:
        summed = merged = 0.0
        for x, merged_X in merge.merged(view):
            summed += float((ops.weighted_sum(x.experts) - len(x.experts) * x.base.double()).abs().sum())
            merged += float((merged_X.double() - x.base.double()).abs().sum())
        return summed, merged

    pairs = list(inputs.each(lengths))
    experts = len(inputs.views[0].source.experts)
    summed, merged = (sum(values) for values in zip(*pairs))
    return {"alpha": summed / merged / experts if merged else 1 / experts, "blocks": counts}


@method(
    family="wrapper",
    paper="2410.17146",
    code="wang-kee/LiNeS@43a7bdd5",
    reference="pretrained",
    needs_base=True,
    prepass=norms,
    inner_defaults={"scale": 1.0},
)
def lines(
    x: Slot,
    merge: Inner,
    *,
    inner: str = "task_arithmetic",
    alpha: Annotated[float, Ge(0)] | Literal["auto"] = "auto",
    beta: Annotated[float, Ge(0)] = 0.5,
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
    base = x.base.double()
    factor = x.facts["alpha"] + beta * (depth(x.name, x.facts["blocks"]) or 0.0)
    return (merge(x).double() - base).mul_(factor).add_(base)
