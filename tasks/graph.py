"""The stages of a pipeline and what each of them waits for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.tasks.modalities import modality_of
from mergeline.tasks.step import Stage
from mergeline.tasks.steps import steps

if TYPE_CHECKING:
    from mergeline.tasks.schema import Params


def stages(params: Params, code: str = ".") -> list[Stage]:
    """All stages in an order that respects their dependencies; `code` is where Mergeline's sources lie."""
    found = steps(modality_of(params))
    turns = sorted({template.turn for step in found for template in step.templates})
    return [stage for turn in turns for step in found for stage in step.stages(params, code, turn)]


def needs(stage: Stage, all_stages: list[Stage]) -> list[Stage]:
    """The stages whose outputs `stage` reads."""

    def reads(out: str) -> bool:
        return any(dep == out or out.startswith(dep + "/") or dep.startswith(out + "/") for dep in stage.deps)

    return [other for other in all_stages if other is not stage and any(reads(out) for out in other.outs)]
