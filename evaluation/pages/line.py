"""The pages of what lies between models, as `mergeline line` measured it: curves and a table, or a map of a plane."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from mergeline.evaluation.pages.charts import line_chart
from mergeline.evaluation.pages.page import Axis, counted, write_page

Json = dict[str, Any]

_WIDTH = 480  # of a map, in the coordinates of its picture


class Cell(NamedTuple):
    """A model of a plane. heat: from the worst, 0, to the best, 100."""

    x: float
    y: float
    heat: float
    title: str


class Corner(NamedTuple):
    """One of the three models that a plane goes through."""

    x: float
    y: float
    label: str
    anchor: str


class Map(NamedTuple):
    """A plane as a grid of cells, `side` wide and `rise` high each."""

    title: str
    cells: list[Cell]
    side: float
    rise: float
    corners: list[Corner]
    worst: str
    best: str
    width: float
    height: float


def render_line(path: Path, found: Json) -> None:
    """Write the page to `path`, the same bytes for the same results.

    found: what `tasks.line.measured_line` returns.

    Raises:
        UserError: the file cannot be written.
    """
    shares, lines = found["shares"], found["lines"]
    across = "share of the other model"
    charts = [line_chart("All tasks", across, shares, {name: line["means"] for name, line in lines.items()})]
    if len(found["tasks"]) > 1:
        charts += [
            line_chart(
                task,
                across,
                shares,
                {name: [p[task] for p in line["points"]] for name, line in lines.items()},
            )
            for task in found["tasks"]
        ]
    write_page(path, "line.html.jinja", {"counted": counted}, found=found, charts=[c for c in charts if c])


def render_plane(path: Path, found: Json) -> None:
    """The same of a plane. found: what `tasks.line.measured_plane` returns.

    Raises:
        UserError: the file cannot be written.
    """
    maps = [_map("All tasks", found, found["means"])]
    if len(found["tasks"]) > 1:
        maps += [_map(t, found, [[p[t] for p in row] for row in found["points"]]) for t in found["tasks"]]
    write_page(path, "plane.html.jinja", {"counted": counted}, found=found, maps=maps)


def _map(title: str, found: Json, values: list[list[float]]) -> Map:
    xs, ys = found["xs"], found["ys"]
    side = _WIDTH / len(xs)
    rise = side * (ys[1] - ys[0]) / (xs[1] - xs[0])
    height = rise * len(ys)
    low, high = min(map(min, values)), max(map(max, values))
    cells = []
    for k, row in enumerate(values):
        for i, value in enumerate(row):
            weights = ", ".join(f"{weight:.2f}" for weight in found["weights"][k][i])
            heat = 100 * (value - low) / ((high - low) or 1)
            at = round(i * side, 1), round(height - (k + 1) * rise, 1)
            cells.append(Cell(*at, heat, f"{value:.3f} at weights {weights}"))
    across = Axis(xs[0], xs[-1], start=side / 2, end=_WIDTH - side / 2)
    up = Axis(ys[0], ys[-1], start=height - rise / 2, end=rise / 2)
    corners = []
    for label, (x, y) in found["corners"].items():
        right = across.at(x)
        anchor = "start" if right < _WIDTH / 3 else "end" if right > 2 * _WIDTH / 3 else "middle"
        corners.append(Corner(right, up.at(y), label, anchor))
    worst, best = (f"{value:.3f}" for value in (low, high))
    return Map(title, cells, round(side, 1), round(rise, 1), corners, worst, best, _WIDTH, round(height, 1))
