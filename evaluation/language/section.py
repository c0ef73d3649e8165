"""What the report of language models shows besides: gains kept, perplexities, and lm-eval's own numbers."""

from __future__ import annotations

from typing import Any, Iterable

from mergeline.evaluation.pages.figures import as_text, ranked
from mergeline.evaluation.pages.page import Grid, Section

Json = dict[str, Any]
Cells = list[tuple[str, str]]

_TEXT = (
    "Gain kept is the mean, over the tasks that an expert learned, of (accuracy − base) / (expert − base). "
    "Perplexity is of words, with a 95 % interval over documents; smaller is better, and above the base's means that "
    "something was forgotten. Tasks are held in if an expert was trained for them; for a merge, one that it is made of."
)
_NOTHING = ("–", "")


def section(board: Json) -> Section:
    """The section of a leaderboard."""
    rows = ranked(board)
    return Section("language", "Language models", _TEXT, [_forgetting(rows), _reported(rows)])


def _forgetting(rows: list[Json]) -> Grid:
    """Gains, means held in and out, and perplexities: a row a model."""
    tasks = _in_order(task for row in rows for task in row.get("perplexity", {}))

    def cells(row: Json) -> Cells:
        means = [_fraction(row.get(key)) for key in ("gain_kept", "held_in", "held_out")]
        return means + [cell for task in tasks for cell in _perplexity(row.get("perplexity", {}).get(task))]

    columns = ["Model", "Gain kept", "Held in", "Held out"]
    columns += [column for task in tasks for column in (f"Perplexity: {task}", "Bits a byte")]
    return Grid("Language models", columns, [(row["name"], cells(row)) for row in rows])


def _reported(rows: list[Json]) -> Grid:
    """lm-eval's own numbers: a row a task and metric."""
    models = [row for row in rows if "lm_eval" in row]
    metrics = _in_order((task, key) for row in models for task, own in row["lm_eval"].items() for key in own)

    def cell(row: Json, task: str, key: str) -> tuple[str, str]:
        value, error = row["lm_eval"].get(task, {}).get(key) or (None, None)
        if value is None:
            return _NOTHING
        return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}"), ""

    return Grid(
        "Numbers of lm-eval",
        ["Task and metric", *(row["name"] for row in models)],
        [(f"{task} {key}", [cell(row, task, key) for row in models]) for task, key in metrics],
        summary="What lm-eval reports, with its standard errors",
    )


def _perplexity(found: Json | None) -> Cells:
    if found is None:
        return [_NOTHING, _NOTHING]
    extent = f"{as_text(found['lower'])} to {as_text(found['upper'])}"
    return [(as_text(found["value"]), extent), _fraction(found["bits_per_byte"])]


def _fraction(value: float | None) -> tuple[str, str]:
    return _NOTHING if value is None else (f"{value:.3f}", "")


def _in_order(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
