"""Whether examples have labels, and are of several classes, where an objective would else be best met by one class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Mapping

from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch
from mergeline.merging.learning.contract import Job
from mergeline.merging.learning.directions import Inputs
from mergeline.merging.learning.network import Network
from mergeline.merging.learning.objectives import Objective
from mergeline.merging.learning.pool import Pool
from mergeline.merging.learning.teachers import Teachers

if TYPE_CHECKING:
    from torch import Tensor

ENOUGH = 16  # unlabelled examples, all of which are hardly of one class by chance


def refuse_no_labels(job: Job, objective: Objective) -> None:
    """Raises UserError where the objective compares with labels and the examples have none."""
    if objective.labels and not job.examples.labelled:
        raise UserError(
            "the objective compares with labels, and the examples have none; choose another objective"
        )


def refuse_one_label(job: Job, inputs: Inputs) -> None:
    """Raises UserError where all examples of a task, two or more, have one label."""
    for expert in inputs.experts:
        for task in job.examples.tasks_of(expert):
            labels = torch.cat([batch["labels"].reshape(-1) for batch in job.examples.of(task)])
            if job.examples.count(task) > 1 and _are_one(labels):
                raise UserError(
                    f"all {job.examples.count(task)} examples of '{task}' are of class {int(labels[0])}, and labels of "
                    "one class teach a merge to say nothing else; bring examples of several classes, or more of them"
                )


def refuse_one_prediction(job: Job, inputs: Inputs) -> None:
    """Raises UserError where a task's own expert takes all its examples, `ENOUGH` or more, for one class.

    That is all that can be known of examples without labels. The network is left with the weights of an expert.
    """
    for expert in inputs.experts:
        tasks = [task for task in job.examples.tasks_of(expert) if job.examples.count(task) >= ENOUGH]
        if tasks:
            inputs.load(job.network, expert)
        for task in tasks:
            found = []
            with torch.no_grad():
                for batch in job.examples.of(task):
                    logits = job.network.logits(job.network.features(batch), task)
                    found.append(logits.argmax(1))
                    if logits.shape[1] < 2 or not _are_one(torch.cat(found)):
                        break
                else:
                    raise UserError(
                        f"'{expert}' takes all {job.examples.count(task)} examples of '{task}' for class "
                        f"{int(found[0][0])}, and predictions of one class teach a merge to say nothing else; bring "
                        "examples of several classes, or choose an objective of features (`objective: cosine`)"
                    )


def say_one_prediction(job: Job, pools: Mapping[str, Pool], teachers: Teachers) -> None:
    """Say where a task's own expert takes all that is fitted, `ENOUGH` examples or more, for one class."""
    for task, pool in pools.items():
        if job.network.score is None or task in job.network.numbers or job.examples.count(task) < ENOUGH:
            continue
        if (found := _only_prediction(job.network, pool, teachers)) is not None:
            job.say(
                f"the expert of '{task}' takes all {job.examples.count(task)} examples for class {found}, so that "
                "nothing shows what the merge makes of the others; bring examples of several classes"
            )


def _only_prediction(network: Network, pool: Pool, teachers: Teachers) -> int | None:
    """The class that a task's own expert takes all that is fitted for, if it is one of several."""
    first = None
    for unit in pool.cut(1):  # the first two differ where all is well; logits of all would be large
        expert = teachers.of(pool.task, unit)
        with torch.no_grad(), network.lent(expert.heads):
            logits = network.logits(expert.features, pool.task)
        classes = logits.argmax(1)
        first = classes[0] if first is None else first
        if logits.shape[1] < 2 or not bool((classes == first).all()):
            return None
    return None if first is None else int(first)


def _are_one(classes: Tensor) -> bool:
    return bool((classes == classes[0]).all())
