"""What params.yaml holds of image models: `datasets` and `suite`."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Iterator

from pydantic import Field

from mergeline.tasks.schema import Params, Problem, Sources


class Datasets(Sources):
    """Where the images of each task come from; they are stored at image_size x image_size pixels."""

    image_size: Annotated[int, Field(ge=8)]


class ClipParams(Params):
    """Image models are measured on `datasets` with the prompts of `suite`; an expert is of the task of its own name."""

    datasets: Datasets
    suite: str

    @cached_property
    def tasks(self) -> list[str]:
        return [*self.datasets.all]

    def problems(self) -> Iterator[Problem]:
        yield from self.datasets.problems("datasets")
        yield from super().problems()
