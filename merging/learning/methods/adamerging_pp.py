"""AdaMerging++: the same on task vectors that TIES has trimmed."""

from __future__ import annotations

from typing import Literal

from mergeline.merging.learning.contract import Job, learned
from mergeline.merging.learning.descent import Schedule
from mergeline.merging.learning.fits import fitted_coefficients
from mergeline.merging.learning.objectives import objective_of
from mergeline.merging.learning.spaces import Numbers
from mergeline.merging.methods.parameters import BelowOne, Count, Positive, PositiveCount, Share
from mergeline.merging.recipes.recipe import Recipe


@learned(paper="2310.02575", code="EnnengYang/AdaMerging@cea1165a")
def adamerging_pp(
    job: Job,
    *,
    scope: Literal["tensor", "expert"] = "tensor",
    density: Share = 0.2,
    initial: float = 0.3,
    clamp: bool = True,
    objective: str = "entropy",
    rate: Positive = 1e-3,
    iterations: Count = 500,
    batch: PositiveCount = 16,
    batches: PositiveCount = 2,
    held_out: BelowOne = 0.0,
) -> Recipe:
    """AdaMerging on the entries of task vectors that are large and agree with the sign that most mass has.

    Each task vector keeps its `density` largest entries of the whole model, of them those of the elected sign; where
    signs cancel, that of most entries stands in. They are not added up, but get coefficients as in `adamerging`.

    Formula:
        τ̂ₜ = τₜ ⊙ [|τₜ| among its density largest] ⊙ [sign(τₜ) = sign(Σ)]
        argmin_λ Σₜ mean H(softmax(logits of task t)), W_j = θ₀_j + Σₜ clamp(λ_jt, 0, 1) τ̂_jt
    Parameters:
        scope: whether a coefficient is of a tensor (layer-wise), or of a whole expert (task-wise)
        density: share of the entries that each task vector keeps, over the whole model
        initial: of every coefficient
        clamp: whether coefficients are held in [0, 1], beyond which they have no gradient
        objective: what is minimised, as of `coefficients`
        rate: of Adam
        iterations: how many steps
        batch: examples of a task in a batch
        batches: how many of them a step adds up
        held_out: the share of the examples on which agreement with the experts stops the fit; 0 takes the last step
    Trap:
        As of `adamerging`; and with `initial` 0.3 the trimmed vectors begin well below what `ties` adds.
    """
    form = Numbers(lambda piece, d: initial, shared=scope == "expert", squash="clamp" if clamp else "none")
    schedule = Schedule(iterations, batch, rate, micro=batches, held_out=held_out)
    params = {"directions": "ties", "density": density}
    return fitted_coefficients(job, params, form, objective_of(objective), schedule)
