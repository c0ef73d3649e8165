"""What was published last: a digest of all that MLflow, the registry and the report show."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeline.merging.canonical import text_digest
from mergeline.merging.errors import UserError
from mergeline.merging.files import read_object, write_json
from mergeline.tasks.places import REPORT, SOURCES

if TYPE_CHECKING:
    from mergeline.tasks.workspace import Workspace

VERDICT = "verdict.json"  # in .mergeline, written by `register`
_CODE = ("evaluation", "tasks")


def published_digest(workspace: Workspace) -> str:
    """A digest of what publishing reads: parameters, outputs, its own code, and where to."""
    outs = {stage.name: workspace.outputs(stage) for stage in workspace.stages}
    code = [workspace.digests.of(SOURCES / folder) for folder in _CODE]
    return text_digest([workspace.raw, outs, code, os.environ.get("MLFLOW_TRACKING_URI") or ""])


def is_published(workspace: Workspace) -> bool:
    """Whether publishing would show nothing new, and what it left here is still there."""
    here = [workspace.path(str(REPORT)), workspace.state / VERDICT]
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        here.append(workspace.state / "mlflow.db")
    if not all(path.exists() for path in here):
        return False
    try:
        known = read_object(workspace.state / "published.json").get("digest")
    except UserError:  # cut short; publishing again is safe
        return False
    return known == published_digest(workspace)


def load_verdict(state: Path) -> dict[str, Any] | None:
    """The verdict on the candidate that was published last in the workspace of a `.mergeline`, if there was one.

    Raises:
        UserError: its file was damaged.
    """
    return read_object(state / VERDICT, mend="remove it, and the next run writes it anew") or None


def note_published(workspace: Workspace, digest: str) -> None:
    """Remember that what has this digest is published."""
    write_json(workspace.state / "published.json", {"digest": digest})
