"""The report of a run: one HTML file that needs nothing else, made of what the steps left behind.

This module turns results into what the page shows; report.html.jinja says how it looks.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple

from mergeline.evaluation.measures import Measure, Measures, measures_of
from mergeline.evaluation.pages.examples import TaskExamples
from mergeline.evaluation.pages.figures import (
    as_text,
    at_use,
    curve,
    extent,
    half_width,
    is_chosen,
    is_logarithmic,
    places,
    ranked,
    searched,
)
from mergeline.evaluation.pages.fronts import picture
from mergeline.evaluation.pages.page import (
    HEIGHT,
    WIDTH,
    Axis,
    Cell,
    Section,
    Table,
    counted,
    round_values,
    square,
    table,
    write_page,
)
from mergeline.evaluation.verdicts import told

Json = dict[str, Any]


def render(
    path: Path,
    *,
    leaderboard: Json,
    searches: dict[str, Json],
    description: Json,
    costs: list[Json],
    verdict: Json | None,
    section: Section | None = None,
    changes: Json | None = None,
    examples: list[TaskExamples] | str = "",
) -> None:
    """Write the report to `path`, the same bytes for the same results.

    leaderboard: leaderboard.json of the compare step. searches: merge -> its search result. description: that
    of the extract step. costs: of stages, {"stage", "seconds", "cpu_seconds", "peak_rss_bytes"}. verdict: of
    the register step, or None before it has run. section: what the modality shows besides. changes: since the run
    before, of `evaluation.changes`. examples: on which candidate and base differ most, by tasks; or why there are none.

    Raises:
        UserError: the file cannot be written.
    """
    rows, (low, high) = ranked(leaderboard), extent(leaderboard)
    measures = measures_of(leaderboard)
    filters: dict[str, Callable[..., Any]] = {
        "score": _score,
        "place": lambda value: f"{100 * (value - low) / (high - low):.2f}",
        "counted": counted,
        "signed": _signed,
        "p_value": _p_value,
        "percent": lambda share: f"{share:.2%}",
        "bytes": _bytes,
        "duration": _duration,
        "settings": _settings,
        "value": as_text,
        "told": told,
    }
    write_page(
        path,
        "report.html.jinja",
        filters,
        board=leaderboard,
        measure=measures.mean,
        mean_of=measures.mean_of,
        extent=(low, high),
        rows=rows,
        summary=_summary(leaderboard, measures),
        at_use=_at_use(rows),
        pairs=_pairs(leaderboard, measures.mean),
        accuracies=_accuracies(rows, leaderboard["tasks"], measures),
        section=section,
        searches=_searches(searches, measures),
        vectors=_vectors(description),
        steps=_steps(costs),
        costs=costs,
        verdict=verdict,
        examples=examples if isinstance(examples, list) else [],
        no_examples=examples if isinstance(examples, str) else "",
        changes=changes and _changes(changes, measures.mean),
    )


# ------------------------------------------------------------ numbers as text


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _settings(params: Json) -> str:
    return ", ".join(f"{name} {as_text(value)}" for name, value in params.items()) or "no parameters"


# ------------------------------------------------------------ leaderboard


def _summary(board: Json, measures: Measures) -> Json:
    """The candidate, its distance to experts and base, and any merge that does better on test."""
    rows = {row["kind"]: row for row in board["rows"] if row["kind"] != "merge"}
    merges = [row for row in ranked(board) if row["kind"] == "merge"]
    candidate = next(row for row in merges if row["name"] == board["candidate"])
    merges = [row for row in merges if at_use(row) == at_use(candidate)]
    outcome = measures.mean.turned
    return {
        "row": candidate,
        "merges": len(merges),
        "against": {
            kind: _distance(candidate, rows[kind], measures) for kind in ("experts", "base") if kind in rows
        },
        "better_on_test": merges[0] if outcome(merges[0]["mean"]) > outcome(candidate["mean"]) else None,
    }


def _at_use(rows: list[Json]) -> list[Json]:
    """What is told of the models to which the task is known or found at use: how, and what it costs."""
    told = []
    for row in rows:
        if "at_use" in row:
            route = row["at_use"].get("route", {}).get("test", {})
            worst = min(route, key=route.__getitem__) if route else None
            mean = math.fsum(route.values()) / len(route) if route else None
            told.append(
                {"name": row["name"], **row["at_use"], "mean": mean, "worst": worst, "by_task": route}
            )
    return told


def _distance(row: Json, other: Json, measures: Measures) -> Json:
    """Mean score of `row` minus that of `other`, over the tasks that both have."""
    tasks = row["tasks"].keys() & other["tasks"].keys()
    gaps = (
        measures.of(task).turned(row["tasks"][task]["accuracy"] - other["tasks"][task]["accuracy"])
        for task in tasks
    )
    return {"difference": measures.mean.turned(math.fsum(gaps) / len(tasks)), "tasks": len(tasks)}


def _pairs(board: Json, measure: Measure) -> Json:
    """Paired comparisons: those of the candidate, as candidate minus other, and the rest.

    `better` of a pair is the one whose interval is clear of zero, if any; `won` counts those of the candidate. `reach`
    is the largest absolute end of an interval: the half-width of the axis they are drawn on.
    """
    pairs = [_flipped(pair) if pair["b"] == board["candidate"] else pair for pair in board["pairs"]]
    pairs = [pair | {"better": pair.get({1: "a", -1: "b"}.get(_better(pair, measure), ""))} for pair in pairs]
    return {
        "candidate": [pair for pair in pairs if pair["a"] == board["candidate"]],
        "rest": [pair for pair in pairs if pair["a"] != board["candidate"]],
        "won": sum(pair["better"] == board["candidate"] for pair in pairs),
        "reach": _reach(pairs),
    }


def _better(pair: Json, measure: Measure) -> int:
    """1 if the interval of a difference of scores is clear of zero on the better side, -1 on the worse, else 0."""
    lower, upper = measure.turned_interval(pair["lower"], pair["upper"])
    return 1 if lower > 0 else -1 if upper < 0 else 0


def _reach(pairs: list[Json]) -> float:
    return max((abs(pair[end]) for pair in pairs for end in ("lower", "upper")), default=0) or 1


def _flipped(pair: Json) -> Json:
    flipped = {"difference": -pair["difference"], "lower": -pair["upper"], "upper": -pair["lower"]}
    return {"a": pair["b"], "b": pair["a"], "p": pair["p"], **flipped}


def _changes(found: Json, measure: Measure) -> Json:
    """What changed in sentences; settings of changed merges, once where they are the same; the reach of intervals."""
    pairs = [merge["pair"] for merge in found["merges"] if merge["pair"]]
    told = [
        merge
        | {
            "settings": list(dict.fromkeys(map(_whole_settings, merge["settings"]))),
            "better": merge["pair"] and _better(merge["pair"], measure),
        }
        for merge in found["merges"]
    ]
    before, now = found["candidates"]
    sentences = [f"{now} is the best merge {'again' if now == before else f'in place of {before}'}."]
    lists = {"Other checkpoints": "inputs", "New": "added", "Gone": "removed", "As they were": "same"}
    sentences += [f"{what}: {', '.join(found[key])}." for what, key in lists.items() if found[key]]
    return {"merges": told, "sentences": sentences, "reach": _reach(pairs)}


def _whole_settings(settings: Json) -> str:
    """Method, parameters, experts of its own, and how many settings were tried."""
    text = f"{settings['method']}: {_settings(settings['params'])}"
    if settings["experts"] is not None:
        text += f"; of {', '.join(settings['experts'])}"
    return text + (f"; {counted(settings['searched'], 'setting')} tried" if settings["searched"] else "")


# ------------------------------------------------------------ tasks


def _accuracies(rows: list[Json], tasks: list[str], measures: Measures) -> Table:
    """The mean test score of every model on every task, the best merges marked; last, the widest intervals.

    The better a score, the stronger its colour; scores that measure different things are coloured by columns.
    """

    def values(row: Json) -> list[float | None]:
        return [row["mean"], *(row["tasks"].get(task, {}).get("accuracy") for task in tasks)]

    shown = [f"{task}: {measures.of(task).title}" if measures.different else task for task in tasks]
    plain = table(["mean", *shown], [(row["name"], values(row)) for row in rows])
    if measures.different:
        plain = _by_column(plain, [values(row) for row in rows], [measures.mean, *map(measures.of, tasks)])
    elif measures.mean.lower:
        plain = plain._replace(rows=[(name, [*map(_inverted, cells)]) for name, cells in plain.rows])
    of_all = [row for row in rows if row["kind"] == "merge"]
    merges = [row for row in of_all if not at_use(row)] or of_all
    best = {
        task: (min if measures.of(task).lower else max)(row["tasks"][task]["accuracy"] for row in merges)
        for task in tasks
    }

    def explained(cell: Cell, row: Json, task: str) -> Cell:
        score = row["tasks"].get(task)
        if score is None:
            return cell
        title = f"95 % interval {score['lower']:.3f} to {score['upper']:.3f}, n = {score['n']}"
        if score["normalised"] is not None:
            title += f", {score['normalised']:.0%} of its expert"
        return cell._replace(title=title, best=row["kind"] == "merge" and score["accuracy"] == best[task])

    marked = [
        (name, [cells[0], *(explained(cell, row, task) for cell, task in zip(cells[1:], tasks))])
        for (name, cells), row in zip(plain.rows, rows)
    ]
    measured = [rows, *([row["tasks"][task] for row in rows if task in row["tasks"]] for task in tasks)]
    widths = [Cell(f"±{half_width(estimates):.3f}", None) for estimates in measured]
    return plain._replace(rows=marked, foot=[("widest interval", widths)])


def _inverted(cell: Cell) -> Cell:
    return cell if cell.heat is None else cell._replace(heat=100 - cell.heat)


def _by_column(plain: Table, values: list[list[float | None]], each: list[Measure]) -> Table:
    """With cells coloured by their places from the worst of their column to the best."""
    columns = [
        places([math.nan if value is None else value for value in column], measure)
        for column, measure in zip(zip(*values), each)
    ]
    rows = [
        (
            name,
            [c if c.heat is None else c._replace(heat=100 * place) for c, place in zip(cells, own)],
        )
        for (name, cells), own in zip(plain.rows, zip(*columns))
    ]
    return plain._replace(rows=rows)


# ------------------------------------------------------------ search curves


class Line(NamedTuple):
    """`points` as SVG writes them; `place` in the order of lines, 0 to 100, gives the colour."""

    label: str
    points: list[tuple[float, float]]
    place: float


class Chart(NamedTuple):
    """A line chart, in the coordinates of a picture of `width` x `height`."""

    parameter: str
    other: str | None
    best: list[tuple[float, float]]
    lines: list[Line]
    chosen: tuple[float, float]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    scattered: bool = False
    width: int = WIDTH
    height: int = HEIGHT


def _searches(searches: dict[str, Json], measures: Measures) -> list[Json]:
    """Of every merge that searched: points, charts, where the choice lies on the edge of the grid, and the grid.

    how: what a search with a budget says of itself. front: of such a one over all tasks, the points that no other beats
    on every task, as a table and a picture.
    """
    measure = measures.mean
    return [
        {
            "name": name,
            "points": _points(search, range(len(search["points"]))),
            "chosen": search["chosen"],
            "mean": next(point["mean"] for point in search["points"] if is_chosen(point, search)),
            "columns": _columns(search),
            "how": _how(search),
            "front": _front(search, measures),
            "charts": [chart for key in searched(search) if (chart := _chart(search, key, measure))],
            "edges": list(_edges(search)),
            "grid": _grid(search, measure),
        }
        for name, search in searches.items()
        if search["points"]
    ]


def _columns(search: Json) -> list[str]:
    """The parameters of any point."""
    return list(dict.fromkeys(key for point in search["points"] for key in point["params"]))


def _points(search: Json, chosen: Iterable[int]) -> list[Json]:
    """Rows of a table of points: their values by columns, mean, and what is to be said of them."""
    rows = []
    for i in chosen:
        point = search["points"][i]
        note = " (chosen)" if is_chosen(point, search) else ""
        if point.get("dropped"):
            note = f" (estimated from {counted(point['examples'], 'example')})"
        params = point["params"]
        cells = [as_text(params[key]) if key in params else "" for key in _columns(search)]
        rows.append(
            {
                "method": point.get("method"),
                "cells": cells,
                "mean": point["mean"],
                "tasks": point["tasks"],
                "note": note,
            }
        )
    return rows


def _how(search: Json) -> str:
    """How the points of a search with a budget were found, and what it cost beside measuring all of them."""
    if "search" not in search:
        return ""
    told = search["search"]
    text = f"Proposed by {told['sampler']} with seed {told['seed']} within {told['budget']}"
    if told["dropped"]:
        text += f"; {told['dropped']} dropped early in a race"
    whole = len(search["points"]) * told["examples_of_a_point"]
    text += f"; {told['examples']} examples measured, {told['examples'] / whole:.0%} of those of its points"
    if told["points_of_space"]:
        grid = told["points_of_space"] * told["examples_of_a_point"]
        text += f" and {told['examples'] / grid:.2g} times those of all {told['points_of_space']} points of the space"
    if surrogate := search.get("surrogate"):
        errors = [one["front_error"] for one in surrogate["tasks"].values()]
        text += (
            f"; quadratics fitted to the first {surrogate['sampled']} points proposed the others, and are off there by "
            f"{min(errors):.2g} to {max(errors):.2g}, by tasks"
        )
    return text + ("." if told["reproducible"] else "; not reproducible, for the budget is in minutes.")


def _front(search: Json, measures: Measures) -> Json | None:
    if "front" not in search:
        return None
    points = search["points"]
    order = sorted(search["front"], key=lambda i: -measures.mean.turned(points[i]["mean"]))
    rows = _points(search, order)
    chosen = next((k for k, i in enumerate(order) if is_chosen(points[i], search)), None)
    drawn = picture([row["tasks"] for row in rows], [point["tasks"] for point in points], chosen, measures)
    return {"tasks": list(rows[0]["tasks"]), "rows": rows, "columns": _columns(search), "picture": drawn}


def _chart(search: Json, parameter: str, measure: Measure) -> Chart | None:
    found = curve(search, parameter, measure)
    if found is None:
        return None
    values, means = zip(*found.best)
    # Lines that are further from the best leave the picture.
    room = max(0.05, max(means) - min(means))
    if measure.lower:
        drawn = [min(point["mean"], max(means) + room) for point in search["points"]]
    else:
        drawn = [max(point["mean"], min(means) - room) for point in search["points"]]
    grid = round_values(drawn, least=0.01)
    logarithmic = is_logarithmic(parameter, values)
    horizontal = Axis(values[0], values[-1], start=52, end=WIDTH - 14, logarithmic=logarithmic)
    vertical = Axis(grid[0], grid[-1], start=HEIGHT - 38, end=10)

    def placed(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(horizontal.at(x), vertical.at(y)) for x, y in points]

    groups = enumerate(found.lines.items())
    step = 100 / max(1, len(found.lines) - 1)
    return Chart(
        parameter=parameter,
        other=found.other,
        best=placed(found.best),
        lines=[Line(label, placed(points), step * i) for i, (label, points) in groups],
        chosen=placed([found.chosen])[0],
        x_ticks=horizontal.ticks(values, room=30),
        y_ticks=vertical.ticks(grid, room=20, form="{:.2f}".format),
        scattered=found.scattered,
    )


def _edges(search: Json) -> Iterable[str]:
    """Which chosen values are the smallest or the largest that was tried: the best may lie beyond."""
    for parameter in searched(search):
        if found := curve(search, parameter):
            value, tried = found.chosen[0], [x for x, _ in found.best]
            if value in (tried[0], tried[-1]):
                end = "smallest" if value == tried[0] else "largest"
                yield f"{parameter} {as_text(value)} is the {end}"


def _grid(search: Json, measure: Measure) -> Json | None:
    """The points of a search that varied two parameters: a row for each value of the first; the chosen is the best."""
    varied = searched(search)
    if len(varied) != 2 or "search" in search:
        return None
    means = {tuple(as_text(p["params"][key]) for key in varied): p["mean"] for p in search["points"]}
    rows, columns = (list(dict.fromkeys(values)) for values in zip(*means))
    plain = table(columns, [(row, [means.get((row, column)) for column in columns]) for row in rows])
    chosen = tuple(as_text(search["chosen"][key]) for key in varied)
    if measure.lower:
        plain = plain._replace(rows=[(row, [*map(_inverted, cells)]) for row, cells in plain.rows])
    marked = [
        (row, [cell._replace(best=(row, column) == chosen) for cell, column in zip(cells, columns)])
        for row, cells in plain.rows
    ]
    return {"parameters": varied, "table": plain._replace(rows=marked)}


# ------------------------------------------------------------ task vectors


def _vectors(description: Json) -> Json:
    """What the extract step saw, as tables; those with nothing to show are None."""
    experts = description["experts"]
    names = list(experts)
    return {
        "experts": experts,
        "longest": max(expert["relative_norm"] for expert in experts.values()) or 1,
        "cosine": square(names, description["cosine"]),
        "sign_conflict": square(names, description["sign_conflict"]),
        "blocks": _shares(experts, "energy_by_block"),
        "directions": _shares(experts, "energy_in_leading_directions", lambda share: f"{float(share):.0%}"),
    }


def _shares(experts: dict[str, Json], key: str, title: Callable[[str], str] = str) -> Table | None:
    columns = list(next(iter(experts.values()))[key])
    if not columns:
        return None
    rows = [(name, [expert[key][column] for column in columns]) for name, expert in experts.items()]
    return table([title(column) for column in columns], rows, ".0%")


# ------------------------------------------------------------ costs


def _steps(costs: list[Json]) -> list[Json]:
    """Costs summed by step: the part of a stage's name before "@"."""
    steps: dict[str, Json] = {}
    for cost in costs:
        name = cost["stage"].partition("@")[0]
        zero = {"name": name, "stages": 0, "seconds": 0.0, "cpu_seconds": 0.0, "peak_rss_bytes": 0}
        step = steps.setdefault(name, zero)
        step["stages"] += 1
        step["seconds"] += cost["seconds"]
        step["cpu_seconds"] += cost["cpu_seconds"]
        step["peak_rss_bytes"] = max(step["peak_rss_bytes"], cost["peak_rss_bytes"])
    return list(steps.values())
