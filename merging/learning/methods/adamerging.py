"""AdaMerging: coefficients of task vectors that make predictions on unlabelled examples certain."""

from __future__ import annotations

from typing import Literal

from mergeline.merging.learning.contract import Job, learned
from mergeline.merging.learning.descent import Schedule
from mergeline.merging.learning.fits import fitted_coefficients
from mergeline.merging.learning.objectives import objective_of
from mergeline.merging.learning.spaces import Numbers
from mergeline.merging.methods.parameters import BelowOne, Count, Positive, PositiveCount
from mergeline.merging.recipes.recipe import Recipe


@learned(paper="2310.02575", code="EnnengYang/AdaMerging@cea1165a")
def adamerging(
    job: Job,
    *,
    scope: Literal["tensor", "expert"] = "tensor",
    initial: float = 0.3,
    clamp: bool = True,
    objective: str = "entropy",
    rate: Positive = 1e-3,
    iterations: Count = 500,
    batch: PositiveCount = 16,
    batches: PositiveCount = 2,
    held_out: BelowOne = 0.0,
) -> Recipe:
    """base + the sum of coefficient * task vector, coefficients of each tensor fitted to the entropy of predictions.

    Layer-wise AdaMerging has one coefficient for each expert and tensor (`tensor`), task-wise for each expert
    (`expert`). The matrices of packed experts each have their own. Adam; the sum over tasks, and `batches` of each.

    Formula:
        argmin_λ Σₜ mean H(softmax(logits of task t)), W_j = θ₀_j + Σₜ clamp(λ_jt, 0, 1) τ_jt
    Parameters:
        scope: whether a coefficient is of a tensor (layer-wise), or of a whole expert (task-wise)
        initial: of every coefficient
        clamp: whether coefficients are held in [0, 1], beyond which they have no gradient
        objective: what is minimised; entropy, or features such as cosine, which do better (see `coefficients`)
        rate: of Adam
        iterations: how many steps
        batch: examples of a task in a batch
        batches: how many of them a step adds up
        held_out: the share of the examples on which agreement with the experts stops the fit; 0 takes the last step
    Trap:
        Entropy sharpens wrong answers where the start is far from the experts: tasks that it predicts well
        gain, others fall, the worst of them furthest. The paper fits to the test images; here they are others. A
        coefficient that leaves [0, 1] comes back by Adam's momentum alone.
    """
    form = Numbers(lambda piece, d: initial, shared=scope == "expert", squash="clamp" if clamp else "none")
    schedule = Schedule(iterations, batch, rate, micro=batches, held_out=held_out)
    return fitted_coefficients(job, {"directions": "task_vectors"}, form, objective_of(objective), schedule)
