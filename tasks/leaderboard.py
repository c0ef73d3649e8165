"""The leaderboard that the compare step leaves: where it lies, its rows, and their numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergeline.merging.errors import UserError
from mergeline.merging.files import read_object

LEADERBOARD = "build/leaderboard/leaderboard.json"

_NUMBERS = ("mean", "lower", "upper", "val_mean", "normalised", "worst_task", "norm_ratio")


def read_leaderboard(workspace: Path) -> dict[str, Any]:
    """What the compare step found (raises UserError if it has not run, or was of an earlier version)."""
    board = read_output(workspace / LEADERBOARD)
    if "modality" not in board:
        raise UserError(f"{workspace / LEADERBOARD}: is of an earlier version; run the pipeline again")
    return board


def candidate_row(board: dict[str, Any]) -> dict[str, Any]:
    """The leaderboard's row of the best merge."""
    return next(row for row in board["rows"] if row["name"] == board["candidate"])


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row that every modality has; those that are None are left out."""
    return {name: row[name] for name in _NUMBERS if row.get(name) is not None}


def read_output(path: Path) -> dict[str, Any]:
    """A JSON object that a step wrote (raises UserError if it is missing or damaged)."""
    return read_object(present(path), mend="delete it and run the pipeline again")


def present(path: Path) -> Path:
    """The path of an output that is there (raises UserError)."""
    if not path.exists():
        raise UserError(f"{path}: is missing; run `mergeline run` or `dvc repro` first")
    return path
