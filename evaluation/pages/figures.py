"""Pictures of a finished comparison as PNG files, and the curves of a search that they and the report draw.

matplotlib is used without pyplot, whose global state does not bear threads. Colours are Okabe and Ito's, and
shades of one blue: colour-blind readers can tell them apart.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterable, NamedTuple, Sequence

from mergeline.evaluation.measures import ACCURACY, Measure, measures_of
from mergeline.merging.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Json = dict[str, Any]
Point = tuple[float, float]  # value of a parameter, mean score on the validation split

_MERGE, _CANDIDATE, _REFERENCE = "#0072b2", "#d55e00", "#999999"
_LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31")
_MARKERS = "osD^vPX<"
_LONGEST_NAME = 32  # characters; a longer one would take the room of the picture


class Curve(NamedTuple):
    """Mean validation outcome against one numeric parameter of a search.

    best: over all other parameters. other: the first other parameter that varied, if any. lines: for each of
    its values, as text, the best over the rest. chosen: the point of the chosen setting. scattered: the points are no
    grid but what a sampler proposed, all of them in `best`, and there are no lines.
    """

    best: list[Point]
    other: str | None
    lines: dict[str, list[Point]]
    chosen: Point
    scattered: bool = False


def draw_all(folder: Path, *, leaderboard: Json, searches: dict[str, Json], description: Json) -> list[Path]:
    """Draw every picture that the results have into `folder`, the same bytes for the same results.

    heatmap.png, leaderboard.png; rank_curve.png, scale_curve.png where a search varied them; similarity.png
    where there are several experts. Pictures of an earlier run that these results do not have are removed.

    leaderboard: leaderboard.json of the compare step. searches: merge -> its search result. description: that
    of the extract step.

    Raises:
        UserError: the folder cannot be written.
    """
    figures = {
        "heatmap": _heatmap(leaderboard),
        "leaderboard": _leaderboard(leaderboard),
        "rank_curve": _curves(searches, "rank", measures_of(leaderboard).mean),
        "scale_curve": _curves(searches, "scale", measures_of(leaderboard).mean),
        "similarity": _similarity(description),
    }
    drawn = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            write_bytes(path, _png(figure))
            drawn.append(path)
    return drawn


def at_use(row: Json) -> str:
    """Whether the task of an input is "known" to a model when it is used, or "found"; "" of one model for all tasks.

    Models are ranked, and compared, only with others of their class.
    """
    return row.get("at_use", {}).get("task", "")


def ranked(leaderboard: Json) -> list[Json]:
    """The rows of a leaderboard, best mean test score first; then those that are told the task, or find it."""
    outcome = measures_of(leaderboard).mean.turned
    return sorted(leaderboard["rows"], key=lambda row: (at_use(row) != "", -outcome(row["mean"])))


def extent(leaderboard: Json) -> tuple[float, float]:
    """The ends of an axis for means and their intervals: 0 and 1 if they are fractions of one."""
    low = min(row["lower"] for row in leaderboard["rows"])
    high = max(row["upper"] for row in leaderboard["rows"])
    if 0 <= low and high <= 1:
        return 0.0, 1.0
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def half_width(estimates: list[Json]) -> float:
    """Half the width of the widest interval among estimates that have "lower" and "upper"."""
    return max((estimate["upper"] - estimate["lower"]) / 2 for estimate in estimates)


def searched(search: Json) -> list[str]:
    """The parameters that a search varied."""
    values: dict[str, set[str]] = {}
    for point in search["points"]:
        for key, value in point["params"].items():
            values.setdefault(key, set()).add(json.dumps(value))
    return [key for key, found in values.items() if len(found) > 1]


def curve(search: Json, parameter: str, measure: Measure = ACCURACY) -> Curve | None:
    """The curve of a search over `parameter`; None if it did not vary or is not a number. measure: of its means."""
    points, varied = search["points"], searched(search)
    if "search" in search:
        return _scattered(search, parameter) if parameter in varied else None
    if parameter not in varied or not all(_is_number(p["params"][parameter]) for p in points):
        return None
    other = next((key for key in varied if key != parameter), None)
    groups: dict[str, list[Json]] = {}
    for point in points if other else ():
        groups.setdefault(as_text(point["params"][other]), []).append(point)
    chosen = next(p for p in points if p["params"] == search["chosen"])
    return Curve(
        best=_best(points, parameter, measure),
        other=other,
        lines={value: _best(group, parameter, measure) for value, group in groups.items()},
        chosen=(chosen["params"][parameter], chosen["mean"]),
    )


def is_chosen(point: Json, search: Json) -> bool:
    """Whether a point of a search is the one that was chosen."""
    method = search.get("method")
    return point["params"] == search["chosen"] and point.get("method", method) == method


def _scattered(search: Json, parameter: str) -> Curve | None:
    """The points that have the parameter, and it is a number; None where the chosen one is not among them."""
    points = [p for p in search["points"] if _is_number(p["params"].get(parameter))]
    places = sorted((p["params"][parameter], p["mean"]) for p in points)
    chosen = [(p["params"][parameter], p["mean"]) for p in points if is_chosen(p, search)]
    return Curve(places, None, {}, chosen[0], scattered=True) if chosen and len(places) > 1 else None


def is_logarithmic(parameter: str, values: Sequence[float]) -> bool:
    """Whether an axis over these values is best logarithmic: ranks, and whatever spans decades."""
    return min(values) > 0 and (parameter == "rank" or max(values) / min(values) >= 50)


def as_text(value: Any) -> str:
    """The value of a parameter as people write it."""
    if isinstance(value, str):
        return value
    return f"{value:g}" if _is_number(value) else json.dumps(value, ensure_ascii=False)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _best(points: list[Json], parameter: str, measure: Measure) -> list[Point]:
    """For each value of `parameter`, ascending, the best mean."""
    better = min if measure.lower else max
    best: dict[float, float] = {}
    for point in points:
        value = point["params"][parameter]
        best[value] = better(point["mean"], best.get(value, point["mean"]))
    return sorted(best.items())


def _png(figure: Figure) -> bytes:
    """Without the version of matplotlib, so that the bytes depend on the picture alone."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=144, metadata={"Software": None})
    return data.getvalue()


