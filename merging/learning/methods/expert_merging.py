"""Expert Merging: coefficients by which the merge answers as each expert does, from a few unlabelled examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt, Lt

from mergeline.merging.learning.contract import Job, learned
from mergeline.merging.learning.descent import Schedule
from mergeline.merging.learning.fits import fitted_coefficients
from mergeline.merging.learning.objectives import Objective, Seen, hidden, soft_cross_entropy
from mergeline.merging.learning.spaces import Numbers
from mergeline.merging.methods.parameters import Count, NotNegative, Positive, PositiveCount
from mergeline.merging.recipes.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor


@learned(paper="2509.25712", code="Littleor/ExpertMerging@52829365")
def expert_merging(
    job: Job,
    *,
    chunks: PositiveCount = 1,
    initial: Annotated[float, Gt(0), Lt(1)] = 0.1,
    temperature: Positive = 1.0,
    hidden_weight: NotNegative = 0.0,
    regularisation: NotNegative = 5.0,
    rate: Positive = 0.5,
    decay: NotNegative = 1e-5,
    iterations: Count = 5,
    batch: PositiveCount = 1,
) -> Recipe:
    """base + the sum of sigmoid(w) * task vector, w of each tensor fitted to the experts' predictions.

    Of each task `batch` examples a step: five steps are the paper's five examples. AdamW, gradients clipped to
    norm 1. With more `chunks`, each stretch of a tensor has its own coefficient.

    Formula:
        argmin_w Σₜ τ² · CE(softmax(expert's logits / τ), logits / τ) + hidden_weight · mean_l MSE(h_l, expert's)
        + regularisation · T · mean |sigmoid(w) - initial|,  τ = temperature, T experts
    Parameters:
        chunks: of each tensor, as torch.chunk cuts
        initial: of every coefficient, after the sigmoid
        temperature: of the predictions that are compared
        hidden_weight: how much hidden states of all blocks count
        regularisation: how much coefficients are held at where they begin
        rate: of AdamW
        decay: of AdamW, which pulls w to 0, coefficients to 1/2
        iterations: how many steps
        batch: examples of a task in a step
    Trap:
        The rate is made for a handful of steps; with many it ends at 0 or 1. torch.chunk cuts stretches of ceil(n / K)
        entries, so that there may be fewer chunks than are asked for, and the last coefficients multiply nothing. The
        official code leaves embeddings, norms and biases out, which `exclude` does; its chunking by importance was not
        published.
    """
    experts = len(job.recipe.experts)

    def loss(seen: Seen) -> Tensor:
        found = soft_cross_entropy(seen.logits, seen.teacher_logits, temperature)
        return found + hidden_weight * hidden(seen) if hidden_weight else found

    def penalty(c_DK: Tensor, count: int) -> Tensor:
        return regularisation * deviation(c_DK, initial, count, experts)

    params = {"directions": "task_vectors", "over": "chunks" if chunks > 1 else "whole"}
    form = Numbers(lambda piece, d: initial, squash="sigmoid", count=lambda name: chunks)
    schedule = Schedule(iterations, batch, rate, optimiser="adamw", decay=decay, clip=1.0)
    objective = Objective(loss, hidden=bool(hidden_weight))
    return fitted_coefficients(job, params, form, objective, schedule, penalty if regularisation else None)


def deviation(c_DK: Tensor, initial: float | Tensor, count: int, experts: int) -> Tensor:
    """What some of `count` coefficients add to their mean absolute difference to where they begin, times experts."""
    return (c_DK - initial).abs().sum() / (count / experts)
