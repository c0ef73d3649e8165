"""Progressive least squares: the merge whose activations are nearest to every expert's own, solved map by map."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Mapping

from mergeline.merging.errors import UserError
from mergeline.merging.learning.answering import answered
from mergeline.merging.learning.contract import Job, is_learned, learned
from mergeline.merging.learning.least_squares import Errors, Settings, solve
from mergeline.merging.learning.shifting import have_images, shifted
from mergeline.merging.learning.stand_ins import FLOOR, RIDGE, SPLIT, beside, stand_ins
from mergeline.merging.methods.parameters import Count, NotNegative, Positive, PositiveCount
from mergeline.merging.recipes.recipe import Recipe

Auto = Literal["auto"]
# What the sample family's validation images chose around its start.
_CART_WUDI = {"damping": 0.1}
_FEW = 16  # images a task, of which shifted copies help
_COPIES, _COPIES_BESIDE = 3, 9  # of each of few images: alone, and beside drawn ones
_FEW_DRAWN = 128  # examples a task, of which several draws each are needed to tell what is felt


def of_examples(count: float, inner: str) -> tuple[float, float]:
    """Ridge and floor of the metric for so many examples a task: 1 and .1 at 400, more the fewer there are.

    A start that was fitted itself is better than few examples are, and is held the more.
    """
    fewer = 400 / max(count, 1.0)
    ridge = max(0.5, fewer**1.2 if is_learned(inner) else min(15.0, fewer**0.65))
    return ridge, min(1.0, 0.1 * max(1.0, fewer) ** 0.72)


def start_of(inner: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the method that makes the start."""
    return {**_CART_WUDI, **params} if inner == "cart_wudi" else dict(params)


@learned(paper="Mergeline's own, of 2212.09849 (RegMean) and 2508.03121 (RegMean++)", stand_in=SPLIT)
def progressive_least_squares(
    job: Job,
    *,
    inner: str = "cart_wudi",
    target: Literal["residual", "branch"] = "residual",
    ridge: NotNegative | Auto = "auto",
    floor: NotNegative | Auto = "auto",
    first_token: Positive = 16.0,
    shifts: Count | Auto = "auto",
    errors: Errors = "alike",
    draws: PositiveCount | Auto = "auto",
    answers: Count = 0,
    drawn: Count = 0,
    **params: Any,
) -> Recipe:
    """Linear maps solved in forward order, so that the merge does to every task's examples what its own expert does.

    Two streams of every example: the expert's and the merged model's. Each map is fitted, in closed form, to what the
    expert's gives, with a ridge toward the start that `inner` makes, and put in place before the next. What writes to
    the residual stream makes up for what is missing there (`residual`), or copies the expert's branch (`branch`).
    With `errors`, what a task's expert does not feel is left to the other tasks: ‖·‖² becomes
    (·)ᵀHₜ(·), Hₜ the mean square of what features or logits do when the map's outputs move; it takes a few times as
    long, and memory for Hₜ (M, M) of all maps and tasks.

    Formula:
        [W b] = argmin Σₜ 1/nₜ Σ w ‖W x + b − y‖² + ridge · mean diag G · tr(([W b] − [W₀ b₀]) R ([W b] − [W₀ b₀])ᵀ)
        R = Σₜ τₜᵀ τₜ / ‖τₜ‖² + floor, of mean diagonal 1;  G = Σₜ 1/nₜ Σ w [x 1]ᵀ[x 1]
    Parameters:
        inner: what makes the start, a method or a learned one (where there are few images, `dataless_least_squares`);
            its parameters stand beside these
        target: of what writes to the residual stream
        ridge: toward the start, in mean diagonals of G; auto: (400 / examples a task)^0.65, from 0.5 to 15; toward a
            learned start (400 / examples a task)^1.2, 0.5 or more
        floor: of the metric of the ridge; auto: 0.1 (400 / examples a task)^0.72, at most 1
        first_token: the weight of the token that a model is read out at, where it is the first
        shifts: of images, how many copies of each that are shifted by up to 3 pixels are fitted too; auto: of 16
            images a task or less 3, beside drawn ones 9; else none
        errors: of a map's outputs, what they count by: all alike, or how much the expert's features, or the differences
            of its logits (`classes`, where models have heads, and the better there), feel them; of 16
            examples a task or more
        draws: directions of every example's features, or pairs of classes, that tell what is felt; auto: 4 of 128
            examples a task or less, else 1
        answers: of prompts, how many tokens at most that the expert writes after each are fitted too
        drawn: of images, how many procedural ones are fitted beside each task's own, those that its task vector moves
            most (`dataless_least_squares`); the ridge is then at most 10, the floor at most 0.5
    Needs:
        unlabelled examples of every expert's own task, 16 or more; beside drawn ones 4 or more
    Trap:
        Drawn images can help where there are few: with 400 of them and `errors: classes`, 16 images a task of the
        sample family give .829 instead of .808 in test accuracy, and 4 .823 instead of .796; 64 give .844 with them and
        .846 without. How many, and how near to the start, was chosen on that family's validation images; on a second
        family 16 give .832 instead of .833, and 4 .817 instead of .827.
        Examples that were fitted say nothing of the result any more: choose and report on others. Embeddings by token,
        heads that are tied to them and packed experts stay as the start has them.
    """
    counts = [job.examples.count(task) for task in job.examples.counts]
    mean = sum(counts) / len(counts)
    own_ridge, own_floor = of_examples(mean, inner)
    few = _COPIES_BESIDE if drawn else _COPIES
    copies = (few if mean <= _FEW and have_images(job.examples) else 0) if shifts == "auto" else shifts
    if copies:
        if not have_images(job.examples):
            raise UserError("progressive_least_squares: only images can be shifted; set shifts to 0")
        job = replace(job, examples=shifted(job.examples, copies, job.recipe.seed))
    if drawn:
        job = replace(job, examples=beside(job.examples, stand_ins(job, drawn)))
        own_ridge, own_floor = min(own_ridge, RIDGE), min(own_floor, FLOOR)
    if answers:
        job = replace(job, examples=answered(job, answers))
    settings = Settings(
        target, own_ridge if ridge == "auto" else ridge, own_floor if floor == "auto" else floor, first_token,
        errors=errors, draws=(4 if mean <= _FEW_DRAWN else 1) if draws == "auto" else draws,
    )  # fmt: skip
    return solve(job, inner, start_of(inner, params), settings)
