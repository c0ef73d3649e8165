"""The base and the experts of a pipeline, where each expert has a head of its own that is not merged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mergeline.merging.checkpoints.adapters import is_adapter
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.engine.sources import FileInputs
from mergeline.merging.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from mergeline.merging.engine.plan import Plan
    from mergeline.tasks.schema import Params


class FamilyWithHeads(ABC):
    """The checkpoints in build/; only headers are read until something is asked for."""

    def __init__(self, params: Params, build: Path):
        self._params = params
        self._checkpoints = build / "checkpoints"

    @property
    def base(self) -> Path:
        return self._checkpoints / self._params.base

    def expert(self, name: str) -> Path:
        return self._checkpoints / name

    @property
    def folders(self) -> list[Path]:
        """Those of the base and of the experts."""
        return [self.base, *map(self.expert, self._params.experts)]

    @property
    @abstractmethod
    def patterns(self) -> list[str]:
        """The names of heads, as shell patterns (raises UserError)."""

    @cached_property
    def base_names(self) -> frozenset[str]:
        """The names of the base's tensors, and these without what stands before their first dot: maybe a prefix."""
        names = open_checkpoint(self.base).tensors
        return frozenset([*names, *(name.partition(".")[2] for name in names)])

    def base_lacks(self, name: str) -> bool:
        """Whether the base has no tensor of an expert, whatever prefix either's names have."""
        return self.base_names.isdisjoint({name, name.partition(".")[2]})

    def refuse_adapters(self, head: str) -> None:
        """Raises UserError if an expert is an adapter; `head` is what its head is called."""
        for expert in self._params.experts:
            if is_adapter(open_checkpoint(self.expert(expert))):
                raise UserError(
                    f"{self.expert(expert)}: is an adapter, whose {head} cannot be kept; put it into its base "
                    "first (PEFT's merge_and_unload), and name what that saves"
                )

    @cached_property
    def plan(self) -> Plan:
        """How the experts' trunks would be averaged (raises UserError if they cannot be)."""
        experts = {name: self.expert(name) for name in self._params.experts}
        plan = make_plan({"method": "average", "base": self.base, "experts": experts, "heads": self.patterns})
        plan.check()
        return plan

    def state(self, expert: str) -> dict[str, Tensor]:
        """An expert's tensors, with its head."""
        with FileInputs(self.plan) as source:
            return {name: source.whole(expert, name) for name in self.plan.experts[expert].tensors}

    def base_state(self) -> dict[str, Tensor]:
        """The base's tensors under the names that the experts have; not those that no expert has."""
        base, experts = self.plan.base, self.plan.experts.values()
        assert base is not None
        return {name: base.read(name) for name in base.tensors if any(name in e.tensors for e in experts)}
