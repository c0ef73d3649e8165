"""What scores are called, in what unit they are, and whether larger or smaller ones are better.

Models are compared by outcomes, of which larger ones are always better: a score, or the negated score where smaller
scores are better. Whatever people see are the scores themselves.
"""

from __future__ import annotations

from typing import Any, Literal, Mapping, NamedTuple

Better = Literal["higher", "lower"]


class Measure(NamedTuple):
    """What the score of an example, or the mean of many, is. unit: as it stands after a number, or "" for none."""

    name: str = "accuracy"
    unit: str = ""
    better: Better = "higher"

    @property
    def lower(self) -> bool:
        """Whether smaller scores are better."""
        return self.better == "lower"

    @property
    def label(self) -> str:
        """Name and unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def title(self) -> str:
        """Name, unit, and the direction where it is not the usual one."""
        return f"{self.label}, lower is better" if self.lower else self.label

    def turned(self, value: float) -> float:
        """The score of an outcome, or the outcome of a score."""
        return 0.0 - value if self.lower else value

    def turned_interval(self, lower: float, upper: float) -> tuple[float, float]:
        """The same of the two ends of an interval, which stay in order."""
        return (self.turned(upper), self.turned(lower)) if self.lower else (lower, upper)

    def said(self, value: float, form: str = ".4f") -> str:
        """A score with its unit."""
        return f"{value:{form}} {self.unit}" if self.unit else f"{value:{form}}"


ACCURACY = Measure()


class Measures(NamedTuple):
    """The measure of every task, and that of means over tasks. default: of tasks that are not named."""

    tasks: Mapping[str, Measure] = {}
    default: Measure = ACCURACY

    def of(self, task: str) -> Measure:
        """The measure of a task."""
        return self.tasks.get(task, self.default)

    @property
    def different(self) -> bool:
        """Whether tasks have different measures, so that their scores cannot be compared with one another."""
        return len({*self.tasks.values()}) > 1

    @property
    def mean(self) -> Measure:
        """That of a mean over tasks: theirs; of different ones a "score".

        Where smaller scores are better on some tasks only, a mean is of outcomes: it has these scores negated.
        """
        if not self.different:
            return next(iter(self.tasks.values()), self.default)
        return Measure("score", better="lower" if self.all_lower else "higher")

    @property
    def all_lower(self) -> bool:
        """Whether smaller scores are better on every task."""
        return bool(self.tasks) and all(measure.lower for measure in self.tasks.values())

    @property
    def mean_of(self) -> str:
        """What a mean over tasks of different measures is of, in words; "" where there is one."""
        if not self.different:
            return ""
        named: dict[Measure, list[str]] = {}
        for task, measure in self.tasks.items():
            named.setdefault(measure, []).append(task)
        negated = not self.all_lower
        parts = [
            f"{'negated ' if negated and measure.lower else ''}{measure.label} on {', '.join(tasks)}"
            for measure, tasks in named.items()
        ]
        return f"{', '.join(parts[:-1])} and {parts[-1]}"

    def as_json(self) -> dict[str, Any]:
        """As a leaderboard has it: what a mean is called ("measure"), and the measure of every task ("measures")."""
        return {
            "measure": self.mean.name,
            "measures": {task: measure._asdict() for task, measure in self.tasks.items()},
        }


def measures_of(board: Mapping[str, Any]) -> Measures:
    """Those of a leaderboard; one of an earlier version has a name for them all, and larger ones are better."""
    tasks = {task: Measure(**measure) for task, measure in board.get("measures", {}).items()}
    return Measures(tasks, Measure(board["measure"]))
