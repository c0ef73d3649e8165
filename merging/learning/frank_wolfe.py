"""Frank and Wolfe's steps over the checkpoints of a pool, whose coefficients are those of a sum of task vectors.

Shape suffixes: D experts, X a tensor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterable, Literal, Mapping, Sequence

from mergeline.merging.engine.work import Count
from mergeline.merging.files import write_json
from mergeline.merging.lazy import torch
from mergeline.merging.learning.contract import Job
from mergeline.merging.learning.descent import CURVE, Descent, Schedule, pools_of
from mergeline.merging.learning.directions import Directions, Inputs, Piece
from mergeline.merging.learning.fits import joined_curves, made_ready, opened, part_of
from mergeline.merging.learning.objectives import Objective
from mergeline.merging.learning.spaces import Coefficients, load_tensors, merged_by, write_tensors
from mergeline.merging.methods.parts import summed
from mergeline.merging.recipes.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

Granularity = Literal["expert", "tensor"]

_COEFFICIENTS, _SELECTION = "coefficients.safetensors", "selection.json"


@dataclass(frozen=True)
class Choice:
    """How checkpoints are chosen: whether for all tensors or by tensor, by the gradient of what on how many examples
    of each task, and how often."""

    granularity: Granularity
    objective: Objective
    examples: int
    iterations: int

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.iterations, self.examples, 1.0)


def step_of(k: int, step_size: float) -> float:
    """How far Frank and Wolfe go at iteration k, from 0."""
    return 2 / (k + 2) * step_size


def selection(
    scores: Sequence[Sequence[float]], granularity: str, taken: Sequence[Sequence[int]] | None = None
) -> list[int]:
    """Which checkpoint each tensor goes toward, by scores (tensors, checkpoints): the least, the first of equals.

    taken: of each tensor, the checkpoints that are out of the question.
    """
    left = [
        [k for k in range(len(row)) if taken is None or k not in taken[j]] for j, row in enumerate(scores)
    ]
    if granularity == "tensor":
        return [min(own, key=row.__getitem__) for own, row in zip(left, scores)]
    sums = [sum(column) for column in zip(*scores)]
    return [min(left[0], key=sums.__getitem__)] * len(scores)


def cosines(gradient_X: Tensor, checkpoints: Iterable[Tensor]) -> list[float]:
    """The cosine of a gradient with each checkpoint's tensor, 0 where one is zero."""
    flat = gradient_X.reshape(-1)
    return [float(torch.cosine_similarity(flat, weights_X.reshape(-1), dim=0)) for weights_X in checkpoints]


def hard(job: Job, choice: Choice, initial: float, step_size: float, scale: float) -> Recipe:
    """From base + initial * sum of task vectors, a step an iteration toward one checkpoint, which may be that start."""
    count, pools = len(job.recipe.experts), pools_of(job, choice.schedule)
    with Inputs(job.recipe, job.device) as inputs:
        # Of the coefficients' space, the gradient by the weights alone is read.
        found = opened(job, inputs, initial, choice.objective, choice.schedule, pools)
        descent, pieces, chosen = found.descent, found.directions.pieces, []
        for k in range(choice.iterations):
            losses = descent.loss(k, keep_gradients=True)
            descent.curve.append({"step": k, "loss": sum(losses.values()), "tasks": losses})
            scores = [_scores(job, found.directions, number, initial) for number in range(len(pieces))]
            picks = selection(scores, choice.granularity)
            step = step_of(k, step_size) * scale
            for piece, pick in zip(pieces, picks):
                toward_D1 = torch.zeros(count, 1, dtype=found.directions.dtype)
                toward_D1[: count if pick == count else 0] = initial
                if pick < count:
                    toward_D1[pick] = 1.0
                c_D1 = found.coefficients[piece.name]
                c_D1.data.copy_(c_D1 + step * (toward_D1 - c_D1))
            names = [*job.recipe.experts, "start"]
            chosen.append(_named([[pick] for pick in picks], pieces, names, choice.granularity, alone=True))
            if job.progress is not None:
                job.progress(Count.of(k + 1, 0), Count.of(choice.iterations, 0))
        descent.put()
        return _result(job, found.directions, found.coefficients, chosen, descent.curve)


