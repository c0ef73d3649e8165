"""Classifiers as learners see them, and the examples that they learn from."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Iterator

from mergeline.evaluation.classifiers.labels import matched
from mergeline.evaluation.classifiers.model import Classifier
from mergeline.merging.checkpoints.heads import outputs
from mergeline.merging.errors import UserError
from mergeline.merging.learning.network import Examples, Network, Pictures

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergeline.tasks.classifiers.data import Data
    from mergeline.tasks.classifiers.family import Family


def network_of(family: Family, data: Data) -> Network:
    """The trunk; its features are what the head of the batch's task is given (B, d), its logits what that makes."""
    from mergeline.tasks.classifiers.data import Images

    module = family.module(data.kind)
    data.prepare(module)
    names = _names(family, module)
    classifier = Classifier(module, family.heads)

    def run(own: Any, batch: Any) -> Tensor:
        return classifier.features(batch, batch.get("task"))

    pictures = Pictures(data.image_size, data.pixels) if isinstance(data, Images) else None
    return Network(
        module,
        run,
        classifier.logits,
        names=names,
        pictures=pictures,
        apart=frozenset(classifier.head_names),
        numbers=frozenset(task for task in family.heads if classifier.classes(task) == 1),
    )


def _names(family: Family, module: nn.Module) -> dict[str, str]:
    """The checkpoints' names of the module's tensors, where transformers has others while it runs."""
    known = {name for expert in family.plan.experts.values() for name in expert.tensors}
    foreign = [name for name, _ in module.named_parameters() if name not in known]
    if not foreign:
        return {}
    from mergeline.evaluation.pretrained import names_inside

    found = names_inside(module, family.state(next(iter(family.plan.experts))))
    if found is None:
        raise UserError(
            f"{family.base}: transformers makes '{foreign[0]}' of several tensors of these checkpoints: they are "
            "measured, but not fitted; choose methods without examples"
        )
    return found


def examples_of(family: Family, data: Data, split: str) -> Examples:
    """The examples of a split of every task: of `fit`, or, where there is none, every other one of `val`."""
    params = family.params
    fits_val = split == "fit" and any(data.fits_val(task) for task in params.tasks)
    labels = {task: data.labels(task, split) for task in params.tasks}
    labelled = all(found is not None and found.dtype.kind == "i" for found in labels.values())
    return Examples(
        {task: partial(_batches, family, data, task, split, labelled) for task in params.tasks},
        {task: data.count(task, split) for task in params.tasks},
        params.owners,
        {task: data.digest(task, split) for task in params.tasks},
        "half of val" if fits_val else split,
        labelled,
    )


def _batches(family: Family, data: Data, task: str, split: str, labelled: bool) -> Iterator[dict[str, Any]]:
    """Batches of a task; "labels" are classes of its head."""
    import numpy as np
    import torch

    labels = data.labels(task, split) if labelled else None
    order = matched(task, family.config(task), outputs(family.heads[task]), data.names(task))
    if labels is not None and order:
        labels = np.argsort(order)[labels]
    for which, batch in data.batches(task, split):
        found = {"task": task, **batch}
        if labels is not None:
            device = next(iter(batch.values())).device
            found["labels"] = torch.from_numpy(np.ascontiguousarray(labels[which])).to(device)
        yield found
