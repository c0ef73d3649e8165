"""Task arithmetic in the tangent space: experts that were tuned linearised, and the scale of their sum."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Annotated, Callable, Sequence

from annotated_types import Ge

from mergeline.merging.errors import UserError
from mergeline.merging.files import write_json
from mergeline.merging.lazy import torch
from mergeline.merging.learning.classes import refuse_no_labels
from mergeline.merging.learning.contract import Job, learned
from mergeline.merging.learning.descent import CURVE
from mergeline.merging.learning.directions import Inputs
from mergeline.merging.learning.objectives import Objective, Outputs, Seen, objective_of
from mergeline.merging.learning.pool import Pool
from mergeline.merging.learning.tangent import Tangent, tangents
from mergeline.merging.recipes.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor


@learned(paper="2305.12827", code="gortizji/tangent_task_arithmetic@0aa0e186")
def tangent(
    job: Job, *, points: Annotated[int, Ge(2)] = 21, each: bool = False, objective: str = "kl"
) -> Recipe:
    """base + scale * sum of task vectors of experts that were tuned linearised; the scale of least loss of a grid.

    A linearised model is f(x; θ₀) + J(x) (θ − θ₀). Its features are linear in coefficients, so that one forward
    derivative along each task vector on each example gives those of all merges, and a search costs next to nothing.
    With `each`, every expert has its own coefficient, fitted by L-BFGS from the best scale.

    Formula:
        argmin_s Σₜ objective(f(x; θ₀) + s Σₖ J(x) τₖ; expert t's f(x; θ₀) + J(x) τₜ), s of `points` values in [0, 1]
    Parameters:
        points: of the grid, from 0 to 1
        each: whether every expert has its own coefficient
        objective: as of `coefficients`; the official search compares accuracies on labelled validation images
    Trap:
        The merged checkpoint stands for a linearised model, as its experts do: loaded as an ordinary one it is another,
        worse model, and so is an expert. Ordinary experts are no input: their tangent is not what they compute.
    """
    found = objective_of(objective)
    if found.hidden:
        raise UserError(f"tangent: {objective} compares hidden states, which are not kept; compare features")
    refuse_no_labels(job, found)
    with Inputs(job.recipe, job.device) as inputs:
        experts = [*inputs.experts]
        owners = {task: e for e in experts for task in job.examples.tasks_of(e)}
        pools = {task: Pool(task, job.examples, job.recipe.seed) for task in owners}
        kept = tangents(inputs, job.network, pools)
    own = {task: experts.index(expert) for task, expert in owners.items()}

    def loss(c_D: Tensor) -> Tensor:
        return loss_of(job, found, kept, own, c_D)

    one_D = torch.ones(len(experts), dtype=torch.float64)
    scales = [i / (points - 1) for i in range(points)]
    with torch.no_grad():
        losses = [float(loss(scale * one_D)) for scale in scales]
    for scale, value in zip(scales, losses):
        if not isfinite(value):
            raise UserError(f"the loss at scale {scale:g} is {value}; look at the examples and the experts")
    write_json(job.folder / CURVE, [{"scale": s, "loss": value} for s, value in zip(scales, losses)])
    best = scales[losses.index(min(losses))]
    job.notes["linearised"] = True
    params: dict[str, float | Sequence[float]] = {"scale": best}
    if each:
        c_D = _minimum(loss, best * one_D)
        job.notes["loss"] = float(loss(c_D))
        params = {"scale": 1.0, "weights": c_D.tolist()}
    return job.recipe.model_copy(update={"method": "task_arithmetic", "params": params})


def loss_of(
    job: Job, objective: Objective, kept: dict[str, list[Tangent]], own: dict[str, int], c_D: Tensor
) -> Tensor:
    """The sum over tasks of the mean loss over examples; own: of each task, the number of its expert."""
    total = torch.zeros((), dtype=torch.float64)
    for task, parts in kept.items():
        one_D = torch.zeros_like(c_D)
        one_D[own[task]] = 1.0
        rows = sum(len(part.base_Rd) for part in parts)
        for part in parts:
            merged, expert = Outputs(part.features(c_D)), Outputs(part.features(one_D.detach()))
            seen = Seen(job.network, part.batch, task, merged, expert)
            total = total + objective.loss(seen).double() * (len(part.base_Rd) / rows)
    return total


def _minimum(loss: Callable[[Tensor], Tensor], start_D: Tensor) -> Tensor:
    c_D = start_D.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([c_D], max_iter=200, line_search_fn="strong_wolfe")

    def again() -> float:
        optimiser.zero_grad()
        value = loss(c_D)
        value.backward()
        return float(value.detach())

    optimiser.step(again)
    if not bool(torch.isfinite(c_D).all()):
        raise UserError("tangent: coefficients are no longer finite; leave out `each`")
    return c_D.detach()
