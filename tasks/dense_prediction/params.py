"""What params.yaml holds of dense prediction: the section `dense_prediction`."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Iterator

from pydantic import Field

from mergeline.evaluation.dense_prediction.settings import Task
from mergeline.merging.errors import did_you_mean
from mergeline.tasks.classifiers.params import Channels, Heads
from mergeline.tasks.custom.params import ScoreGates
from mergeline.tasks.schema import Name, Params, Problem, Sources, Strict

Length = Annotated[int, Field(ge=8)]


class DensePrediction(Strict):
    """What models of every pixel are measured on.

    model: what the checkpoints are, where they do not say it: `torchvision/NAME`. heads: names of the tensors that each
    expert keeps, as shell patterns; `auto`: those of modules that are heads by their names, and those that the base
    lacks. data: task -> source (evaluation/dense_prediction/data.py). tasks: task -> its metric. suites: expert -> its
    tasks, which share its head; by default the task of its own name. image_size: height and width of all images, one
    number where they are the same. mean, std: by which pixels from 0 to 1 are normalised; by default as the checkpoints
    say.
    """

    model: Annotated[str, Field(pattern=r"^(auto|torchvision/[\w.-]+)$")] = "auto"
    heads: Heads
    data: Sources
    tasks: dict[Name, Task]
    suites: dict[Name, Annotated[list[Name], Field(min_length=1)]] = {}
    image_size: Length | Annotated[list[Length], Field(min_length=2, max_length=2)]
    batch_size: Annotated[int, Field(ge=1)] = 16
    mean: Channels | None = None
    std: Channels | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])


class DensePredictionParams(Params):
    """Models of every pixel are measured on `dense_prediction`, each task with the head of its own expert."""

    dense_prediction: DensePrediction
    gates: ScoreGates = ScoreGates()

    @cached_property
    def tasks(self) -> list[str]:
        return [*self.dense_prediction.data.all]

    @cached_property
    def owners(self) -> dict[str, str]:
        return self.owned(self.dense_prediction.suites)

    def problems(self) -> Iterator[Problem]:
        found = self.dense_prediction
        section = "dense_prediction"
        yield from (([section, *loc], wrong) for loc, wrong in found.data.problems("data"))
        for task in (task for task in self.tasks if task not in found.tasks):
            hint = did_you_mean(task, found.tasks)
            yield [section, "tasks"], f"'{task}' is missing{hint}; say its metric, as {{metric: miou}}"
        for task in (task for task in found.tasks if task not in self.tasks):
            yield [section, "tasks", task], f"'{task}' is not among the data{did_you_mean(task, self.tasks)}"
        yield from self.headless(section, found.suites, found.data.place)
        yield from super().problems()
