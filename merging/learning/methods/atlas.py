"""aTLAS: task vectors scaled tensor by tensor, or part by part, from a few labelled examples or unlabelled ones."""

from __future__ import annotations

from mergeline.merging.learning.contract import Job, learned
from mergeline.merging.learning.descent import Schedule
from mergeline.merging.learning.fits import fitted_coefficients
from mergeline.merging.learning.objectives import objective_of
from mergeline.merging.learning.spaces import Numbers
from mergeline.merging.methods.parameters import BelowOne, Count, NotNegative, Positive, PositiveCount
from mergeline.merging.recipes.recipe import Recipe


@learned(paper="2407.02880", code="fredzzhang/atlas@557d7fbd")
def atlas(
    job: Job,
    *,
    parts: PositiveCount = 1,
    objective: str = "cross_entropy",
    rate: Positive = 1e-1,
    decay: NotNegative = 0.1,
    iterations: Count = 130,
    batch: PositiveCount = 16,
    held_out: BelowOne = 0.0,
) -> Recipe:
    """base + the sum of coefficient * task vector, the coefficients of each tensor fitted from 0.

    Few-shot by default: to labels. `objective: pseudo_labels` or another is without them. With more `parts`, each
    entry of a tensor belongs to a random one of them, which has its own coefficient. AdamW, its rate falling along a
    cosine; gradients are clipped to norm 1.

    Formula:
        argmin_c Σₜ cross-entropy of task t, W_j = θ₀_j + Σₜ Σₖ c_jtk [part = k] ⊙ τ_jt
    Parameters:
        parts: of each tensor, drawn by the recipe's seed
        objective: what is minimised, as of `coefficients`
        rate: of AdamW
        decay: of AdamW, which pulls coefficients to 0
        iterations: how many steps
        batch: examples of a task in a step
        held_out: the share of the examples on which agreement with the experts stops the fit; 0 takes the last step
    Trap:
        It needs labels unless the objective is another, and is then compared with methods that had them. With parts,
        the official code leaves biases, norms and convolutions as in the base, and gives tensors of one shape the same
        parts; here every tensor has its own.
    """
    params = {"directions": "task_vectors", "over": "partition" if parts > 1 else "whole",
              "partition_seed": abs(job.recipe.seed)}  # fmt: skip
    form = Numbers(lambda piece, d: 0.0, count=lambda name: parts)
    schedule = Schedule(
        iterations, batch, rate, optimiser="adamw", decay=decay, cosine=0.0, clip=1.0, held_out=held_out
    )
    return fitted_coefficients(job, params, form, objective_of(objective), schedule)
