"""What params.yaml holds of sequence-to-sequence models: the section `text2text`."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Iterator

from pydantic import Field

from mergeline.evaluation.text2text.settings import Task
from mergeline.merging.errors import did_you_mean
from mergeline.tasks.schema import Name, Params, Problem, Sources, Strict


class Text2Text(Strict):
    """What sequence-to-sequence models are measured on.

    data: task -> its table (evaluation/tables.py). suites: domain -> its tasks; an expert is measured on the suite of
    its own name, or on the task of its own name. tasks: how the texts of a task are made and scored. batch_size: texts
    that are written side by side.
    """

    data: Sources
    suites: dict[str, Annotated[list[str], Field(min_length=1)]] = {}
    tasks: dict[Name, Task] = {}
    batch_size: Annotated[int, Field(gt=0)] = 32

    def task(self, name: str) -> Task:
        """How the texts of a task are made and scored."""
        return self.tasks.get(name, Task())

    def problems(self) -> Iterator[Problem]:
        """What is wrong with this section."""
        for where, problem in self.data.problems("data"):
            yield ["text2text", *where], problem
        named: list[tuple[list[Any], str]] = [(["tasks", task], task) for task in self.tasks]
        named += [
            (["suites", name, i], task) for name, own in self.suites.items() for i, task in enumerate(own)
        ]
        for place, task in named:
            if task not in self.data.all:
                known = did_you_mean(task, self.data.all)
                yield (
                    ["text2text", *place],
                    f"'{task}' is not among the data{known}; name its table under data",
                )


class Text2TextParams(Params):
    """Sequence-to-sequence models are measured on `text2text`."""

    text2text: Text2Text

    @cached_property
    def tasks(self) -> list[str]:
        return [*self.text2text.data.all]

    @cached_property
    def owners(self) -> dict[str, str]:
        return self.owned(self.text2text.suites)

    def problems(self) -> Iterator[Problem]:
        yield from self.text2text.problems()
        yield from super().problems()
