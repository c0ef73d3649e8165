"""What the report of sequence-to-sequence models shows besides: texts that they wrote."""

from __future__ import annotations

from typing import Any

from mergeline.evaluation.pages.figures import ranked
from mergeline.evaluation.pages.page import Grid, Section

Json = dict[str, Any]

_TEXT = (
    "The first test examples of each task, and what every model wrote to them. Where numbers are asked for, a text "
    "that is none counts as the median of those that the model wrote."
)


def section(board: Json) -> Section:
    """The section of a leaderboard."""
    return Section("text2text", "Texts", _TEXT, grids(board))


def grids(board: Json) -> list[Grid]:
    """The texts of its models, and of tasks where numbers are asked for how many texts are none."""
    models = [row for row in ranked(board) if "samples" in row]
    found = [_written(board["tasks"], models)]
    if any("no_number" in row for row in models):
        found.append(_no_numbers(models))
    return found


def _written(tasks: list[str], models: list[Json]) -> Grid:
    """A row an example, whose right answer stands below what was asked."""
    rows = []
    for task in tasks:
        for i, (source, target, _) in enumerate(models[0]["samples"][task]):
            wrote = [(model["samples"][task][i][2], "") for model in models]
            rows.append((task, [(source, target), *wrote]))
    return Grid("Texts", ["Task", "Asked", *(model["name"] for model in models)], rows, "What was written")


def _no_numbers(models: list[Json]) -> Grid:
    tasks = [*models[0]["no_number"]]
    rows = [(row["name"], [(f"{row['no_number'][task]:.3f}", "") for task in tasks]) for row in models]
    return Grid("No numbers", ["Model", *tasks], rows, "Share of texts that should be a number and are none")
