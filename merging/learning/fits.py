"""Whole fits, as methods call them: of coefficients of directions, of one mask, of all weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Mapping

from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.engine.work import Count
from mergeline.merging.errors import UserError
from mergeline.merging.files import write_json
from mergeline.merging.lazy import torch
from mergeline.merging.learning.classes import (
    refuse_no_labels,
    refuse_one_label,
    refuse_one_prediction,
    say_one_prediction,
)
from mergeline.merging.learning.contract import Job, is_learned
from mergeline.merging.learning.corrections import started
from mergeline.merging.learning.descent import CURVE, Descent, Schedule, pools_of
from mergeline.merging.learning.directions import Directions, Inputs
from mergeline.merging.learning.objectives import Objective
from mergeline.merging.learning.pool import Pool
from mergeline.merging.learning.spaces import (
    Coefficients,
    Form,
    Masks,
    Mergeable,
    MetaMasks,
    Numbers,
    Penalty,
    Weights,
    fitted_tensors,
    load_tensors,
    write_tensors,
)
from mergeline.merging.learning.teachers import Teachers
from mergeline.merging.recipes.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor


def fitted_coefficients(
    job: Job,
    params: Mapping[str, Any],
    form: Form,
    objective: Objective,
    schedule: Schedule,
    penalty: Penalty | None = None,
) -> Recipe:
    """Coefficients of directions, by gradients. params: of `weighted`, which merges the result."""

    def space(inputs: Inputs) -> Mergeable:
        directions = Directions(inputs, job.network, job.folder, params)
        return Coefficients(directions, job.network, form, job.recipe, penalty)

    return _fitted(job, space, objective, schedule)


def fitted_mask(
    job: Job, weight: float, objective: Objective, schedule: Schedule, initial: float, temperature: float
) -> Recipe:
    """One mask of all entries of base + weight * sum of task vectors."""
    params = {"directions": "task_vectors", "initial": weight}

    def space(inputs: Inputs) -> Mergeable:
        together = [weight] * len(inputs.experts)
        directions = Directions(inputs, job.network, job.folder, params, together)
        return Masks(directions, job.network, job.recipe, params, initial, temperature, job.recipe.seed)

    return _fitted(job, space, objective, schedule)


def fitted_under_mask(
    job: Job,
    form: Form,
    objective: Objective,
    meta: Schedule,
    schedule: Schedule,
    initial: float,
    temperature: float,
) -> Recipe:
    """A mask fitted to coefficients that have taken a step of their own (see `MetaMasks`), then coefficients to it.

    meta: of the mask, two steps for each that it takes. schedule: of the coefficients.
    """
    steps = meta.steps + schedule.steps
    with Inputs(job.recipe, job.device) as inputs:
        part, pools = part_of(job, "mask", 0, steps), pools_of(job, meta)
        file = part.folder / "multipliers.safetensors"
        directions = Directions(inputs, job.network, job.folder, {"directions": "task_vectors"})
        if not file.is_file():
            teachers = made_ready(job, inputs, objective, meta, pools)
            masks = MetaMasks(directions, job.network, form, initial, temperature, job.recipe.seed)
            Descent(part, inputs, masks, objective, meta, pools, teachers).run()
            with torch.no_grad():
                write_tensors(file, {piece.name: masks.multiplier(piece) for piece in directions.pieces})
        multipliers = {name: mask.to(directions.device) for name, mask in load_tensors(file).items()}
        part, pools = part_of(job, "coefficients", meta.steps, steps), pools_of(job, schedule)
        teachers = made_ready(job, inputs, objective, schedule, pools)
        space = Coefficients(directions, job.network, form, job.recipe, multipliers=multipliers)
        Descent(part, inputs, space, objective, schedule, pools, teachers).run()
        write_json(job.folder / CURVE, joined_curves(job.folder / "mask", part.folder))
        return space.recipe(job.folder)


def joined_curves(*folders: Path) -> list[dict[str, Any]]:
    """The rows of fits that came one after the other, with their folders' names as `part`."""
    found: list[dict[str, Any]] = []
    for folder in folders:
        rows = json.loads((folder / CURVE).read_bytes())
        before = found[-1]["step"] + 1 if found else 0
        found += [{**row, "step": before + row["step"], "part": folder.name} for row in rows]
    return found


def fitted_weights(
    job: Job, start: str, start_params: Mapping[str, Any], objective: Objective, schedule: Schedule
) -> Recipe:
    """All weights that are merged, from those that another method gives, which may be a learned one.

    Raises:
        UserError: examples are to be held out that a learned start was fitted to.
    """
    if schedule.held_out and is_learned(start):
        raise UserError(
            f"{start} is fitted to all examples, so that held-out ones would say nothing; set held_out to 0"
        )

    def space(inputs: Inputs) -> Mergeable:
        begun = started(job, start, start_params)
        merged = open_checkpoint(begun.folder)
        own = job.network.tensors()
        job.network.load({name: merged.read(name) for name in merged.tensors if name in own})
        return Weights(job.network, inputs.names, begun.recipe)

    return _fitted(job, space, objective, schedule)


def _fitted(
    job: Job, make: Callable[[Inputs], Mergeable], objective: Objective, schedule: Schedule
) -> Recipe:
    with Inputs(job.recipe, job.device) as inputs:
        pools = pools_of(job, schedule)
        teachers = made_ready(job, inputs, objective, schedule, pools)
        space = make(inputs)
        Descent(job, inputs, space, objective, schedule, pools, teachers).run()
        return space.recipe(job.folder)


def part_of(job: Job, name: str, before: int, total: int) -> Job:
    """A fit that is a part of another, in a folder of its own; so many steps of so many were done before."""
    folder, told = job.folder / name, job.progress
    folder.mkdir(parents=True, exist_ok=True)
    if told is None:
        return replace(job, folder=folder)
    return replace(
        job, folder=folder, progress=lambda done, of: told(Count.of(before + done, 0), Count.of(total, 0))
    )


@dataclass(frozen=True)
class Opened:
    """For methods that go by gradients in a way of their own: the losses, the directions, and their coefficients.

    The coefficients (D, 1) of each piece may be changed in place between losses.
    """

    descent: Descent
    directions: Directions
    coefficients: dict[str, Tensor]


def opened(
    job: Job, inputs: Inputs, initial: float, objective: Objective, schedule: Schedule, pools: Mapping[str, Pool]
) -> Opened:  # fmt: skip
    """Task vectors with coefficients that are all `initial`."""
    teachers = made_ready(job, inputs, objective, schedule, pools)
    directions = Directions(inputs, job.network, job.folder, {"directions": "task_vectors"})
    space = Coefficients(directions, job.network, Numbers(lambda piece, d: initial), job.recipe)
    descent = Descent(job, inputs, space, objective, schedule, pools, teachers)
    return Opened(descent, directions, space.numbers)


def made_ready(
    job: Job, inputs: Inputs, objective: Objective, schedule: Schedule, pools: Mapping[str, Pool]
) -> Teachers | None:
    """The experts' outputs where anybody asks; the network is as the base, its merged tensors ready for gradients."""
    refuse_no_labels(job, objective)
    if objective.labels:
        refuse_one_label(job, inputs)
    elif objective.sharpens:
        refuse_one_prediction(job, inputs)
    teachers = None
    if objective.expert or schedule.held_out:
        teachers = Teachers(inputs, job.network, job.examples, pools, job.folder, objective.hidden)
        if not objective.sharpens:
            say_one_prediction(job, pools, teachers)
    inputs.load_start(job.network)
    fitted_tensors(job.network, inputs.names)
    return teachers
