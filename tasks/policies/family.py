"""A family of Decision Transformers in build/: which tensors are heads, and the experts' heads as policies."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeline.merging.errors import UserError
from mergeline.merging.files import read_object
from mergeline.tasks.data_step import dataset
from mergeline.tasks.heads import FamilyWithHeads

if TYPE_CHECKING:
    from mergeline.evaluation.policies.environments import Facts
    from mergeline.evaluation.policies.models import Policy
    from mergeline.tasks.policies.params import PolicyParams

# All but the trunk: what comes in and goes out has other sizes in every environment. Timesteps are among it, as in the
# paper, for they count the steps of one environment, and rows behind its episodes' ends were never trained.
_HEADS = ["embed_*", "predict_*"]


def environment_file(build: Path, task: str) -> Path:
    """What the step `data` found of the environment of a task."""
    return dataset(build, task).with_name(f"{task}.json")


def facts(build: Path, task: str) -> Facts:
    """The same, opened."""
    from mergeline.evaluation.policies.environments import Facts

    file = environment_file(build, task)
    try:
        return Facts(**read_object(file)["facts"])
    except (KeyError, TypeError):
        raise UserError(f"{file}: is missing or damaged; run `mergeline data` again") from None


class Family(FamilyWithHeads):
    """The base and the experts of a pipeline."""

    def __init__(self, params: PolicyParams, build: Path):
        super().__init__(params, build)
        self.params, self.build = params, build

    @cached_property
    def patterns(self) -> list[str]:
        self.refuse_adapters("head")
        return self.params.policies.heads or _HEADS

    @cached_property
    def head_names(self) -> frozenset[str]:
        """The names of the tensors of heads."""
        return frozenset(name for own in self.plan.heads.values() for name in own)

    def model(self, folder: Path) -> Any:
        """The Decision Transformer of a folder, the head of which counts for nothing (raises UserError)."""
        from mergeline.evaluation.policies.models import load_model

        return load_model(folder, self.params.device, self.head_names)

    @cached_property
    def policies(self) -> dict[str, Policy]:
        """The head of each task (raises UserError if one does not fit its environment)."""
        from mergeline.evaluation.policies.models import Policy, load_model

        found = {}
        for task, expert in self.params.owners.items():
            settings, folder = self.params.policies.tasks[task], self.expert(expert)
            model = load_model(folder, self.params.device)
            found[task] = Policy(task, settings, facts(self.build, task), model, self.head_names, folder)
        return found
