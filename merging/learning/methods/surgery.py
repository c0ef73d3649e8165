"""Representation Surgery: a small network after the features for each task."""

from __future__ import annotations

from typing import Any

from mergeline.merging.learning import corrections
from mergeline.merging.learning.contract import Job, learned
from mergeline.merging.learning.corrections import corrected, started
from mergeline.merging.methods.parameters import Positive, PositiveCount
from mergeline.merging.recipes.recipe import Recipe


@learned(paper="2402.02705", code="EnnengYang/RepresentationSurgery@5df3f4ef", task_known=True)
def surgery(
    job: Job,
    *,
    inner: str = "task_arithmetic",
    adapter_rank: PositiveCount = 16,
    rate: Positive = 1e-3,
    steps: PositiveCount = 500,
    **params: Any,
) -> Recipe:
    """The inner merge, and for each task two thin matrices that take out of its features what the expert's have not.

    They lie beside the merge, in `adapters/`, and correct it where the task of an input is known when it is used. That
    is a class of its own: such a merge is not ranked with those that are one model for all tasks.

    Formula:
        f' = f − U relu(D f);  min mean |f' − g|₁ by Adam, f the merge's features, g those of the task's expert
    Parameters:
        inner: what makes the merge: any method, or a learned one that gives one merge
        adapter_rank: rows of D; begun by Kaiming's uniform rule (a = √5), U at zero
        rate: of Adam's steps
        steps: iterations, of two steps on 16 examples each
    Trap:
        The official code fits to the test images. Features are computed once here, where it runs both models in every
        iteration. `linear_adapter` needs no steps and is as good or better with some hundred examples.
    """
    start = started(job, inner, params)

    def fitted(task: str, merged: Any, expert: Any) -> tuple[str, dict[str, Any]]:
        seed = (job.recipe.seed, task)
        return "surgery", corrections.surgery(merged, expert, adapter_rank, rate, steps, seed)

    return corrected(job, start, fitted)
