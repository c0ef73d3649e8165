"""FW-Merging: Frank-Wolfe steps toward the checkpoints of a pool that the loss asks for."""

from __future__ import annotations

from typing import Literal

from mergeline.merging.learning.contract import Job, learned
from mergeline.merging.learning.descent import Schedule
from mergeline.merging.learning.frank_wolfe import Choice, Granularity, hard, soft
from mergeline.merging.learning.objectives import objective_of
from mergeline.merging.methods.parameters import Count, Positive, PositiveCount
from mergeline.merging.recipes.recipe import Recipe


@learned(paper="2503.12649", code="tanganke/fusion_bench@54c9e8c9 (fw_hard, fw_soft)", pool=True)
def fw_merging(
    job: Job,
    *,
    variant: Literal["hard", "soft"] = "hard",
    initial: float = 0.3,
    granularity: Granularity = "expert",
    objective: str = "cross_entropy",
    iterations: Count = 10,
    examples: PositiveCount = 100,
    step_size: Positive = 0.1,
    scale: Positive = 0.3,
    soft_objective: str = "entropy",
    soft_iterations: PositiveCount = 500,
    soft_initial: float = 1e-8,
    rate: Positive = 1e-3,
    batch: PositiveCount = 16,
) -> Recipe:
    """Steps toward checkpoints of a pool, which are chosen by the gradient.

    Hard: from task arithmetic, toward one checkpoint each. The pool are the experts, and the start: base + initial *
    sum of task vectors. Each iteration takes the gradient g of the mean loss over `examples` of each task, chooses the
    checkpoint whose weights have the least cosine with g, summed over tensors (or each tensor chooses for itself), and
    goes 2 / (k + 2) * step_size * scale of the way to it.

    Soft: from the base. Each iteration chooses a checkpoint by the gradient of each task, none twice, and then fits by
    Adam how far each tensor goes toward each of them, as AdaMerging does.

    Experts without a task of their own may be in the pool. Which were chosen stands in the job's folder, in
    selection.json.

    Formula:
        hard: s = argmin_θ Σ_j cos(g_j, θ_j);  W ← W + 2/(k + 2) · step_size · scale · (θ_s − W)
        soft: sₜ = argmin_θ Σ_j cos(gₜ_j, θ_j), all different;  W_j ← W_j + Σₜ λ_jt (θ_sₜ − W)_j, λ of least entropy
    Parameters:
        variant: steps toward one checkpoint each, or fitted ones toward one for each task
        initial: of every task vector at the start; soft: of every λ in the first iteration
        granularity: whether a checkpoint is chosen for all tensors, or by each tensor for itself
        objective: whose gradient it is, as of `coefficients`
        iterations: how many times checkpoints are chosen
        examples: of each task, drawn by the recipe's seed
        step_size: of Frank and Wolfe's 2 / (k + 2) (hard)
        scale: what the official merge multiplies a step by (hard)
        soft_objective: what λ is fitted to
        soft_iterations: steps of Adam in each iteration (soft)
        soft_initial: of every λ after the first iteration
        rate: of Adam (soft)
        batch: examples of a task in a step of Adam (soft)
    Trap:
        The official code scores by cosines with whole weights, not by inner products with what a step would change, as
        Frank and Wolfe's oracle does: weights of a large norm in common decide nothing. It needs labels unless the
        objective is another. With as many tasks as checkpoints, soft takes all of them every time, so that it is
        AdaMerging, begun again and again. The projection on the simplex that its documentation names is never called.
    """
    choice = Choice(granularity, objective_of(objective), examples, iterations)
    if variant == "hard":
        return hard(job, choice, initial, step_size, scale)
    schedule = Schedule(soft_iterations, batch, rate)
    return soft(job, choice, initial, objective_of(soft_objective), schedule, soft_initial)
