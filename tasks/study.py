"""A study: points that a sampler proposes, one after the other, each measured before the next is asked for.

Its record is a file with a line for each point that was measured, in their order. A study that was killed goes on
where it was: the sampler is made anew from its seed, proposes the same points again, and is told what the record says
of them, so that the end is that of an undisturbed run.

The samplers are those of optuna (Akiba et al., 2019, https://arxiv.org/abs/1907.10902), and MAP (Li et al., 2024,
https://arxiv.org/abs/2406.07529).
"""

from __future__ import annotations

import base64
import json
import math
import os
import time
import warnings
import zlib
from itertools import chain, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, NamedTuple, Sequence

from mergeline.evaluation.racing import Raced
from mergeline.merging.canonical import canonical_json
from mergeline.tasks.search_space import Each, Range, Setting, is_ordered, sampled, size

if TYPE_CHECKING:
    import numpy as np
    import optuna

    from mergeline.merging.algebra.surrogate import Surrogate
    from mergeline.tasks.search_space import Branch, Budget, Search

_REPEATS = 100  # proposals of known points in a row, after which nothing new is expected
_DIGITS = 4  # of a number of a continuous range, for people
_POPULATION = 50  # of nsga2, at most
_TOGETHER = (0.25, 0.5, 0.75)  # of their ranges, where all numbers of a point are at once


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
    asked: _Asked | _Planned
    if search.sampler == "map":
        asked = _Planned(search, branches[0], experts, seed % 2**32)
    else:
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
    import numpy as np

    from mergeline.merging.algebra import fronts

    return fronts.front(np.array([[*point.means.values()] for point in points]))


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
    return _rounded(entry, trial.suggest_float(name, entry.low, entry.high, step=entry.step, log=entry.log))


def _rounded(entry: Range, value: float) -> float:
    rounded = float(f"{value:.10g}" if entry.step else f"{value:.{_DIGITS}g}")
    return min(max(rounded, entry.low), entry.high)


