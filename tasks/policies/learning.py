"""Decision Transformers as learners see them, and the trajectories that they learn from.

Shape suffixes: B windows of a batch, T steps of one, R steps that count in all, d width of the model, A numbers of an
action.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Iterator, Mapping

from mergeline.merging.errors import UserError
from mergeline.merging.learning.network import Examples, Network
from mergeline.tasks.data_step import dataset

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from torch import Tensor

    from mergeline.tasks.policies.family import Family

FILE = "trajectories.npz"  # of the folder of a task in build/data
_WINDOWS = 64  # of each task, where nothing else is said
_BATCH = 16


def network_of(family: Family, like: Path) -> Network:
    """The trunk of `like` under the head of the batch's task.

    Its features (R, d) are the hidden states from which the actions are predicted, of the steps that count; its logits
    (R, A) are these predictions: logits of discrete actions, else the numbers of an action.
    """
    trunk, policies = family.model(like), family.policies

    def run(module: Any, batch: Any) -> Tensor:
        policy = policies[batch["task"]]
        policy.put_on(module)
        return policy.hidden(batch)[batch["attention_mask"].bool()]

    return Network(
        trunk,
        run,
        lambda features, task: policies[task].predicted(features),
        apart=family.head_names,
        numbers=frozenset(task for task, policy in policies.items() if not policy.facts.discrete),
    )


def examples_of(family: Family, split: str) -> Examples:
    """Windows of the trajectories of each task, as long as its context, 64 or more where a merge asks for more.

    Batches: "task", "states" (B, T, s), "actions" (B, T, A), "returns_to_go" (B, T, 1), "timesteps" and
    "attention_mask", int64 (B, T).
    """
    from mergeline.evaluation.policies.trajectories import digest, read_trajectories, windows
    from mergeline.tasks.policies.family import facts

    params = family.params
    if split != "fit":
        raise UserError(f"policies have no examples of '{split}', which is of episodes; leave `split` out")
    found: dict[str, dict[str, np.ndarray]] = {}
    for task, settings in params.policies.tasks.items():
        if task not in params.policies.trajectories.files:
            raise UserError(
                f"'{task}' has no trajectories to learn from; name a file of them: `trajectories: {{files: {{{task}: "
                "PATH.npz}}`"
            )
        arrays = read_trajectories(dataset(family.build, task) / FILE, facts(family.build, task))
        found[task] = windows(arrays, settings.context)
    return Examples(
        {task: partial(_batches, task, own, params.device) for task, own in found.items()},
        {task: len(own["mask"]) for task, own in found.items()},
        params.owners,
        {task: digest(own) for task, own in found.items()},
        split,
        first=_WINDOWS,
    )


def _batches(task: str, arrays: Mapping[str, np.ndarray], device: str) -> Iterator[dict[str, Any]]:
    import torch

    own = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    for start in range(0, len(own["mask"]), _BATCH):
        some = slice(start, start + _BATCH)
        yield {
            "task": task,
            "states": own["observations"][some],
            "actions": own["actions"][some],
            "returns_to_go": own["returns_to_go"][some, :, None],
            "timesteps": own["timesteps"][some],
            "attention_mask": own["mask"][some].long(),
        }
