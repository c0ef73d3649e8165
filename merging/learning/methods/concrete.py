"""Concrete subspace learning: one mask of all experts' task vectors, relaxed and fitted."""

from __future__ import annotations

from mergeline.merging.learning.contract import Job, learned
from mergeline.merging.learning.descent import Schedule
from mergeline.merging.learning.fits import fitted_mask
from mergeline.merging.learning.objectives import objective_of
from mergeline.merging.methods.parameters import BelowOne, Count, Positive, PositiveCount
from mergeline.merging.recipes.recipe import Recipe


@learned(paper="2312.06173", code="tanganke/subspace_fusion@67f8450a")
def concrete(
    job: Job,
    *,
    weight: float = 0.3,
    initial: float = 0.0,
    temperature: Positive = 0.5,
    objective: str = "entropy",
    rate: Positive = 1e-3,
    iterations: Count = 2000,
    batch: PositiveCount = 16,
    held_out: BelowOne = 0.0,
) -> Recipe:
    """base + weight * sum of task vectors, entry by entry times m / mean(m): Concrete task arithmetic.

    The mask m is the same for all experts. It is drawn anew each step from its logits x (a relaxed Bernoulli sample);
    the result has the mask without noise, sigmoid(x). The mean is over each tensor, and has its derivative.

    Formula:
        argmin_x Σₜ mean H(softmax(logits of task t)), W = θ₀ + weight · m / mean(m) ⊙ Σₜ τₜ
        m = sigmoid((logit(u) + x) / temperature), u uniform; at the end m = sigmoid(x)
    Parameters:
        weight: of every task vector
        initial: of every logit
        temperature: of the relaxed samples: the smaller, the nearer to 0 and 1
        objective: what is minimised, as of `coefficients`
        rate: of Adam
        iterations: how many steps
        batch: examples of a task in a step
        held_out: the share of the examples on which agreement with the experts stops the fit; 0 takes the last step
    Trap:
        The mask, its two moments and its gradient are each as large as the model. A few hundred steps do little. The
        official code draws a random mask for what it evaluates; this one has none.
    """
    schedule = Schedule(iterations, batch, rate, held_out=held_out)
    return fitted_mask(job, weight, objective_of(objective), schedule, initial, temperature)
