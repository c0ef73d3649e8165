"""What params.yaml holds of Decision Transformers: the section `policies`."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Iterator

from pydantic import Field

from mergeline.evaluation.policies.settings import Episodes, Task
from mergeline.merging.errors import did_you_mean
from mergeline.tasks.classifiers.params import Heads
from mergeline.tasks.custom.params import ScoreGates
from mergeline.tasks.schema import Name, Params, Problem, Strict


class Trajectories(Strict):
    """What policies are run on to learn from them: task -> a file (evaluation/policies/trajectories.py)."""

    files: dict[Name, str]


class Policies(Strict):
    """What Decision Transformers are measured on.

    tasks: the environments. suites: expert -> its tasks, which share its head; by default the task of its own name.
    heads: names of the tensors that each expert keeps, as shell patterns; `auto`: all but the `encoder`. trajectories:
    for statistics and learned methods alone. episodes: how many of each task. batch_size: episodes side by side.
    """

    tasks: Annotated[dict[Name, Task], Field(min_length=1)]
    suites: dict[Name, Annotated[list[Name], Field(min_length=1)]] = {}
    heads: Heads
    trajectories: Trajectories
    episodes: Episodes = Episodes()
    batch_size: Annotated[int, Field(gt=0)] = 50


class PolicyParams(Params):
    """Decision Transformers are measured on `policies`; a task with the head of its own expert."""

    policies: Policies
    gates: ScoreGates = ScoreGates()

    @cached_property
    def tasks(self) -> list[str]:
        return [*self.policies.tasks]

    @cached_property
    def owners(self) -> dict[str, str]:
        return self.owned(self.policies.suites)

    def problems(self) -> Iterator[Problem]:
        section = self.policies
        yield from self.headless("policies", section.suites, lambda task: ["tasks", task], "tasks")
        for task in section.trajectories.files:
            if task not in self.tasks:
                known = did_you_mean(task, self.tasks)
                yield ["policies", "trajectories", "files", task], f"'{task}' is not among the tasks{known}"
        yield from super().problems()
