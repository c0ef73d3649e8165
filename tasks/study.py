"""A study: points that a sampler proposes, one after the other, each measured before the next is asked for.

Its record is a file with a line for each point that was measured, in their order. A study that was killed goes on
where it was: the sampler is made anew from its seed, proposes the same points again, and is told what the record says
of them, so that the end is that of an undisturbed run.

The samplers are those of optuna (Akiba et al., 2019, https://arxiv.org/abs/1907.10902).
"""

from __future__ import annotations

import base64
import json
import os
import time
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, NamedTuple, Sequence

from mergeline.evaluation.racing import Raced
from mergeline.merging.canonical import canonical_json
from mergeline.tasks.search_space import Each, Range, Setting, is_ordered, size

if TYPE_CHECKING:
    import numpy as np
    import optuna

    from mergeline.tasks.search_space import Branch, Budget, Search

_REPEATS = 100  # proposals of known points in a row, after which nothing new is expected
_DIGITS = 4  # of a number of a continuous range, for people
_POPULATION = 50  # of nsga2, at most


class Point(NamedTuple):
    """A point that was measured.

    branch: which of the search's methods. params: those of its method. means: task -> mean outcome; an estimate where
    it was `dropped` in a race. seen: on how many examples it was measured. seconds: since the study began, in all its
    runs. outcomes: task -> the outcome of every example, float64 (N), of points that were the best when they came.
    """

    branch: int
    params: dict[str, Any]
    means: dict[str, float]
    seen: int
    seconds: float
    dropped: bool
    outcomes: dict[str, np.ndarray] | None

    @property
    def mean(self) -> float:
        """Over tasks."""
        return sum(self.means.values()) / len(self.means)


Measure = Callable[[Setting, "dict[str, np.ndarray] | None"], Raced]


def study(
    search: Search,
    branches: Sequence[Branch],
    *,
    experts: int,
    seed: int,
    tasks: Sequence[str],
    allowed: Callable[[Setting], bool] = lambda setting: True,
    measure: Measure,
    record: Path | None = None,
) -> Iterator[Point]:
    """Measure points until the budget is spent, no point is left, or the sampler finds none that is new; yields them.

    experts: how many a merge has. seed: of the sampler, where the search says none. allowed: whether a method takes a
    setting; others are passed over. measure: is given a setting, and the outcomes of the best point so far. record: the
    file; what it holds is not measured again.
    """
    seed = seed if search.seed is None else search.seed
    asked = _Asked(search, branches, experts, seed, tasks)
    told = _read(record) if record else []
    points: list[Point] = []
    best: Point | None = None
    most = sum(size(branch.space, experts) for branch in branches)
    began = time.monotonic() - (told[-1].seconds if told else 0.0)
    found: dict[str, Point | None] = {}  # None: not allowed
    repeats = 0
    while len(found) < most and repeats < _REPEATS:
        if len(points) >= len(told) and _spent(search.budget, points, time.monotonic() - began):
            return
        branch, params = asked.next()
        key = canonical_json([branch, params])
        setting = Setting(branches[branch].method, {**branches[branch].params, **params})
        if key in found or not allowed(setting):
            repeats += 1
            asked.tell(found.setdefault(key, None))
            continue
        repeats = 0
        if len(points) < len(told):
            point = told[len(points)]
            assert canonical_json([point.branch, point.params]) == key, f"{record} is of another study"
        else:
            raced = measure(setting, best and best.outcomes)
            point = Point(
                branch,
                params,
                raced.means,
                raced.seen,
                round(time.monotonic() - began, 3),
                raced.outcomes is None,
                raced.outcomes,
            )
            if best and not point.dropped and point.mean <= best.mean:
                point = point._replace(outcomes=None)
            if record:
                _append(record, point)
        if not point.dropped and (best is None or point.mean > best.mean):
            best = point
        points.append(point)
        found[key] = point
        asked.tell(point)
        yield point


def front(points: Sequence[Point]) -> list[int]:
    """The indexes of the points of which no other is at least as good on every task, and better on one."""
    means = [[*point.means.values()] for point in points]

    def beaten(i: int) -> bool:
        return any(
            all(b >= a for a, b in zip(means[i], other)) and (other != means[i] or j < i)
            for j, other in enumerate(means)
            if j != i
        )

    return [i for i in range(len(points)) if not beaten(i)]


def _spent(budget: Budget, points: Sequence[Point], seconds: float) -> bool:
    if budget.points is not None:
        return len(points) >= budget.points
    if budget.minutes is not None:
        return bool(points) and seconds >= 60 * budget.minutes
    assert budget.evaluations is not None
    # The first point is measured whole.
    return bool(points) and sum(point.seen for point in points) >= budget.evaluations * points[0].seen


# ---------------------------------------------------------------------------------------------- what is asked of optuna


