"""What models are measured by where the user brings the measure: the section `evaluate` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Iterator, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mergeline.evaluation.measures import Better, Measure

TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class Measured(BaseModel):
    """What the scores of a task are; what is left out is as of the others."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    measure: str | None = None
    unit: str | None = None
    better: Better | None = None


class Evaluate(BaseModel):
    """`evaluate` of params.yaml: the user's own measure.

    folder: holds the code and the data; where anything in it changes, models are measured again. function:
    `module:function` of a module in the folder. command: a program and its arguments, run in the folder, instead.
    suites: domain -> its tasks. An expert is measured on the suite of its own name.
    measure: what a score is called. unit: what it is in, as it stands after a number. better: whether larger or smaller
    scores are. measures: the same of tasks that have others. minutes: that a model and split may take.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str
    function: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] | None = None
    command: Annotated[list[str], Field(min_length=1)] | None = None
    suites: Annotated[dict[str, Annotated[list[TaskName], Field(min_length=1)]], Field(min_length=1)]
    measure: str = "score"
    unit: str = ""
    better: Better = "higher"
    measures: dict[TaskName, Measured] = {}
    minutes: Annotated[float, Field(gt=0)] = 60.0

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.function is None) == (self.command is None):
            raise ValueError("name a function or a command, one of the two")
        return self

    @property
    def scored(self) -> list[str]:
        """The tasks of all suites, in order, once each."""
        return list(dict.fromkeys(task for tasks in self.suites.values() for task in tasks))

    def measure_of(self, task: str) -> Measure:
        """What the scores of a task are."""
        own = self.measures.get(task, Measured())
        return Measure(
            self.measure if own.measure is None else own.measure,
            self.unit if own.unit is None else own.unit,
            own.better or self.better,
        )

    def unknown(self) -> Iterator[str]:
        """Tasks with measures that no suite has."""
        yield from (task for task in self.measures if task not in self.scored)
