"""Fronts over tasks as pictures, and the page that `mergeline pareto` writes.

Two tasks are the axes of a plane. More are axes beside one another, each from the worst to the best score that the
front has there, and a point is a line across them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, NamedTuple, Sequence

from mergeline.evaluation.measures import Measures, measures_of
from mergeline.evaluation.pages.figures import as_text
from mergeline.evaluation.pages.page import Axis, counted, round_values, write_page

Json = dict[str, Any]
Scores = Mapping[str, float]  # by task
Pairs = list[tuple[float, float]]

_WIDTH, _HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 60, 24, 62  # room around the axes
_LONGEST = 14  # characters of a task's name


class Plane(NamedTuple):
    """Two tasks. front: in the order of the first task's scores. others: points that are beaten."""

    titles: tuple[str, str]
    front: Pairs
    others: Pairs
    chosen: tuple[float, float] | None
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    width: int = _WIDTH
    height: int = _HEIGHT


class Column(NamedTuple):
    """The axis of a task, at `x`; what its best and its worst score are, as text."""

    x: float
    task: str
    best: str
    worst: str


class Strand(NamedTuple):
    """A point of the front; `place` from the worst mean, 0, to the best, 100, gives its colour."""

    points: Pairs
    place: float
    chosen: bool


class Columns(NamedTuple):
    """Several tasks. strands: the chosen one last."""

    columns: list[Column]
    strands: list[Strand]
    top: float
    bottom: float
    width: int = _WIDTH
    height: int = _HEIGHT


def picture(
    front: Sequence[Scores], all_points: Sequence[Scores], chosen: int | None, measures: Measures
) -> Plane | Columns | None:
    """The picture of a front; None of one task alone. front: the best mean first. chosen: an index of it."""
    tasks = list(front[0])
    if len(tasks) < 2:
        return None
    return (
        _plane(tasks, front, all_points, chosen, measures)
        if len(tasks) == 2
        else _columns(tasks, front, chosen, measures)
    )


def _plane(
    tasks: list[str],
    front: Sequence[Scores],
    all_points: Sequence[Scores],
    chosen: int | None,
    measures: Measures,
) -> Plane:
    grids = [round_values([point[task] for point in all_points], least=1e-3) for task in tasks]
    ends = [
        (grid[-1], grid[0]) if measures.of(task).lower else (grid[0], grid[-1])
        for task, grid in zip(tasks, grids)
    ]
    across = Axis(*ends[0], start=_LEFT, end=_WIDTH - _RIGHT)
    up = Axis(*ends[1], start=_HEIGHT - _BOTTOM, end=_TOP)

    def at(point: Scores) -> tuple[float, float]:
        return across.at(point[tasks[0]]), up.at(point[tasks[1]])

    own = [tuple(point.values()) for point in front]
    a, b = (f"{task}: {measures.of(task).title}" for task in tasks)
    return Plane(
        (a, b),
        sorted(map(at, front)),
        [at(point) for point in all_points if tuple(point.values()) not in own],
        None if chosen is None else at(front[chosen]),
        across.ticks(grids[0], room=40),
        up.ticks(grids[1], room=20),
    )


def _columns(tasks: list[str], front: Sequence[Scores], chosen: int | None, measures: Measures) -> Columns:
    top, bottom = float(_TOP), float(_HEIGHT - _BOTTOM)
    across = Axis(0, len(tasks) - 1, start=_LEFT, end=_WIDTH - _RIGHT)
    columns, axes = [], []
    for i, task in enumerate(tasks):
        low, high = min(point[task] for point in front), max(point[task] for point in front)
        worst, best = (high, low) if measures.of(task).lower else (low, high)
        axes.append(Axis(worst, best, start=bottom, end=top))
        name = task if len(task) <= _LONGEST else task[: _LONGEST - 1] + "…"
        columns.append(Column(across.at(i), name, *(_short(score) for score in (best, worst))))
    last = max(1, len(front) - 1)
    strands = [
        Strand(
            [(column.x, axis.at(point[task])) for task, column, axis in zip(tasks, columns, axes)],
            100 - 100 * i / last,
            i == chosen,
        )
        for i, point in enumerate(front)
    ]
    return Columns(columns, sorted(strands[::-1], key=lambda strand: strand.chosen), top, bottom)


def _short(score: float) -> str:
    return f"{score:.3f}" if abs(score) < 100 else f"{score:.4g}"


def render_front(path: Path, found: Json, picked: int | None) -> None:
    """Write the page to `path`, the same bytes for the same results.

    found: what `tasks.pareto.front_of` returns. picked: the index of a point in its list.

    Raises:
        UserError: the file cannot be written.
    """
    measures = measures_of(found)
    scores = [point["tasks"] for point in found["points"]]
    parameters = list(dict.fromkeys(key for point in found["points"] for key in point["params"]))
    write_page(
        path,
        "front.html.jinja",
        {"counted": counted, "value": as_text},
        found=found,
        picked=picked,
        parameters=parameters,
        titles=[f"{task}: {measures.of(task).title}" if measures.different else task for task in scores[0]],
        measure=measures.mean,
        picture=picture(scores, [point["tasks"] for point in found["all"]], picked, measures),
    )
