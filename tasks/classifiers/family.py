"""A family of classifiers in build/: which tensors are heads, the experts' heads, and the base under their names."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeline.merging.architecture import CLASSIFIERS, Role, describe
from mergeline.merging.checkpoints.adapters import is_adapter, open_adapted
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.checkpoints.companions import read_config
from mergeline.merging.checkpoints.heads import head_config
from mergeline.merging.engine.sources import FileInputs
from mergeline.merging.errors import UserError
from mergeline.tasks.heads import FamilyWithHeads

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergeline.tasks.classifiers.params import ClassifierParams


class Family(FamilyWithHeads):
    """The base and the experts of a pipeline; only headers are read until something is asked for."""

    def __init__(self, params: ClassifierParams, build: Path):
        super().__init__(params, build)
        self.params = params

    @cached_property
    def patterns(self) -> list[str]:
        """The names of heads, as shell patterns.

        Raises:
            UserError: none are found.
        """
        return self.params.classification.heads or self._found()

    def _found(self) -> list[str]:
        """Tensors of a classifier by their names, and those that the base lacks, whatever prefix its names have."""
        heads: set[str] = set()
        names: set[str] = set()
        for folder in map(self.expert, self.params.experts):
            tensors = open_adapted(folder, self.base).tensors
            shapes = {name: info.shape for name, info in tensors.items()}
            model = describe(shapes, read_config(folder) or read_config(self.base))
            names |= shapes.keys()
            for name in shapes:
                tensor = model.tensors[name]
                if self.base_lacks(name) or Role.CLASSIFIER in (tensor.role, tensor.of):
                    heads.add(name)
        modules = {name.rpartition(".")[0] for name in heads}
        whole = {top for module in modules if (top := module.partition(".")[0]) in CLASSIFIERS}
        found = {f"{top}.*" for top in whole}
        for module in {m for m in modules if m.partition(".")[0] not in whole}:
            own = {name for name in names if name.startswith(f"{module}.")}
            found |= {f"{module}.*"} if own <= heads else heads & own
        if not found:
            raise UserError(
                f"{self.base}: no classifier is found among the tensors of its experts; name them: "
                '`heads: ["fc.*"]`'
            )
        return sorted(found)

    @cached_property
    def heads(self) -> dict[str, dict[str, Tensor]]:
        """Task -> the tensors of its expert's head."""
        with FileInputs(self.plan) as source:
            of = {
                expert: {name: source.whole(expert, name) for name in self.plan.heads[expert]}
                for expert in dict.fromkeys(self.params.owners.values())
            }
        return {task: of[expert] for task, expert in self.params.owners.items()}

    def config(self, task: str) -> dict[str, Any]:
        """The configuration of a task's expert; empty where it has none."""
        return head_config(self.expert(self.params.owners[task]), self.heads[task], self.base)

    def module(self, kind: str) -> nn.Module:
        """The model that the experts are of, with a head of one of them; `kind` as in `classifiers.model.build`.

        Raises:
            UserError: it is not said what they are, or they do not open as that.
        """
        from mergeline.evaluation.classifiers.model import build

        settings, device = self.params.classification, self.params.device
        task, expert = next(iter(self.params.owners.items()))
        folder = self.expert(expert)
        if is_adapter(open_checkpoint(folder)):
            return build(self.base, settings.model, kind, self.heads[task], device, without_head=True)
        return build(folder, settings.model, kind, self.heads[task], device)