def _new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Size in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0].tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _label(name: str) -> str:
    """A name as matplotlib shows it as it is: not as mathematics, not too long."""
    short = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
    return short.replace("$", r"\$")


def _title(ax: Axes, text: str) -> None:
    ax.set_title(text, loc="left", fontweight="bold", pad=10)


def _heatmap(leaderboard: Json) -> Figure:
    rows, tasks = ranked(leaderboard), leaderboard["tasks"]
    values = [
        [row["mean"], *(row["tasks"].get(task, {}).get("accuracy", math.nan) for task in tasks)]
        for row in rows
    ]
    figure, (ax,) = _new_figure(3.2 + 0.62 * len(values[0]), 1.9 + 0.36 * len(rows))
    measures, names = measures_of(leaderboard), [row["name"] for row in rows]
    if measures.different:
        # The colour of a cell is its place among those of its column, from the worst to the best.
        each = [measures.mean, *map(measures.of, tasks)]
        shades = list(zip(*(places(column, measure) for column, measure in zip(zip(*values), each))))
        columns = ["mean", *(f"{task}: {measures.of(task).label}" for task in tasks)]
        _draw_matrix(ax, values, names, columns, digits=2, shades=shades)
    else:
        lower = measures.mean.lower
        image = _draw_matrix(
            ax, values, names, ["mean", *tasks], digits=2, cmap="Blues_r" if lower else "Blues"
        )
        figure.colorbar(image, ax=ax, label=measures.mean.title, shrink=0.9)
    ax.axvline(0.5, color="white", linewidth=4)
    _title(ax, f"Test {measures.mean.label} by model and task")
    return figure


def places(values: Iterable[float], measure: Measure) -> list[float]:
    """Where scores lie between the worst of them, 0, and the best, 1; of a NaN, NaN."""
    outcomes = [measure.turned(value) for value in values]
    known = [outcome for outcome in outcomes if not math.isnan(outcome)]
    low, high = min(known), max(known)
    return [(outcome - low) / ((high - low) or 1) for outcome in outcomes]


def _draw_matrix(
    ax: Axes,
    values: list[list[float]],
    rows: list[str],
    columns: list[str],
    digits: int,
    shades: Sequence[Sequence[float]] | None = None,
    cmap: str = "Blues",
) -> Any:
    """Cells with their numbers; a NaN is left blank. Returns the image, for a colour bar.

    shades: what colours cells, if not their numbers.
    """
    shades = values if shades is None else shades
    known = [shade for row in shades for shade in row if not math.isnan(shade)]
    image = ax.imshow(shades, cmap=cmap, aspect="auto", vmin=min(known), vmax=max(known))
    labels = [_label(name) for name in columns]
    ax.set_xticks(range(len(columns)), labels, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(rows)), [_label(name) for name in rows])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    norm: Any = image.norm  # of one value, too
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if not math.isnan(value):
                red, green, blue, _ = image.cmap(norm(shades[i][j]))
                dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
                colour = "white" if dark else "black"
                ax.text(j, i, f"{value:.{digits}f}", ha="center", va="center", fontsize=8, color=colour)
    return image