def _as_told(name: str, entry: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """A value as optuna has it: of choices, which it is."""
    if isinstance(entry, Each):
        for i, one in enumerate(value):
            yield from _as_told(f"{name}[{i}]", entry.each, one)
    else:
        yield name, entry.index(value) if isinstance(entry, list) else value


# ---------------------------------------------------------------------------------------------- what MAP plans


class _Planned:
    """MAP: points all over the space, and then those that quadratics fitted to them say are on the front.

    Points are rows of numbers between 0 and 1, from the low to the high end of each range.
    """

    def __init__(self, search: Search, branch: Branch, experts: int, seed: int):
        from mergeline.merging.algebra import fronts

        self._branch, self._experts, self._seed = branch, experts, seed
        self._points: dict[str, Point] = {}
        self._sampled = sampled(search, branch.space, experts)
        assert search.budget.points
        numbers = len(_ranges(branch.space, experts))
        corners_KD, firsts = _corners(numbers), len(branch.first_points)
        rest = max(self._sampled - len(corners_KD), firsts, 1)
        more = search.budget.points + _REPEATS
        self._anywhere = cycle(
            [*fronts.scattered(rest, numbers, seed), *fronts.scattered(more, numbers, seed + 1)]
        )
        self._plan: Iterator[dict[str, Any]] = chain(self._firsts(), map(self._params, corners_KD))
        self._fitted = False

    def next(self) -> tuple[int, dict[str, Any]]:
        """The branch of the next point, and what is varied of its parameters."""
        if len(self._points) >= self._sampled and not self._fitted:
            points = [*self._points.values()]
            front = foretold(points, self._branch, self._experts, self._seed)
            self._plan, self._fitted = iter([params for params, _ in front]), True
        return 0, next(self._plan, None) or self._params(next(self._anywhere))

    def tell(self, point: Point | None) -> None:
        """How good the point is that was asked for last; None where the method does not take it."""
        if point:
            self._points.setdefault(canonical_json(point.params), point)

    def _firsts(self) -> Iterator[dict[str, Any]]:
        for given in self._branch.first_points:
            yield self._params(next(self._anywhere)) | given

    def _params(self, point_D: np.ndarray) -> dict[str, Any]:
        return _params_at(point_D, self._branch, self._experts)


def foretold(
    points: Sequence[Point], branch: Branch, experts: int, seed: int
) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """The front that quadratics fitted to these points foretell: parameters, and the mean outcome of each task.

    In an order in which few of them lie all along it, the best mean first.
    """
    import numpy as np

    from mergeline.merging.algebra import fronts

    fitted = surrogates(points, branch, experts)

    def values(points_KD: np.ndarray) -> np.ndarray:
        return np.stack([surrogate.at(points_KD) for surrogate in fitted.values()], axis=1)

    points_KD = fronts.evolved(values, places(points, branch, experts), seed)
    values_KT = values(points_KD)
    order = fronts.spread(values_KT, int(values_KT.mean(1).argmax()))
    return [
        (_params_at(points_KD[k], branch, experts), dict(zip(fitted, values_KT[k].tolist()))) for k in order
    ]


def surrogates(points: Sequence[Point], branch: Branch, experts: int) -> dict[str, Surrogate]:
    """Task -> the quadratic that is fitted to its outcomes at these points."""
    from mergeline.merging.algebra import surrogate

    places_ND = places(points, branch, experts)
    outcomes = outcomes_by_task(points)
    return {
        task: surrogate.fit(places_ND, outcome_N, surrogate.activation_of(outcome_N))
        for task, outcome_N in outcomes.items()
    }


def places(points: Sequence[Point], branch: Branch, experts: int) -> np.ndarray:
    """Where points lie in the space, each number from 0 at the low end of its range to 1 at the high end: (N, D)."""
    import numpy as np

    ranges = _ranges(branch.space, experts)
    rows = []
    for point in points:
        given = [point.params[key] for key in branch.space]
        flat = [one for value in given for one in (value if isinstance(value, list) else [value])]
        rows.append([_share(entry, one) for entry, one in zip(ranges, flat)])
    return np.array(rows)


def outcomes_by_task(points: Sequence[Point]) -> dict[str, np.ndarray]:
    """Task -> the mean outcome at each point (N)."""
    import numpy as np

    return {task: np.array([point.means[task] for point in points]) for task in points[0].means}


def _ranges(space: Mapping[str, Any], experts: int) -> list[Range]:
    """That of each number of a point."""
    found: list[Range] = []
    for entry in space.values():
        entry, times = (entry.each, experts) if isinstance(entry, Each) else (entry, 1)
        assert isinstance(entry, Range)
        found += [entry] * times
    return found


def _params_at(point_D: np.ndarray, branch: Branch, experts: int) -> dict[str, Any]:
    numbers = iter(map(_number, _ranges(branch.space, experts), point_D.tolist()))
    return {
        key: [next(numbers) for _ in range(experts)] if isinstance(entry, Each) else next(numbers)
        for key, entry in branch.space.items()
    }


def _corners(numbers: int) -> np.ndarray:
    """Each number alone at its high end, and all of them at once as high as one another."""
    import numpy as np

    return np.vstack([np.eye(numbers), *(np.full(numbers, share) for share in _TOGETHER)])


def _number(entry: Range, share: float) -> Any:
    """What lies at a share of a range."""
    if entry.log:
        value = entry.low * (entry.high / entry.low) ** share
    else:
        value = entry.low + share * (entry.high - entry.low)
    if not math.isfinite(entry.size):
        return _rounded(entry, value)
    step = entry.step or 1.0
    value = entry.low + step * min(round((value - entry.low) / step), int(entry.size) - 1)
    return int(value) if entry.integer else _rounded(entry, value)


def _share(entry: Range, value: float) -> float:
    if entry.log:
        return math.log(value / entry.low) / math.log(entry.high / entry.low)
    return (value - entry.low) / (entry.high - entry.low)


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
