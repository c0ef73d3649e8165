"""Line charts of pages: lines over one axis, in the coordinates of the picture; page.html.jinja draws them."""

from __future__ import annotations

from typing import Mapping, NamedTuple, Sequence

from mergeline.evaluation.pages.figures import is_logarithmic
from mergeline.evaluation.pages.page import HEIGHT, WIDTH, Axis, round_values

Points = list[tuple[float, float]]

_COLOURS = 8  # of lines; further ones are dashed


class Line(NamedTuple):
    """`points` as SVG writes them."""

    label: str
    points: Points
    colour: int
    dashed: bool


class Chart(NamedTuple):
    """Lines over one axis, in the coordinates of a picture of `width` x `height`."""

    title: str
    across: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    width: int = WIDTH
    height: int = HEIGHT


def line_chart(
    title: str, across: str, values: Sequence[float], lines: Mapping[str, Sequence[float | None]]
) -> Chart | None:
    """A chart of lines over `values`, on an axis with 0; None where there is nothing to draw."""
    known = [y for line in lines.values() for y in line if y is not None]
    if len(values) < 2 or not known:
        return None
    grid = round_values([min(0.0, *known), max(0.0, *known) or 1.0])
    logarithmic = across.startswith("rank") and is_logarithmic("rank", values)
    horizontal = Axis(values[0], values[-1], start=52, end=WIDTH - 14, logarithmic=logarithmic)
    vertical = Axis(grid[0], grid[-1], start=HEIGHT - 38, end=10)
    drawn = [
        Line(
            label,
            [(horizontal.at(x), vertical.at(y)) for x, y in zip(values, line) if y is not None],
            i % _COLOURS,
            i >= _COLOURS,
        )
        for i, (label, line) in enumerate(lines.items())
    ]
    x_ticks = horizontal.ticks(values, room=30)
    return Chart(title, across, drawn, x_ticks, vertical.ticks(grid, room=20))
