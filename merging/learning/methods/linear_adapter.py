"""A linear correction of a merge's features for each task, in closed form."""

from __future__ import annotations

from typing import Any

from mergeline.merging.learning.contract import Job, learned
from mergeline.merging.learning.corrections import corrected, linear, started
from mergeline.merging.methods.parameters import Positive
from mergeline.merging.recipes.recipe import Recipe


@learned(paper="none: the least-squares form of 2402.02705", task_known=True)
def linear_adapter(job: Job, *, inner: str = "cart_wudi", ridge: Positive = 0.05, **params: Any) -> Recipe:
    """The inner merge, and for each task a linear map that brings its features to those of the task's own expert.

    The maps lie beside the merge, in `adapters/`, and correct it where the task of an input is known when it is used.
    That is a class of its own: such a merge is not ranked with those that are one model for all tasks.

    Formula:
        f' = f + A f + c;  [A c] = argmin mean |f + A f + c − g|² + ridge · mean(diag G) · |[A c]|²,  f the merge's
        features, g those of the task's expert, G = mean of [f 1]ᵀ[f 1]
    Parameters:
        inner: what makes the merge: any method, or a learned one that gives one merge
        ridge: toward no correction; relative to the mean diagonal of G
    Trap:
        Features are corrected once, at the end: what the merge lost before, a linear map cannot bring back. With
        far fewer examples than features take a larger ridge.
    """
    start = started(job, inner, params)
    return corrected(job, start, lambda _task, merged, expert: ("linear", linear(merged, expert, ridge)))
