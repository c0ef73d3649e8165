"""What params.yaml holds where the user brings the measure: `evaluate`, and gates for any numbers."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Iterator

from pydantic import Field

from mergeline.evaluation.custom.settings import Evaluate
from mergeline.merging.errors import did_you_mean
from mergeline.tasks.gates import Gates
from mergeline.tasks.schema import Params, Problem


class ScoreGates(Gates):
    """`gates` of scores, which may be any numbers: limits are in their units."""

    minimum_mean: float | None = None
    largest_mean: float | None = None
    minimum_gain: float | None = None
    largest_drop: Annotated[float, Field(ge=0)] | None = None
    largest_rise: Annotated[float, Field(ge=0)] | None = None


class CustomParams(Params):
    """Models are measured by `evaluate`; an expert's tasks are those of the suite of its own name."""

    evaluate: Evaluate
    gates: ScoreGates = ScoreGates()

    @cached_property
    def tasks(self) -> list[str]:
        return self.evaluate.scored

    @cached_property
    def owners(self) -> dict[str, str]:
        return self.owned(self.evaluate.suites, by_name=False)

    def problems(self) -> Iterator[Problem]:
        for task in self.evaluate.unknown():
            known = did_you_mean(task, self.tasks)
            yield ["evaluate", "measures", task], f"'{task}' is in none of the suites{known}"
        yield from super().problems()
