"""AdaRank: which singular directions of each expert are merged, fitted with straight-through gates."""

from __future__ import annotations

from typing import Literal

from mergeline.merging.learning.contract import Job, learned
from mergeline.merging.learning.descent import Schedule
from mergeline.merging.learning.fits import fitted_coefficients
from mergeline.merging.learning.objectives import objective_of
from mergeline.merging.learning.spaces import Bits
from mergeline.merging.methods.parameters import BelowOne, Count, Positive, PositiveCount, Rate
from mergeline.merging.recipes.recipe import Recipe


@learned(paper="2503.22178", code="david3684/AdaRank@dfa53581")
def adarank(
    job: Job,
    *,
    origin: Literal["mean", "base"] = "mean",
    rank: Rate = 0.16,
    initial: float = 2.3,
    temperature: Positive = 10.0,
    objective: str = "entropy",
    rate: Positive = 1e-3,
    iterations: Count = 10_000,
    batch: PositiveCount = 16,
    held_out: BelowOne = 0.0,
) -> Recipe:
    """origin + the sum of weight * U diag(gates * s) V^T of each expert's task vector, gates and weights fitted.

    A gate of every singular triplet of every block matrix is 1 if its logit is above 0, with the derivative of
    sigmoid(logit / temperature). It begins with the int(rank * min(M, N)) leading ones of CART (origin mean), or of
    task arithmetic (base). Other tensors have a weight for each expert alone.

    Formula:
        argmin_{w, p} Σₜ mean H(softmax(logits of task t)), W = θₒ + Σₜ wₜ Uₜ diag(b ⊙ sₜ) Vₜᵀ
        b = [sigmoid(p / temperature) > ½]
        ∂/∂pᵢ = w σ′(pᵢ / temperature) / temperature · sᵢ uᵢᵀ G vᵢ, G the gradient of W
    Parameters:
        origin: what task vectors are measured from
        rank: share of the gates that are open at the start
        initial: of every weight
        temperature: of the gates' derivative
        objective: what is minimised, as of `coefficients`
        rate: of Adam, for gates and weights
        iterations: how many steps
        batch: examples of a task in a step
        held_out: the share of the examples on which agreement with the experts stops the fit; 0 takes the last step
    Trap:
        Logits begin at ±0.1, so that no gate moves before 0.1 / rate steps, and at a large rate all flip from noise: at
        1e-2 the merge was destroyed within a few hundred steps. The official code keeps the step that was best on the
        test set; this one takes the last.
    """
    params = {"directions": "cart" if origin == "mean" else "task_vectors", "over": "singular"}
    form = Bits(initial, lambda side: int(rank * side), temperature)
    schedule = Schedule(iterations, batch, rate, held_out=held_out)
    return fitted_coefficients(job, params, form, objective_of(objective), schedule)
