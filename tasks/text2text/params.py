"""What params.yaml holds of sequence-to-sequence models: the section `text2text`."""

from __future__ import annotations

from functools import cached_property
from typing import Iterator

from mergeline.evaluation.text2text.settings import Task
from mergeline.tasks.schema import Name, Params, Problem
from mergeline.tasks.writers.params import WriterSection


class Text2Text(WriterSection):
    """What sequence-to-sequence models are measured on. tasks: how the texts of a task are made and scored."""

    tasks: dict[Name, Task] = {}

    def task(self, name: str) -> Task:
        return self.tasks.get(name, Task())


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
        yield from self.text2text.problems_in("text2text", self.text2text.tasks)
        yield from super().problems()
