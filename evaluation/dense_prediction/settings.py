"""What a task of dense prediction is."""

from __future__ import annotations

from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from mergeline.evaluation.dense_prediction.metrics import METRICS, MetricName, Target, outcomes
from mergeline.evaluation.measures import Measure


class Task(BaseModel):
    """An entry of `dense_prediction.tasks` of params.yaml.

    metric: see evaluation/dense_prediction/metrics.py; it says what the right answers are, too. zero, one: scores that
    count as 0 and as 1, so that tasks with different units have a mean that means something: such as that of a constant
    prediction, and that of an expert. Without them the score itself counts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    metric: MetricName
    zero: float | None = None
    one: float | None = None

    @model_validator(mode="after")
    def _scale(self) -> Self:
        if (self.zero is None) != (self.one is None):
            raise ValueError("give both, zero and one, or neither")
        if self.zero is not None and self.zero == self.one:
            raise ValueError("zero and one are the same score")
        return self

    @property
    def target(self) -> Target:
        """What the right answers are."""
        return METRICS[self.metric].target

    @property
    def measure(self) -> Measure:
        """What its score is: the metric, or where that lies between zero and one."""
        own = METRICS[self.metric].measure
        return own if self.zero is None else Measure(f"normalised {own.name}")

    def outcomes(self, answers: np.ndarray) -> np.ndarray:
        """How good each of N images is, (N), larger is better, of what `metrics.answers` kept."""
        found_N = outcomes(self.metric, answers)
        if self.zero is None or self.one is None:
            return found_N
        scores_N = -found_N if METRICS[self.metric].measure.lower else found_N
        return (scores_N - self.zero) / (self.one - self.zero)
