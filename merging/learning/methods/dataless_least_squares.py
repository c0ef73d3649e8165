"""Progressive least squares without data: on procedural images that the task vectors choose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mergeline.merging.learning.contract import Job, learned
from mergeline.merging.learning.least_squares import Errors, Settings, solve
from mergeline.merging.learning.methods.progressive_least_squares import start_of
from mergeline.merging.learning.stand_ins import FLOOR, POOL, RIDGE, SPLIT, of_tasks, stand_ins
from mergeline.merging.methods.parameters import NotNegative, Positive, PositiveCount
from mergeline.merging.recipes.recipe import Recipe


@learned(
    paper="Mergeline's own, of 2212.09849 (RegMean)",
    data="none",
    stand_in=SPLIT,
    chosen_on="validation images of the sample family",
)
def dataless_least_squares(
    job: Job,
    *,
    inner: str = "cart_wudi",
    pool: PositiveCount = POOL,
    chosen: PositiveCount = 200,
    ridge: NotNegative = RIDGE,
    floor: NotNegative = FLOOR,
    first_token: Positive = 16.0,
    errors: Errors = "alike",
    draws: PositiveCount = 4,
    **params: Any,
) -> Recipe:
    """`progressive_least_squares` where no image of any task is at hand: drawn ones stand in, chosen by task vectors.

    A pool of images is drawn: noise, shapes, strokes, textures. The base is run on them, and each expert is given those
    that its task vector moves most, compared with the others'. No data and no labels are looked at; heads and class
    names only where `errors` is `classes`, which gives .816 instead of .810 on the sample family, and .818 instead of
    .810 on a second.

    Formula:
        aₜ(x, k) = Σ over tokens ‖τₜₖ z‖² / ‖τₜₖ‖², z the inputs of the linear map k of the base's blocks
        Sₜ(x) = mean over k of log(aₜ / Σᵤ aᵤ), less each task's mean over x, then each image's mean over tasks
        the `chosen` images of highest Sₜ are task t's; then as progressive_least_squares with residual targets
    Parameters:
        inner: what makes the start; its parameters stand beside these
        pool: how many images are drawn
        chosen: how many of them each expert is given
        ridge: toward the start, in mean diagonals of G
        floor: of the metric of the ridge
        first_token: the weight of the token that a model is read out at, where it is the first
        errors: as of progressive_least_squares; `classes` looks at the tasks' heads
        draws: directions of every image's features, or pairs of classes, that tell what is felt
    Needs:
        models of images
    Trap:
        It sees no data, but its ridge, metric and start were chosen on the validation images of one family, of small
        images: elsewhere a ridge that is too small makes the merge worse than its start. The images do not choose the
        ridge either: agreement with the experts on further ones prefers ridges that are too small.
    """
    examples = stand_ins(job, chosen, pool)
    if errors == "classes":  # which are of tasks
        examples = of_tasks(examples, job.examples.owners)
    settings = Settings("residual", ridge, floor, first_token, errors=errors, draws=draws)
    return solve(replace(job, examples=examples), inner, start_of(inner, params), settings)
