"""Coefficients of directions, fitted to any objective."""

from __future__ import annotations

from typing import Any

from mergeline.merging.errors import UserError
from mergeline.merging.learning.contract import Job, learned
from mergeline.merging.learning.descent import Optimiser, Schedule
from mergeline.merging.learning.directions import Piece
from mergeline.merging.learning.fits import fitted_coefficients
from mergeline.merging.learning.objectives import objective_of
from mergeline.merging.learning.spaces import Numbers, Squash
from mergeline.merging.methods.parameters import BelowOne, Count, Positive, PositiveCount, Share
from mergeline.merging.methods.parts import Kind, Over
from mergeline.merging.recipes.recipe import Recipe


@learned(paper="Mergeline's own, of 2310.02575 (AdaMerging), 2412.12153 (CART) and 2503.08099 (WUDI)")
def coefficients(
    job: Job,
    *,
    directions: Kind = "cart_wudi",
    over: Over = "singular",
    shared: bool = False,
    count: PositiveCount = 1,
    squash: Squash = "none",
    initial: float | None = None,
    rank: Share = 0.25,
    objective: str = "cosine",
    temperature: Positive = 1.0,
    optimiser: Optimiser = "adam",
    rate: Positive = 3e-2,
    iterations: Count = 130,
    batch: PositiveCount = 8,
    shifts: Count = 0,
    held_out: BelowOne = 0.0,
) -> Recipe:
    """origin + the sum of coefficient * direction, the coefficients fitted so that features become the experts'.

    By default each singular value of CART's parts around the mean, and of what cart_wudi adds to them, has its own
    coefficient, and the fit begins at cart_wudi with `low_rank` 0.5 and `scale` 1.5: on 400 unlabelled images a task of
    the sample family, mean test accuracy went from .780 to .815; where models have heads, with `objective: kl`, `rank:
    0.5`, 300 iterations and 3 shifts, to .855 (on a second family .848, where features give .829). Adam, warmed up for
    10 steps, its rate falling along a cosine to 2 %; or L-BFGS, which sees all examples in each step, up to 25 times.

    Formula:
        argmin_c Σₜ objective(features of task t, expert t's);  W = θₒ + Σ_d c_d D_d, see `weighted`
    Parameters:
        directions: what is added up, as of `weighted`
        over: what one number multiplies, as of `weighted`
        shared: whether all tensors have the same numbers
        count: of chunks or random parts that a direction is cut into
        squash: how a number becomes a coefficient: as it is, held in [0, 1], or by a sigmoid or softmax
        initial: of every coefficient; by default that of the method that the directions are of
        rank: of the parts of `cart` and `cart_wudi`
        objective: entropy, cosine, l1, l2, kl, hidden, pseudo_labels, cross_entropy (labels), or module:function
        temperature: of the distributions that kl compares
        optimiser: Adam, or L-BFGS with a search along each line, which needs no rate and few iterations
        rate: of Adam
        iterations: how many steps
        batch: examples of a task in a step, or, of L-BFGS, at once
        shifts: of images, how many copies of each that are moved by up to 3 pixels are fitted too
        held_out: the share of the examples on which agreement with the experts stops the fit; 0 takes the last step
    Trap:
        The directions limit what can be had more than the objective does: coefficients of plain task vectors stay
        below the best merges without data. L-BFGS goes to the minimum on these examples, and so overfits few of them
        unless `held_out` stops it. A function module:function is code, and is run.
    """
    if over == "singular" and shared:
        raise UserError(
            "coefficients: singular values differ by tensor; leave out `shared`, or `over: singular`"
        )
    form = Numbers(starts(directions, initial, len(job.recipe.experts)), shared, squash, lambda name: count)
    schedule = Schedule(
        iterations, batch, rate, optimiser, warmup=10, cosine=0.02, held_out=held_out, copies=shifts
    )
    params: dict[str, Any] = {"directions": directions, "over": over, "rank": rank}
    return fitted_coefficients(job, params, form, objective_of(objective, temperature), schedule)


def starts(directions: Kind, initial: float | None, experts: int) -> Any:
    """The coefficient that a fit begins with, of a piece and one of its directions."""
    own = {"task_vectors": 0.3, "ties": 0.3, "cart": 1.0, "cart_wudi": 0.75, "tsv": 1.0}[directions]

    def start(piece: Piece, d: int) -> float:
        if initial is not None:
            return initial
        if directions == "tsv" and not piece.matrix:
            return 1 / experts
        return 1.5 if directions == "cart_wudi" and d == experts else own

    return start