class _Asked:
    """The sampler, which is asked for points and told how good they are."""

    def __init__(
        self, search: Search, branches: Sequence[Branch], experts: int, seed: int, tasks: Sequence[str]
    ):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._branches, self._experts = branches, experts
        self._tasks = tasks if search.sampler == "nsga2" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study = optuna.create_study(
                directions=["maximize"] * len(self._tasks or [""]),
                sampler=_sampler(search, len(branches), seed % 2**32),
            )
        for i, branch in enumerate(branches):
            for point in branch.first_points:
                named = {
                    name: value
                    for key, given in point.items()
                    for name, value in _as_told(self._name(i, key), branch.space[key], given)
                }
                self._study.enqueue_trial({**named, **({"method": i} if len(branches) > 1 else {})})
        self._trial: optuna.trial.Trial | None = None

    def next(self) -> tuple[int, dict[str, Any]]:
        """The branch of the next point, and what is varied of its parameters."""
        self._trial = trial = self._study.ask()
        several = len(self._branches) > 1
        i = trial.suggest_categorical("method", range(len(self._branches))) if several else 0
        space = self._branches[i].space
        return i, {
            key: _suggested(trial, self._name(i, key), entry, self._experts) for key, entry in space.items()
        }

    def tell(self, point: Point | None) -> None:
        """How good the point is that was asked for last; None where the method does not take it."""
        from optuna.trial import TrialState

        assert self._trial
        if point is None:
            self._study.tell(self._trial, state=TrialState.FAIL)
            return
        values = [point.means[task] for task in self._tasks] if self._tasks else [point.mean]
        self._study.tell(self._trial, values)

    def _name(self, branch: int, key: str) -> str:
        """What optuna calls a parameter: those of two methods are two."""
        return f"{branch}.{key}" if len(self._branches) > 1 else key


def _sampler(search: Search, branches: int, seed: int) -> optuna.samplers.BaseSampler:
    from optuna import samplers

    if search.sampler == "tpe":
        # Of several methods each has parameters of its own, of which few points tell nothing jointly.
        return samplers.TPESampler(seed=seed, multivariate=branches == 1)
    if search.sampler == "cmaes":
        return samplers.CmaEsSampler(seed=seed)
    if search.sampler == "nsga2":
        # Within a small budget there are a few generations at least.
        population = max(4, min(_POPULATION, (search.budget.points or _POPULATION) // 5))
        return samplers.NSGAIISampler(seed=seed, population_size=population)
    return samplers.RandomSampler(seed=seed)


def _suggested(trial: optuna.trial.Trial, name: str, entry: Any, experts: int) -> Any:
    if isinstance(entry, Each):
        return [_suggested(trial, f"{name}[{i}]", entry.each, experts) for i in range(experts)]
    if isinstance(entry, list):
        if is_ordered(entry):
            return entry[trial.suggest_int(name, 0, len(entry) - 1)]
        return entry[trial.suggest_categorical(name, range(len(entry)))]
    assert isinstance(entry, Range)
    if entry.integer:
        step = int(entry.step or 1)
        return trial.suggest_int(name, int(entry.low), int(entry.high), step=step, log=entry.log)
    value = trial.suggest_float(name, entry.low, entry.high, step=entry.step, log=entry.log)
    rounded = float(f"{value:.10g}" if entry.step else f"{value:.{_DIGITS}g}")
    return min(max(rounded, entry.low), entry.high)


def _as_told(name: str, entry: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """A value as optuna has it: of choices, which it is."""
    if isinstance(entry, Each):
        for i, one in enumerate(value):
            yield from _as_told(f"{name}[{i}]", entry.each, one)
    else:
        yield name, entry.index(value) if isinstance(entry, list) else value


# ---------------------------------------------------------------------------------------------- the record


def _read(file: Path) -> list[Point]:
    """The points of a record. What was half written when its process was killed is cut off."""
    if not file.exists():
        return []
    os.utime(file)  # what is not used for long may be removed
    points, end = [], 0
    for line in file.read_bytes().splitlines(keepends=True):
        try:
            assert line.endswith(b"\n")
            points.append(_point(json.loads(line)))
        except (AssertionError, ValueError, KeyError, TypeError, zlib.error):
            os.truncate(file, end)
            break
        end += len(line)
    return points


def _append(file: Path, point: Point) -> None:
    packed = {task: _packed(outcome_N) for task, outcome_N in (point.outcomes or {}).items()}
    row = point._asdict() | {"outcomes": packed or None}
    with open(file, "ab") as opened:
        opened.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        opened.flush()
        os.fsync(opened.fileno())


def _point(row: Mapping[str, Any]) -> Point:
    texts = row["outcomes"]
    outcomes = {task: _unpacked(text) for task, text in texts.items()} if texts else None
    return Point(**{**row, "outcomes": outcomes})


def _packed(outcome_N: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(outcome_N.astype("<f8").tobytes())).decode()


def _unpacked(text: str) -> np.ndarray:
    import numpy as np

    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<f8")
