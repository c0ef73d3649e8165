"""What params.yaml holds of models that write texts, whatever they read."""

from __future__ import annotations

from typing import Annotated, Any, Iterable, Iterator

from pydantic import BaseModel, Field

from mergeline.merging.errors import did_you_mean
from mergeline.tasks.schema import Problem, Sources, Strict


class WriterSection(Strict):
    """What the section of such a modality has in any case.

    data: task -> its table (evaluation/tables.py). suites: domain -> its tasks; an expert is measured on the suite of
    its own name, or on the task of its own name. batch_size: texts that are written side by side.
    """

    data: Sources
    suites: dict[str, Annotated[list[str], Field(min_length=1)]] = {}
    batch_size: Annotated[int, Field(gt=0)] = 32

    def task(self, name: str) -> BaseModel:
        """How the texts of a task are made and scored; it has a `metric`."""
        raise NotImplementedError

    def problems_in(self, section: str, tasks: Iterable[str]) -> Iterator[Problem]:
        """What is wrong with this section, of this name; tasks: those that it describes."""
        for where, problem in self.data.problems("data"):
            yield [section, *where], problem
        named: list[tuple[list[Any], str]] = [(["tasks", task], task) for task in tasks]
        named += [
            (["suites", name, i], task) for name, own in self.suites.items() for i, task in enumerate(own)
        ]
        for place, task in named:
            if task not in self.data.all:
                known = did_you_mean(task, self.data.all)
                yield (
                    [section, *place],
                    f"'{task}' is not among the data{known}; name its table under data",
                )
