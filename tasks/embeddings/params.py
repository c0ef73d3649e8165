"""What params.yaml holds of embedding models: `embeddings`."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Iterator

from pydantic import Field

from mergeline.evaluation.embeddings.settings import Task
from mergeline.merging.errors import did_you_mean
from mergeline.tasks.schema import Name, Params, Problem, Sources, Strict


class Embeddings(Strict):
    """`embeddings` of params.yaml.

    data: where the table of each task comes from. tasks: what is measured on it. suites: domain -> its tasks; an expert
    is measured on the suite of its own name, or on the task of its name. prompts: task -> what stands before its texts,
    by their role: query and document, or first and second. batch_size: texts that are run at once.
    """

    data: Sources
    tasks: Annotated[dict[Name, Task], Field(min_length=1)]
    suites: dict[str, Annotated[list[str], Field(min_length=1)]] = {}
    prompts: dict[str, dict[str, str]] = {}
    batch_size: Annotated[int, Field(gt=0)] = 64

    def problems(self) -> Iterator[Problem]:
        """What the types cannot say."""
        yield from ((["embeddings", *loc], wrong) for loc, wrong in self.data.problems("data"))
        for task in self.tasks:
            if task not in self.data.all:
                yield ["embeddings", "tasks", task], f"'{task}' has no table; name one under embeddings.data"
        for task in self.data.all:
            if task not in self.tasks:
                near = did_you_mean(task, self.tasks)
                yield (
                    ["embeddings", "data"],
                    f"'{task}' is no task{near}; say under embeddings.tasks what is measured",
                )
        for suite, tasks in self.suites.items():
            for i, task in enumerate(tasks):
                if task not in self.tasks:
                    place = ["embeddings", "suites", suite, i]
                    yield place, f"'{task}' is not among the tasks{did_you_mean(task, self.tasks)}"
        for task, prompts in self.prompts.items():
            if task not in self.tasks:
                yield (
                    ["embeddings", "prompts", task],
                    f"'{task}' is not among the tasks{did_you_mean(task, self.tasks)}",
                )
                continue
            roles = self.tasks[task].roles
            for role in prompts:
                if role not in roles:
                    place = ["embeddings", "prompts", task, role]
                    yield place, f"texts of '{task}' are {roles[0]} and {roles[1]}, not '{role}'"


class EmbeddingParams(Params):
    """Embedding models are measured on `embeddings`; an expert's tasks are those of the suite of its own name."""

    embeddings: Embeddings

    @cached_property
    def tasks(self) -> list[str]:
        return [*self.embeddings.tasks]

    @cached_property
    def owners(self) -> dict[str, str]:
        return self.owned(self.embeddings.suites)

    def problems(self) -> Iterator[Problem]:
        yield from self.embeddings.problems()
        yield from super().problems()
