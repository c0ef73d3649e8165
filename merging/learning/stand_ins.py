"""Examples for experts without data: procedural pictures, for each expert those that its task vector moves most.

With common inputs the experts of T tasks ask for T answers, and least squares gives their average. What a task vector
moves more than the others do stands in for inputs of its own task: of a picture x, at the inputs z of the linear map k
of the base's blocks,

    a_t(x, k) = sum over tokens of |tau_tk z|^2 / |tau_tk|^2,   S_t(x) = mean over k of log(a_t / sum_u a_u),

less each task's mean over the pool, then each picture's mean over tasks. The highest S_t are task t's.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Iterator, Mapping, Sequence

from mergeline.merging.algebra.slots import View
from mergeline.merging.canonical import text_digest
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch
from mergeline.merging.learning.contract import Job
from mergeline.merging.learning.directions import Inputs
from mergeline.merging.learning.network import Batch, Examples, Pictures
from mergeline.merging.learning.procedural import pictures
from mergeline.merging.learning.watching import Applied, watched

if TYPE_CHECKING:
    from torch import Tensor

_BATCH = 100
SPLIT = "procedural images"


POOL = 3600  # pictures that are chosen from
RIDGE, FLOOR = 10.0, 0.5  # of a fit to those that are chosen


def stand_ins(job: Job, chosen: int, pool: int = POOL) -> Examples:
    """So many pictures of a pool for each expert, drawn by the recipe's seed; each expert has one task, its own.

    Raises:
        UserError: the models are not of images; the pool is smaller than what is chosen of it.
    """
    kind, seed = job.network.pictures, job.recipe.seed
    if kind is None:
        raise UserError(f"{job.recipe.method} draws images, which these models do not take")
    if chosen > pool:
        raise UserError(
            f"{job.recipe.method}: a pool of {pool} has no {chosen} images to choose; choose fewer"
        )
    with Inputs(job.recipe) as source, torch.no_grad():
        source.load(job.network, "base")
        scores_TP = _scores(job, source, kind, pool)
    best_TC = scores_TP.argsort(dim=1, descending=True, stable=True)[:, :chosen].sort(1).values.tolist()
    names = list(job.recipe.experts)
    own = dict(zip(names, best_TC))
    return Examples(
        batches={
            name: lambda name=name, numbers=numbers: _batches(kind, name, numbers, seed)  # type: ignore[misc]
            for name, numbers in own.items()
        },
        counts=dict.fromkeys(names, chosen),
        owners={name: name for name in names},
        digests={name: text_digest([kind.size, seed, numbers]) for name, numbers in own.items()},
        split=SPLIT,
    )


def of_tasks(drawn: Examples, owners: Mapping[str, str]) -> Examples:
    """What was drawn for each expert, as examples of its tasks (`owners`: task -> expert)."""
    owners = {task: owner for task, owner in owners.items() if owner in drawn.counts}

    def batches(task: str) -> Iterator[Batch]:
        for batch in drawn.of(owners[task]):
            yield {**batch, "task": task}

    return replace(
        drawn,
        batches={task: partial(batches, task) for task in owners},
        counts={task: drawn.count(owner) for task, owner in owners.items()},
        owners=owners,
        digests={task: drawn.digests[owner] for task, owner in owners.items()},
    )


def beside(examples: Examples, drawn: Examples) -> Examples:
    """The examples of each task, and after them what was drawn for its expert."""
    added = of_tasks(drawn, examples.owners)

    def batches(task: str) -> Iterator[Batch]:
        yield from examples.of(task)
        yield from added.of(task)

    return replace(
        examples,
        batches={task: partial(batches, task) for task in added.owners},
        counts={task: examples.count(task) + added.count(task) for task in added.owners},
        owners=added.owners,
        first=None,
    )


def _batches(kind: Pictures, task: str, numbers: Sequence[int], seed: int) -> Iterator[Batch]:
    for start in range(0, len(numbers), _BATCH):
        drawn = pictures(numbers[start : start + _BATCH], kind.size, seed)
        yield {"task": task, "images": kind.prepared(drawn)}


def _scores(job: Job, source: Inputs, kind: Pictures, pool: int) -> Tensor:
    """S (T, pool) of the base, whose weights are in place."""
    own, model = job.network.tensors(), source.plan.model
    assert model is not None
    taus: dict[str, list[Tensor] | None] = {}
    parts: list[Tensor] = []
    inside = {
        entry.name: source.view(entry) for entry in source.plan.merged
        if entry.name in own and own[entry.name].ndim == 2 and model.tensors[entry.name].layer is not None
    }  # fmt: skip

    def see(applied: Applied) -> None:
        name, x = applied.tensor, applied.inputs
        if name not in inside or applied.kind != "linear" or applied.part is not None:
            return
        if name not in taus:
            taus[name] = _directions(source, inside[name], own[name], x, applied.outputs)
        found = taus[name]
        if found is None:
            return
        a_TB = torch.stack([(x @ tau_NM).square().flatten(1).sum(1) for tau_NM in found])
        parts.append((a_TB / a_TB.sum(0)).clamp_min(1e-12).log())

    columns = []
    for start in range(0, pool, _BATCH):
        drawn = pictures(range(start, min(start + _BATCH, pool)), kind.size, job.recipe.seed)
        with watched(own, see):
            job.network.features({"task": "", "images": kind.prepared(drawn)})
        if not parts:
            raise UserError(
                f"{job.recipe.method}: the blocks of these models have no linear maps to choose by"
            )
        columns.append(torch.stack(parts).double().mean(0))
        parts.clear()
    scores_TP = torch.cat(columns, 1)
    scores_TP = scores_TP - scores_TP.mean(1, keepdim=True)
    return scores_TP - scores_TP.mean(0, keepdim=True)


def _directions(source: Inputs, view: View, weight: Tensor, x: Tensor, y: Tensor) -> list[Tensor] | None:
    """Each task vector of a map over its norm, (N, M); None where an expert has none, which ranks nothing."""
    shape, found = weight.shape, []
    base = source.read_like(weight, view, "base")
    for expert in source.plan.experts:
        tau = source.read_like(weight, view, expert) - base
        if not float(tau.norm()) > 0:
            return None
        tau_NM = tau.T if (x.shape[-1], y.shape[-1]) == (shape[1], shape[0]) else tau
        found.append((tau_NM / tau.norm()).contiguous())
    return found
