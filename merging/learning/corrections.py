"""Adapters of tasks, fitted: what brings a merge's features, or its blocks' outputs, to those of each task's expert.

The merge is made first, in the job's folder; then the merge and one expert after the other are run on the examples of
each task, and what they gave is kept: a fit runs a model once on an example, but where blocks are corrected.

Shape suffixes: N examples of a task, D width of the features, R rank of a correction.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, Sequence

from mergeline.merging.api import merge
from mergeline.merging.checkpoints.adapters import is_adapter
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.checkpoints.task_adapters import (
    TaskAdapter,
    adapter_path,
    operated,
    write_task_adapter,
)
from mergeline.merging.engine.work import Count
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch
from mergeline.merging.learning.contract import Job, inner_recipe
from mergeline.merging.recipes.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

_BATCH = 16  # images a step of Representation Surgery
EACH = 2  # steps an iteration, each on a batch of its own


@dataclass(frozen=True)
class Start:
    """What is corrected: a recipe of ordinary methods, its merge in the job's folder, and that merge's digest."""

    recipe: Recipe
    folder: Path
    digest: str


def started(job: Job, inner: str, params: Mapping[str, Any]) -> Start:
    """Merge by `inner`, which may be a learned method itself."""
    recipe = inner_recipe(job, inner, params)
    place = job.folder / "merge"
    manifest = merge(recipe, place, device=job.device, workers=1)
    return Start(recipe, place, manifest["output"]["digest"])


def corrected(
    job: Job, start: Start, fitted: Callable[[str, Tensor, Tensor], tuple[str, dict[str, Tensor]]]
) -> Recipe:
    """The start's recipe with an adapter for every task that has an expert.

    fitted: of a task, and the features (N, D) of the merge and of the task's own expert on its examples, the adapter's
    kind and tensors.
    """
    load(job, start.folder)
    tasks = [task for expert in job.recipe.experts for task in job.examples.tasks_of(expert)]
    merged = {task: features(job, task) for task in tasks}
    adapters: dict[str, Path] = {}
    for expert in job.recipe.experts:
        load(job, expert_folder(job, expert))
        for task in job.examples.tasks_of(expert):
            kind, tensors = fitted(task, merged[task], features(job, task))
            adapters[task] = written(job, start, task, kind, tensors)
            tell(job, len(adapters), len(tasks))
    return start.recipe.model_copy(update={"adapters": adapters})


def tell(job: Job, done: int, tasks: int) -> None:
    """Say how many tasks of how many are fitted."""
    if job.progress:
        job.progress(Count.of(done, 0), Count.of(tasks, 0))


def written(job: Job, start: Start, task: str, kind: str, tensors: Mapping[str, Tensor]) -> Path:
    """Write the adapter of a task into the job's folder."""
    path = adapter_path(job.folder, task)
    write_task_adapter(path, TaskAdapter(kind, task, start.digest, tensors))  # type: ignore[arg-type]
    return path


def load(job: Job, folder: Path) -> None:
    """Give the job's network the weights of a checkpoint."""
    checkpoint = open_checkpoint(folder)
    job.network.load({name: checkpoint.read(name) for name in checkpoint.tensors})


def expert_folder(job: Job, name: str) -> Path:
    """Where the weights of an expert lie; of an adapter, what it makes of the base is written into the job's folder."""
    path = job.recipe.experts[name]
    if not is_adapter(open_checkpoint(path)):
        return path
    place = job.folder / "experts" / name
    experts, heads = {name: path}, job.recipe.heads
    merge(
        {"method": "average", "base": job.recipe.base, "experts": experts, "heads": heads}, place, workers=1
    )
    return place


def features(job: Job, task: str) -> Tensor:
    """The features (N, D) that the network's present weights give a task's examples."""
    with torch.no_grad():
        return torch.cat([job.network.features(batch).float() for batch in job.examples.of(task)]).cpu()


# ---------------------------------------------------------------------------------------------- in closed form


def linear(merged_ND: Tensor, expert_ND: Tensor, ridge: float) -> dict[str, Tensor]:
    """The A (D, D) and c (D) of least mean |f + A f + c - g|² + ridge * mean(diag G) * |A, c|².

    f are the merge's features and g the expert's, G = mean of [f 1]' [f 1], the sums in float64.
    """
    f_ND, gap_ND = merged_ND.double(), (expert_ND - merged_ND).double()
    x_NC = torch.cat([f_ND, torch.ones_like(f_ND[:, :1])], dim=1)
    gram_CC = x_NC.T @ x_NC / len(x_NC)
    gram_CC.diagonal().add_(ridge * gram_CC.diagonal().mean())
    solved_CD = torch.linalg.solve(gram_CC, x_NC.T @ gap_ND / len(x_NC))
    return {"matrix": solved_CD[:-1].T.contiguous(), "offset": solved_CD[-1].contiguous()}


# ---------------------------------------------------------------------------------------------- by gradients


def surgery(
    merged_ND: Tensor, expert_ND: Tensor, rank: int, rate: float, steps: int, seed: Sequence[Any]
) -> dict[str, Tensor]:
    """D (R, D) and U (D, R) of least mean |f - U relu(D f) - g|_1, by Adam: `steps` iterations of two batches of 16.

    Raises:
        UserError: a loss that is not finite.
    """
    down_RD, up_DR = beginning(merged_ND.shape[1], rank, seed)
    optimiser = torch.optim.Adam([down_RD, up_DR], lr=rate)
    for step, which in enumerate(batches(len(merged_ND), EACH * steps, seed)):
        loss = (operated(merged_ND[which], down_RD, up_DR) - expert_ND[which]).abs().mean()
        descend(optimiser, loss, step)
    return {"down": down_RD.detach(), "up": up_DR.detach()}


def beginning(width: int, rank: int, seed: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The factors before the first step: D by Kaiming's uniform rule (a = √5), U zero, so that nothing is changed."""
    down_RD = torch.empty(rank, width)
    bound = width**-0.5  # √(6 / ((1 + a²) width))
    down_RD.uniform_(-bound, bound, generator=_generator(*seed, "start"))
    return down_RD.requires_grad_(), torch.zeros(width, rank).requires_grad_()


def descend(optimiser: torch.optim.Optimizer, loss: Tensor, step: int) -> None:
    """One step down the gradient of a loss (raises UserError if it is not finite)."""
    if not bool(torch.isfinite(loss)):
        raise UserError(f"the loss of step {step + 1} is not finite; lower the rate, or look at the examples")
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def batches(count: int, steps: int, seed: Sequence[Any]) -> Iterator[Tensor]:
    """The indices of each step's examples, 16 or all there are: in a drawn order, drawn anew where it is used up."""
    size, generator = min(_BATCH, count), _generator(*seed, "order")
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(count, generator=generator)
        which, order = order[:size], order[size:]
        yield which


def _generator(*seed: Any) -> torch.Generator:
    from hashlib import sha256

    digest = sha256(repr(seed).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
