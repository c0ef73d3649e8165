"""What each stage read and wrote when it last ran here, `.mergeline/records/STAGE.json`, and how the last run went.

They vouch for outputs as dvc.lock does, from the moment that a stage has run, and where there is no DVC at all.
"""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator

from mergeline.merging.errors import UserError
from mergeline.merging.files import write_json

if TYPE_CHECKING:
    from mergeline.tasks.step import Stage
    from mergeline.tasks.workspace import Workspace

Record = dict[str, Any]  # in the form of `Workspace.record`, with the digests of outputs as `outs`


def last_run(workspace: Workspace, stage: Stage) -> Record | None:
    """The record of a stage, or None if it never ran here."""
    return _read(_file(workspace, stage))


def remember(workspace: Workspace, stage: Stage, record: Record) -> None:
    """Keep the record of a stage that has run."""
    if last_run(workspace, stage) != record:
        write_json(_file(workspace, stage), record)


@contextmanager
def noted_run(workspace: Workspace) -> Iterator[list[str]]:
    """Keep in `.mergeline/last_run.json` how the run in this block goes; names of stages that ran go into the list."""
    ran: list[str] = []
    run: dict[str, Any] = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "outcome": "did not end: it still runs, or was killed",
    }
    started = time.monotonic()
    write_json(_run_file(workspace), run)
    try:
        yield ran
        run["outcome"] = "completed"
    except UserError as error:
        run["outcome"] = f"failed: {error}"
        raise
    except BaseException as error:
        run["outcome"] = f"failed: {type(error).__name__}"
        raise
    finally:
        run |= {"seconds": round(time.monotonic() - started, 1), "ran": ran}
        write_json(_run_file(workspace), run)


def last_pipeline_run(workspace: Workspace) -> dict[str, Any] | None:
    """When the pipeline last ran here (`started`), its `outcome`, and if it ended its `seconds` and what `ran`."""
    return _read(_run_file(workspace))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _run_file(workspace: Workspace) -> Path:
    return workspace.state / "last_run.json"


def _file(workspace: Workspace, stage: Stage) -> Path:
    return workspace.state / "records" / f"{stage.name}.json"
