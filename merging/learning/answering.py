"""Longer texts than there are: prompts, and what each task's own expert writes after them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch
from mergeline.merging.learning.directions import Inputs
from mergeline.merging.learning.network import Batch, Examples

if TYPE_CHECKING:
    from mergeline.merging.learning.contract import Job


def answered(job: Job, tokens: int) -> Examples:
    """The examples of a job, prompts, each with up to so many tokens that its task's own expert writes after it.

    The likeliest token each time, so that no label is needed and the same is written again.

    Raises:
        UserError: these models write no text.
    """
    extend = job.network.extend
    if extend is None:
        raise UserError(f"{job.recipe.method}: only language models write answers; leave `answers` out")
    found: dict[str, list[Batch]] = {}
    with Inputs(job.recipe.model_copy(update={"rules": []}), job.device) as inputs, torch.no_grad():
        for expert in inputs.experts:
            inputs.load(job.network, expert)
            for task in job.examples.tasks_of(expert):
                found[task] = [extend(job.network.module, batch, tokens) for batch in job.examples.of(task)]
    counts = {task: job.examples.count(task) for task in found}
    batches = {task: lambda task=task: found[task] for task in found}
    return replace(job.examples, batches=batches, counts=counts, first=None)
