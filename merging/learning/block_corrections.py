"""Corrections after every block of a merge, fitted so that its blocks' outputs come to those of each task's expert.

Shape suffixes: N examples of a task, B of a batch, L blocks, D width of the tokens, R rank of a correction.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator

from mergeline.merging.checkpoints.task_adapters import operated
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch
from mergeline.merging.learning.contract import Job
from mergeline.merging.learning.corrections import (
    EACH,
    Start,
    batches,
    beginning,
    descend,
    expert_folder,
    load,
    tell,
    written,
)
from mergeline.merging.learning.network import Batch, block_name, lists_of_blocks, taken
from mergeline.merging.recipes.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn


def block_corrected(job: Job, start: Start, rank: int, rate: float, steps: int) -> Recipe:
    """The start's recipe with an adapter of kind surgery_v2 for every task that has an expert.

    For each task, by Adam: least Σ over blocks of mean |x̄ - ȳ|, x̄ the mean over tokens of the corrected merge's block
    output, ȳ that of the expert's; `steps` iterations of two batches of 16.

    Raises:
        UserError: a model without blocks, a loss that is not finite.
    """
    module = job.network.module
    names = _blocks(module)
    tasks = [(task, e) for e in job.recipe.experts for task in job.examples.tasks_of(e)]
    examples = {task: _joined(list(job.examples.of(task))) for task, _ in tasks}
    targets = {}
    for expert in job.recipe.experts:
        load(job, expert_folder(job, expert))
        for task in job.examples.tasks_of(expert):
            with torch.no_grad():
                parts = [_means(job, names, batch) for batch in job.examples.of(task)]
            targets[task] = torch.cat(parts, dim=1)
    load(job, start.folder)
    module.requires_grad_(False)
    adapters: dict[str, Path] = {}
    for task, _ in tasks:
        tensors = _fitted(job, names, examples[task], targets[task], rank, rate, steps, task)
        adapters[task] = written(job, start, task, "surgery_v2", tensors)
        tell(job, len(adapters), len(tasks))
    return start.recipe.model_copy(update={"adapters": adapters})


def _fitted(
    job: Job,
    names: list[str],
    examples: Batch,
    target_LND: Tensor,
    rank: int,
    rate: float,
    steps: int,
    task: str,
) -> dict[str, Tensor]:
    seed = (job.recipe.seed, task)
    width = target_LND.shape[2]
    factors = {name: beginning(width, rank, (*seed, name)) for name in names}
    moved = {
        name: tuple(f.detach().to(target_LND).requires_grad_() for f in pair)
        for name, pair in factors.items()
    }
    optimiser = torch.optim.Adam([factor for pair in moved.values() for factor in pair], lr=rate)
    for step, which in enumerate(batches(target_LND.shape[1], EACH * steps, seed)):
        found_LBD = _means(job, names, taken(examples, which), lambda name, x: operated(x, *moved[name]))
        descend(optimiser, (found_LBD - target_LND[:, which]).abs().mean(dim=(1, 2)).sum(), step)
    return {
        f"{name}/{part}": factor.detach()
        for name, pair in moved.items()
        for part, factor in zip(("down", "up"), pair)
    }


def _means(
    job: Job, names: list[str], batch: Batch, change: Callable[[str, Tensor], Tensor] | None = None
) -> Tensor:
    """The mean over tokens of each block's output, (L, B, D), `change`d before the next block takes it."""
    seen: dict[str, Tensor] = {}
    with _after_blocks(job.network.module, names, seen, change):
        job.network.features(batch)
    if missing := [name for name in names if name not in seen or seen[name].ndim != 3]:
        raise UserError(f"'{missing[0]}' gives no tokens (examples, tokens, width); take `surgery`")
    return torch.stack([seen[name].float().mean(1) for name in names])


@contextmanager
def _after_blocks(
    module: nn.Module,
    names: list[str],
    seen: dict[str, Tensor],
    change: Callable[[str, Tensor], Tensor] | None,
) -> Iterator[None]:
    def hook(name: str) -> Callable[..., Any]:
        def after(_block: Any, _inputs: Any, output: Any) -> Any:
            x, *rest = output if isinstance(output, tuple) else (output,)
            seen[name] = change(name, x) if change else x
            return (seen[name], *rest) if isinstance(output, tuple) else seen[name]

        return after

    handles = [module.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _blocks(module: nn.Module) -> list[str]:
    """The blocks of a model, by name: the children of one class in the container that holds most parameters.

    Raises:
        UserError: there is none.
    """
    lists = lists_of_blocks(module)
    sizes = {name: sum(p.numel() for p in found.parameters()) for name, found in lists.items()}
    if not sizes:
        raise UserError("the model has no blocks one after the other to correct; take `surgery`")
    largest = max(sizes, key=sizes.__getitem__)
    return [block_name(largest, key) for key, _ in lists[largest].named_children()]


def _joined(parts: list[Batch]) -> dict[str, Any]:
    """Batches of a task as one."""
    first = parts[0]
    return {
        key: torch.cat([part[key] for part in parts]) if isinstance(value, torch.Tensor) else value
        for key, value in first.items()
    }
