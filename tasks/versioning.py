"""DVC: which outputs its lock file vouches for, bringing them back from its cache, and recording a finished run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Collection, Mapping

from merging.errors import UserError
from merging.files import write_bytes
from tasks.params import load_params

if TYPE_CHECKING:
    from tasks.graph import Stage
    from tasks.workspace import Workspace

REPOSITORY = Path(__file__).parent.parent


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
        _dvc(workspace.root, "checkout", "--force", stage.name, check=False)
    return workspace.outputs(stage) == entry["outs"]


def commit(workspace: Workspace, records: Mapping[str, Mapping[str, Any]], ran: Collection[str]) -> bool:
    """Put a finished run into dvc.lock and DVC's cache; False if it was there already.

    `records` maps every stage to its record with `outs`, taken when it ran; `ran` names those that ran just now.

    Raises:
        UserError: a dependency or an output changed after its stage had run; DVC is not set up here.
    """
    if not workspace.has_dvc:
        return False
    if not ran and _agrees(workspace, records):
        return False
    _dvc(workspace.root, "commit", "--force", "dvc.yaml")  # this one alone of those in the repository
    for stage in workspace.stages:
        entry = locked(workspace, stage)
        if entry != records[stage.name]:
            part = next(
                (p for p in ("params", "deps", "outs") if entry and entry[p] != records[stage.name][p]),
                "entry",
            )
            raise UserError(f"{stage.name}: its {part} changed while the pipeline ran; run it again")
    return True


def init_workspace(folder: Path, params: Path | None) -> None:
    """A new workspace: params.yaml (a copy of `params`, or the sample family's), its suite, and this dvc.yaml.

    It must lie inside the repository, whose code is part of what makes a result stale.

    Raises:
        UserError: `folder` lies elsewhere, or holds a params.yaml or dvc.yaml already.
    """
    if not folder.resolve().is_relative_to(REPOSITORY.resolve()):
        raise UserError(
            f"{folder}: choose a folder inside {REPOSITORY}, such as {REPOSITORY / 'runs' / folder.name}"
        )
    for name in ("params.yaml", "dvc.yaml"):
        if (folder / name).exists():
            raise UserError(f"{folder / name} exists; choose an empty folder")
    source = params or REPOSITORY / "params.yaml"
    if not source.is_file():
        raise UserError(f"{source}: no such file")
    code = Path(os.path.relpath(REPOSITORY, folder)).as_posix()
    text = source.read_text()
    measured = load_params(source)
    graph = (REPOSITORY / ("samples/llm/dvc.yaml" if measured.language else "dvc.yaml")).read_text()
    graph = re.sub(r"- code: \S+", f"- code: {code}", graph, count=1)
    if params is None:
        text = text.replace(" samples/", f" {code}/samples/")
    folder.mkdir(parents=True, exist_ok=True)
    suite = measured.suite and source.parent / measured.suite
    if params and suite and suite.is_file():
        write_bytes(folder / suite.name, suite.read_bytes())
        text = text.replace(f"suite: {measured.suite}", f"suite: {suite.name}", 1)
    write_bytes(folder / "params.yaml", text.encode())
    write_bytes(folder / "dvc.yaml", graph.encode())


def _agrees(workspace: Workspace, records: Mapping[str, Mapping[str, Any]]) -> bool:
    return all(locked(workspace, stage) == records[stage.name] for stage in workspace.stages)


def _lock(path: Path) -> Mapping[str, Any]:
    try:
        return _parsed_lock(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        return {}


@cache
def _parsed_lock(path: Path, _: int) -> Mapping[str, Any]:
    from ruamel.yaml import YAML

    return YAML(typ="safe").load(path).get("stages", {})


def _dvc(root: Path, *arguments: str, check: bool = True) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=root,
        env={**os.environ, "DVC_NO_ANALYTICS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if check and done.returncode:
        reason = " ".join((done.stderr or done.stdout).split())
        raise UserError(f"dvc {arguments[0]} failed in {root}: {reason[-400:]}")
