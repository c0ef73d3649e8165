"""The runs that were published last, as far as a report compares with them: leaderboards and predictions.

`.mergeline/runs/current` is the run that was published last, `.mergeline/runs/before` the one before it that had other
results. Both may be deleted: then the report compares with nothing.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeline.evaluation.metrics import Outcomes
from mergeline.merging.canonical import text_digest
from mergeline.merging.files import publish, read_object, staged, write_json
from mergeline.tasks.evaluate import PREDICTIONS, read_outcomes
from mergeline.tasks.leaderboard import read_leaderboard
from mergeline.tasks.modalities import modality_named
from mergeline.tasks.tracking import STATE, data_lineage

if TYPE_CHECKING:
    from mergeline.tasks.modality import Modality

_BOARD, _DATA = "leaderboard.json", "data.json"


def keep(root: Path) -> None:
    """Let the results of a workspace be the run that was published last."""
    board = read_leaderboard(root)
    current, before = _folders(root)
    if _is_of(current, board):
        return
    if (current / _BOARD).exists():
        with staged(before) as folder:
            shutil.copytree(current, folder, dirs_exist_ok=True)
            publish(folder, before)
    with staged(current) as folder:
        for name in _merges(board):
            source = root / "build" / "evaluations" / name / PREDICTIONS
            (folder / name).mkdir()
            shutil.copyfile(source, folder / name / PREDICTIONS)
        write_json(folder / _DATA, data_lineage(root, board))
        write_json(folder / _BOARD, board)
        publish(folder, current)


def since_before(root: Path) -> dict[str, Any] | None:
    """What changed since the last published run that had other results (`evaluation.changes`); None without one."""
    from mergeline.evaluation.changes import changes

    board = read_leaderboard(root)
    for folder in _folders(root):
        if (folder / _BOARD).exists() and not _is_of(folder, board):
            earlier = read_object(folder / _BOARD, mend="delete it")
            comparable = earlier.get("modality") == board["modality"] and earlier["tasks"] == board["tasks"]
            comparable = comparable and read_object(folder / _DATA) == data_lineage(root, board)
            modality = modality_named(board["modality"])
            now = partial(_outcomes, root, modality, board, root / "build" / "evaluations", comparable)
            then = partial(_outcomes, root, modality, board, folder, comparable)
            return changes(board, earlier, now, then)
    return None


def _folders(root: Path) -> tuple[Path, Path]:
    runs = root / STATE / "runs"
    return runs / "current", runs / "before"


def _is_of(folder: Path, board: dict[str, Any]) -> bool:
    return text_digest(read_object(folder / _BOARD, mend="delete it")) == text_digest(board)


def _merges(board: dict[str, Any]) -> list[str]:
    return [row["name"] for row in board["rows"] if row["kind"] == "merge"]


def _outcomes(
    root: Path, modality: Modality, board: dict[str, Any], folder: Path, comparable: bool, merge: str
) -> Outcomes:
    """The test outcomes of a merge, from its predictions in `folder`; none if the runs cannot be compared."""
    if not comparable:
        return {}
    return read_outcomes(modality, root / "build", folder / merge / PREDICTIONS, "test", board["tasks"])
