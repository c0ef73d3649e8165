"""DVC: which outputs its lock file vouches for, bringing them back from its cache, and recording a finished run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Collection, Mapping

from mergeline.merging.errors import UserError

if TYPE_CHECKING:
    from mergeline.tasks.step import Stage
    from mergeline.tasks.workspace import Workspace

_READ_AGAIN_AFTER = (0.1, 0.4, 1.5)  # seconds: on a busy machine DVC takes a second to write it


def locked(workspace: Workspace, stage: Stage) -> dict[str, Any] | None:
    """What dvc.lock records of a stage, in the form of `Workspace.record` with its `outs`, or None."""
    entry = _lock(workspace.root / "dvc.lock").get(stage.name)
    if entry is None:
        return None
    return {
        "stage": stage.name,
        "params": dict(entry.get("params", {}).get("params.yaml", {})),
        "deps": {dep["path"]: dep["md5"] for dep in entry.get("deps", [])},
        "outs": {out["path"]: out["md5"] for out in entry.get("outs", [])},
    }


def restore(workspace: Workspace, stage: Stage, record: Mapping[str, Any]) -> bool:
    """Bring a stage's outputs into place if dvc.lock knows them for exactly this record; whether that worked."""
    entry = locked(workspace, stage) if workspace.has_dvc else None
    if entry is None or any(entry[part] != record[part] for part in ("params", "deps")):
        return False
    if workspace.outputs(stage) != entry["outs"]:
        run_dvc(workspace.root, "checkout", "--force", stage.name, check=False)
    return workspace.outputs(stage) == entry["outs"]


def is_committed(workspace: Workspace, records: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether dvc.lock says just this of these stages; there is nothing to say it where DVC is not used."""
    if not workspace.has_dvc:
        return True
    return all(locked(workspace, s) == records[s.name] for s in workspace.stages if s.name in records)


def commit(workspace: Workspace, records: Mapping[str, Mapping[str, Any]], ran: Collection[str]) -> bool:
    """Put a finished run into dvc.lock and DVC's cache; False if it was there already.

    `records` maps the stages of the run, all or some, to their records with `outs`, taken when they ran; `ran` names
    those that ran just now. What dvc.lock says of other stages stays.

    Raises:
        UserError: a dependency or an output changed after its stage had run; DVC is not set up here.
    """
    if not workspace.has_dvc:
        return False
    stages = [stage for stage in workspace.stages if stage.name in records]
    if not ran and is_committed(workspace, records):
        return False
    whole = len(stages) == len(workspace.stages)
    # This dvc.yaml alone of those in the repository; of some stages only, or --force would vouch for stale outputs.
    run_dvc(workspace.root, "commit", "--force", *(["dvc.yaml"] if whole else records))
    for stage in stages:
        entry = locked(workspace, stage)
        if entry != records[stage.name]:
            part = next(
                (p for p in ("params", "deps", "outs") if entry and entry[p] != records[stage.name][p]),
                "entry",
            )
            raise UserError(f"{stage.name}: its {part} changed while the pipeline ran; run it again")
    return True


def _lock(path: Path) -> Mapping[str, Any]:
    """The stages of dvc.lock. DVC writes it in place: one that is none may be half of what a run is writing.

    Raises:
        UserError: it still is none after a while.
    """
    for seconds in (*_READ_AGAIN_AFTER, None):
        try:
            return _parsed_lock(path, path.stat().st_mtime_ns)
        except FileNotFoundError:
            break
        except UserError:
            if seconds is None:
                raise
            time.sleep(seconds)
    return {}


@cache
def _parsed_lock(path: Path, _: int) -> Mapping[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    mend = "bring it back from git, or remove it: the next run writes it anew"
    try:
        stages = YAML(typ="safe").load(path).get("stages", {})
    except (YAMLError, UnicodeDecodeError, RecursionError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: is no lock of DVC's ({reason}); {mend}") from None
    if not isinstance(stages, Mapping):
        raise UserError(f"{path}: is no lock of DVC's (no stages); {mend}")
    return stages


def run_dvc(root: Path, *arguments: str, check: bool = True) -> None:
    """Run DVC in a folder (raises UserError if it fails and `check` asks for it)."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "dvc", *arguments],  # -P: a file of the workspace is no module
        cwd=root,
        env={**os.environ, "DVC_NO_ANALYTICS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if check and done.returncode:
        reason = " ".join((done.stderr or done.stdout).split())
        raise UserError(f"dvc {arguments[0]} failed in {root}: {reason[-400:]}")
