"""Workspaces in which everything has run, or so it seems: outputs are made up, records and publication are real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mergeline.merging.files import write_bytes, write_json
from mergeline.tasks.leaderboard import LEADERBOARD
from mergeline.tasks.places import REPORT
from mergeline.tasks.publication import note_published, published_digest
from mergeline.tasks.records import remember
from mergeline.tasks.step import Stage
from mergeline.tasks.workspace import Workspace

ROW = {
    "name": "average", "kind": "merge", "mean": 0.5, "lower": 0.4, "upper": 0.6, "normalised": None,
    "worst_task": 0.3, "val_mean": 0.5, "params": {},
}  # fmt: skip
VERDICT = {
    "passed": True,
    "findings": [],
    "candidate": "average",
    "version": "3",
    "champion_before": "3",
    "champion_after": "3",
}


def pretend_all_ran(root: Path) -> Workspace:
    """Every stage has an output with its name in it, and a record."""
    workspace = Workspace(root / "params.yaml")
    for stage in workspace.stages:
        pretend_ran(workspace, stage)
    return Workspace(root / "params.yaml")


def pretend_ran(workspace: Workspace, stage: Stage, text: str = "") -> None:
    record = workspace.record(stage)
    if stage.name == "compare":
        board: dict[str, Any] = {"pipeline": "small", "modality": "clip", "measure": "accuracy"}
        write_json(
            workspace.path(LEADERBOARD), board | {"tasks": ["digits"], "candidate": "average", "rows": [ROW]}
        )
    else:
        for out in stage.outs:
            write_bytes(workspace.path(out), f"{stage.name}{text}".encode())
    remember(workspace, stage, record | {"outs": workspace.outputs(stage)})


def pretend_published(workspace: Workspace) -> None:
    """What publishing leaves here."""
    write_json(workspace.state / "verdict.json", VERDICT)
    for path in (workspace.path(str(REPORT)), workspace.state / "mlflow.db"):
        write_bytes(path, b"")
    note_published(workspace, published_digest(workspace))


def pretend_locked(workspace: Workspace) -> None:
    """dvc.lock says what the records say."""
    stages = {}
    for stage in workspace.stages:
        known = {**workspace.record(stage), "outs": workspace.outputs(stage)}
        entry: dict[str, Any] = {"cmd": "", "params": {"params.yaml": known["params"]}}
        for part in ("deps", "outs"):
            entry[part] = [{"path": path, "md5": md5} for path, md5 in known[part].items()]
        stages[stage.name] = entry
    write_bytes(workspace.root / "dvc.lock", json.dumps({"schema": "2.0", "stages": stages}).encode())
