"""Concrete AdaMerging: a mask of all task vectors, and coefficients that are fitted under it."""

from __future__ import annotations

from typing import Literal

from mergeline.merging.learning.contract import Job, learned
from mergeline.merging.learning.descent import Schedule
from mergeline.merging.learning.fits import fitted_under_mask
from mergeline.merging.learning.objectives import objective_of
from mergeline.merging.learning.spaces import Numbers
from mergeline.merging.methods.parameters import Positive, PositiveCount
from mergeline.merging.recipes.recipe import Recipe


@learned(paper="2312.06173", code="tanganke/subspace_fusion@67f8450a")
def concrete_adamerging(
    job: Job,
    *,
    scope: Literal["tensor", "expert"] = "tensor",
    weight: float = 0.3,
    initial: float = 0.0,
    temperature: Positive = 0.5,
    objective: str = "entropy",
    rate: Positive = 1e-3,
    inner_rate: Positive = 1.0,
    iterations: PositiveCount = 1000,
    adaptation: PositiveCount = 1000,
    adaptation_rate: Positive = 1e-3,
    batch: PositiveCount = 16,
) -> Recipe:
    """base + the sum of coefficient * task vector, entry by entry times m / mean(m), the mask before the coefficients.

    The mask m is the same for all experts, as in `concrete`. Each of its steps draws it anew, lets the coefficients
    take one step of Adam from where they begin, and moves the mask's logits by the gradient there, on other examples.
    Then, under the mask without noise, coefficients are fitted as by `adamerging`, not clamped.

    Formula:
        argmin_x Σₜ H(λ − inner_rate · Adam(∂H/∂λ), x), H the mean entropy, W_j = θ₀_j + m_j / mean(m_j) ⊙ Σₜ λ_jt τ_jt
        then argmin_λ Σₜ H(λ, x);  m = sigmoid((logit(u) + x) / temperature), u uniform; at the end m = sigmoid(x)
    Parameters:
        scope: whether a coefficient is of a tensor (layer-wise), or of a whole expert (task-wise)
        weight: of every task vector, where coefficients begin
        initial: of every logit
        temperature: of the relaxed samples: the smaller, the nearer to 0 and 1
        objective: what is minimised, as of `coefficients`
        rate: of Adam, for the mask
        inner_rate: of Adam, for the coefficients' one step
        iterations: how many steps the mask takes
        adaptation: how many steps the coefficients take under the finished mask
        adaptation_rate: of Adam, for these
        batch: examples of a task in a step
    Trap:
        At the official inner_rate of 1, a step of Adam moves a coefficient by up to 1 however small its gradient is:
        the mask is fitted to coefficients far from those that it is used with. The mask, its gradient and its two
        moments are each as large as the model.
    """
    form = Numbers(lambda piece, d: weight, shared=scope == "expert")
    meta = Schedule(2 * iterations, batch, rate, even_rate=inner_rate)
    schedule = Schedule(adaptation, batch, adaptation_rate)
    return fitted_under_mask(job, form, objective_of(objective), meta, schedule, initial, temperature)
