"""What params.yaml holds of models that read images and texts: the section `vision_language`."""

from __future__ import annotations

from functools import cached_property
from typing import Iterator, Literal

from pydantic import field_validator

from mergeline.evaluation.vision_language.settings import Task
from mergeline.tasks.schema import Name, Params, Problem
from mergeline.tasks.writers.params import WriterSection


class VisionLanguage(WriterSection):
    """What models are measured on that read images and texts.

    tasks: how the questions of each task are made, and texts scored; DVC watches each, so that none has a default.
    prompt: what a model reads, with the places {image} and {question}, in place of the processor's chat template.
    """

    tasks: dict[Name, Task]
    prompt: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"

    @field_validator("prompt")
    @classmethod
    def _has_both_places(cls, prompt: str | None) -> str | None:
        for place in ("{image}", "{question}"):
            if prompt is not None and prompt.count(place) != 1:
                raise ValueError(f"must say once where {place} goes")
        return prompt

    def task(self, name: str) -> Task:
        return self.tasks[name]

    def problems(self) -> Iterator[Problem]:
        """What is wrong with this section."""
        yield from self.problems_in("vision_language", self.tasks)
        for task in self.data.all.keys() - self.tasks.keys():
            yield (
                ["vision_language", "tasks"],
                f"'{task}' is among the data alone; add `{task}: {{metric: exact_match}}`, or what it is scored by",
            )


class VisionLanguageParams(Params):
    """Models that read images and texts are measured on `vision_language`."""

    vision_language: VisionLanguage

    @cached_property
    def tasks(self) -> list[str]:
        return [*self.vision_language.data.all]

    @cached_property
    def owners(self) -> dict[str, str]:
        return self.owned(self.vision_language.suites)

    def problems(self) -> Iterator[Problem]:
        yield from self.vision_language.problems()
        yield from super().problems()