def soft(
    job: Job, choice: Choice, initial: float, objective: Objective, schedule: Schedule, later: float
) -> Recipe:
    """From the base, an iteration takes a checkpoint for each task, and fits how far to go toward each of them.

    objective, schedule: of these fits, one coefficient for each tensor. initial, later: where coefficients begin, in
    the first iteration and in the others.
    """
    experts, pools = [*job.recipe.experts], pools_of(job, choice.schedule)
    with Inputs(job.recipe, job.device) as inputs:
        found = opened(job, inputs, 0.0, choice.objective, choice.schedule, pools)
        pieces, chosen, done = found.directions.pieces, [], list[Path]()
        for k in range(choice.iterations):
            part = part_of(job, f"iteration{k}", k * schedule.steps, choice.iterations * schedule.steps)
            # Each iteration sees the examples in another order.
            part = _seeded(part, job.recipe.seed + k)
            file, selected = part.folder / _COEFFICIENTS, part.folder / _SELECTION
            if not file.is_file():
                made_ready(job, inputs, choice.objective, choice.schedule, pools)
                taken: list[list[int]] = [[] for _ in pieces]
                for task in list(pools)[: len(experts)]:
                    found.descent.loss(k, keep_gradients=True, tasks=[task])
                    scores = [_scores(job, found.directions, number) for number in range(len(pieces))]
                    for own, pick in zip(taken, selection(scores, choice.granularity, taken)):
                        own.append(pick)
                write_json(selected, _named(taken, pieces, experts, choice.granularity))
                picks = {piece.name: own for piece, own in zip(pieces, taken)}
                present = {name: c_D1.detach().clone() for name, c_D1 in found.coefficients.items()}
                form = _Toward(present, picks, later if k else initial)
                space = Coefficients(found.directions, job.network, form, job.recipe)
                again = pools_of(part, schedule)
                teachers = made_ready(part, inputs, objective, schedule, again)
                Descent(part, inputs, space, objective, schedule, again, teachers).run()
                write_tensors(file, {piece.name: space.coefficients(piece) for piece in pieces})
            for name, c_D1 in load_tensors(file).items():
                found.coefficients[name].data.copy_(c_D1)
            chosen.append(json.loads(selected.read_bytes()))
            done.append(part.folder)
        found.descent.put()
        return _result(job, found.directions, found.coefficients, chosen, joined_curves(*done))


@dataclass(frozen=True)
class _Toward:
    """present + sum of share * (expert - present) over the experts that were picked: the shares are fitted.

    present: the coefficients (D, 1) of each piece. picks: the experts of each piece.
    """

    present: Mapping[str, Tensor]
    picks: Mapping[str, Sequence[int]]
    initial: float

    def start(self, piece: Piece, over: str, dtype: torch.dtype) -> dict[str, Tensor]:
        return {piece.name: torch.full((len(self.picks[piece.name]), 1), self.initial, dtype=dtype)}

    def coefficients(self, piece: Piece, numbers: Mapping[str, Tensor]) -> Tensor:
        share_P1, present_D1 = numbers[piece.name], self.present[piece.name]
        picked = torch.tensor(self.picks[piece.name], device=share_P1.device)
        return (present_D1 * (1 - share_P1.sum())).index_add(0, picked, share_P1)


def _seeded(job: Job, seed: int) -> Job:
    return replace(job, recipe=job.recipe.model_copy(update={"seed": seed}))


def _named(
    picks: Sequence[Sequence[int]],
    pieces: Sequence[Piece],
    names: Sequence[str],
    granularity: str,
    alone: bool = False,
) -> Any:
    """What was picked, for selection.json: names in order, by tensor where each has its own. alone: but one."""
    named = [[names[pick] for pick in own] for own in picks]
    found = [own[0] for own in named] if alone else named
    return found[0] if granularity == "expert" else {piece.name: own for piece, own in zip(pieces, found)}


def _scores(job: Job, directions: Directions, number: int, initial: float | None = None) -> list[float]:
    """Of every expert at one piece, and of base + initial * sum of task vectors; zeros where there is no gradient."""
    piece = directions.pieces[number]
    count = len(piece.counts)
    gradient = job.network.tensors()[piece.tensor].grad
    if gradient is None:
        return [0.0] * (count + (initial is not None))
    gradient_X = piece.of(gradient)
    origin_X, parts = directions.read(number)
    found = cosines(gradient_X, (origin_X + part.full() for part in parts))
    if initial is None:
        return found
    origin_X, parts = directions.read(number)
    start_X = summed(parts, torch.full((count, 1), initial, dtype=directions.dtype), "whole")
    return found + cosines(gradient_X, [origin_X if start_X is None else origin_X + start_X])


def _result(
    job: Job,
    directions: Directions,
    coefficients: Mapping[str, Tensor],
    chosen: list[Any],
    curve: list[dict[str, Any]],
) -> Recipe:
    write_json(job.folder / _SELECTION, chosen)
    write_json(job.folder / CURVE, curve)
    file = job.folder / _COEFFICIENTS
    write_tensors(file, coefficients)
    return merged_by(job.recipe, "weighted", directions.params, {"coefficients": file})