def _leaderboard(leaderboard: Json) -> Figure:
    rows = ranked(leaderboard)[::-1]  # matplotlib counts from below
    colours = [_REFERENCE if row["kind"] != "merge" else _MERGE for row in rows]
    places = range(len(rows))
    low, high = extent(leaderboard)
    figure, (ax,) = _new_figure(8, 1.2 + 0.4 * len(rows))
    bars = ax.barh(places, [row["mean"] - low for row in rows], left=low, color=colours, height=0.65)
    for place, (row, bar) in enumerate(zip(rows, bars)):
        ax.hlines(place, row["lower"], row["upper"], color="black", linewidth=2)
        ax.text(row["upper"] + 0.01 * (high - low), place, f"{row['mean']:.3f}", va="center", fontsize=9)
        if row["kind"] == "merge" and row["name"] == leaderboard["candidate"]:
            bar.set_color(_CANDIDATE)
    ax.set_yticks(places, [_label(row["name"]) for row in rows])
    ax.set_xlim(low, high + 0.08 * (high - low))
    if (low, high) == (0, 1):
        ax.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    ax.set_xlabel("black line: 95 % interval; orange: candidate; grey: base and experts")
    _title(ax, f"Leaderboard: mean test {measures_of(leaderboard).mean.title} over tasks")
    return figure


def _apart(values: list[float], share: float = 0.06) -> list[float]:
    """The ascending values that lie at least `share` of a logarithmic axis apart, so that their labels do."""
    gap = share * math.log(values[-1] / values[0])
    kept = values[:1]
    for value in values[1:]:
        if math.log(value / kept[-1]) >= gap:
            kept.append(value)
    return kept


def _curves(searches: dict[str, Json], parameter: str, measure: Measure) -> Figure | None:
    """One line for each merge that varied `parameter`, best over its other parameters."""
    curves = {
        name: found for name, search in searches.items() if (found := curve(search, parameter, measure))
    }
    if not curves:
        return None
    figure, (ax,) = _new_figure(8, 4.5)
    handles = []
    for i, found in enumerate(curves.values()):
        colour, marker = _LINES[i % len(_LINES)], _MARKERS[i % len(_MARKERS)]
        handles += ax.plot(*zip(*found.best), color=colour, marker=marker, markersize=5)
        handles[-1].set_linestyle("none" if found.scattered else "-" if i < len(_LINES) else "--")
        ax.plot(*found.chosen, color=colour, marker="o", markersize=14, fillstyle="none", markeredgewidth=1.5)
    values = sorted({x for found in curves.values() for x, _ in found.best})
    if is_logarithmic(parameter, values):
        ax.set_xscale("log")
        ticks = _apart(values)
        ax.set_xticks(ticks, [as_text(value) for value in ticks])
        ax.set_xticks([], minor=True)
    ax.grid(color="#dddddd", linewidth=0.8)
    ax.set_xlabel(parameter)
    ax.set_ylabel(f"mean {measure.label}, best over other parameters")
    _title(ax, f"Validation {measure.title} by {parameter} (ring: chosen)")
    figure.legend(handles, [_label(name) for name in curves], frameon=False, loc="outside right upper")
    return figure


def _similarity(description: Json) -> Figure | None:
    names = list(description["experts"])
    if len(names) < 2:
        return None
    figure, axes = _new_figure(3.6 + 1.1 * len(names), 1.9 + 0.42 * len(names), columns=2)
    panels = (("cosine", "Cosine of task vectors"), ("sign_conflict", "Share of weights with opposite signs"))
    for ax, (key, title) in zip(axes, panels):
        matrix = description[key]
        values = [[math.nan if i == j else v for j, v in enumerate(row)] for i, row in enumerate(matrix)]
        image = _draw_matrix(ax, values, names, names, digits=3)
        _title(ax, title)
        figure.colorbar(image, ax=ax, shrink=0.9)
    return figure
