"""Representation Surgery, second version: a small network after every block for each task."""

from __future__ import annotations

from typing import Any

from mergeline.merging.learning.block_corrections import block_corrected
from mergeline.merging.learning.contract import Job, learned
from mergeline.merging.learning.corrections import started
from mergeline.merging.methods.parameters import Positive, PositiveCount
from mergeline.merging.recipes.recipe import Recipe


@learned(paper="2410.14389", code="EnnengYang/SurgeryV2@e958390c", task_known=True)
def surgery_v2(
    job: Job,
    *,
    inner: str = "task_arithmetic",
    adapter_rank: PositiveCount = 16,
    rate: Positive = 1e-3,
    steps: PositiveCount = 500,
    **params: Any,
) -> Recipe:
    """The inner merge, and for each task two thin matrices after every block, which bring its output to the expert's.

    They lie beside the merge, in `adapters/`, and correct it where the task of an input is known when it is used. That
    is a class of its own: such a merge is not ranked with those that are one model for all tasks.

    Formula:
        x' = x − U relu(D x) of every token after every block; min Σ over blocks of mean |x̄' − ȳ|₁ by Adam, x̄' and ȳ the
        means over tokens of the corrected merge's and of the expert's outputs
    Parameters:
        inner: what makes the merge: any method, or a learned one that gives one merge
        adapter_rank: rows of D; begun by Kaiming's uniform rule (a = √5), U at zero
        rate: of Adam's steps
        steps: iterations, of two steps on 16 examples each
    Trap:
        Each step runs the merge and goes back through it: a hundred times the work of `surgery`. The official code
        fits to the test images, has 12 blocks of width 768 written into it, and takes rank 4 for ViT-L/14.
    """
    return block_corrected(job, started(job, inner, params), adapter_rank, rate, steps)
