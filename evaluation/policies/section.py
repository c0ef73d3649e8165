"""What the report of policies shows besides: returns as the environments count them, and lengths of episodes."""

from __future__ import annotations

from typing import Any

from mergeline.evaluation.pages.figures import ranked
from mergeline.evaluation.pages.page import Grid, Section

Json = dict[str, Any]

_TEXT = (
    "Mean returns of the test episodes as the environment counts them, and below them how many steps an episode had. "
    "Scores are normalised returns, (return − floor) / (target − floor). Every model plays the episodes of the same "
    "seeds."
)


def section(board: Json) -> Section:
    """The section of a leaderboard."""
    tasks = board["policies"]["tasks"]
    asked = [(f"{task['target_return']:g}", f"floor {task['floor']:g}") for task in tasks.values()]
    rows = [(row["name"], [_cell(row["returns"].get(task)) for task in tasks]) for row in ranked(board)]
    return Section(
        "policies", "Returns", _TEXT, [Grid("Returns", ["Model", *tasks], [*rows, ("target", asked)])]
    )


def _cell(found: Json | None) -> tuple[str, str]:
    if found is None:
        return "–", ""
    return f"{found['mean']:.1f}", f"{found['length']:.0f} steps" if "length" in found else ""
