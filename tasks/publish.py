"""Publish a finished workspace: MLflow runs, the registry, figures and the HTML report; safe to repeat."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tasks import register as registry
from tasks import tracking

if TYPE_CHECKING:
    from tasks.workspace import Workspace

REPORT = Path("build/report.html")
FIGURES = Path(".mergeline/figures")


@dataclass(frozen=True)
class Published:
    """The parent run in MLflow, and its page if a server shows it."""

    run_id: str
    url: str | None


def publish(workspace: Workspace) -> Published:
    """Publish to MLflow, register the candidate through the gates, and write the report.

    Raises:
        UserError: the pipeline has not run yet, or MLflow cannot be reached.
    """
    from evaluation.figures import draw_all

    results = _results(workspace)
    figures = draw_all(FIGURES, **results)
    run = tracking.publish(workspace.root, workspace.raw, figures)
    registry.register(workspace.root, workspace.raw, run)
    _write_report(workspace, results)
    tracking.attach(workspace.root, run, REPORT)
    return Published(run.run_id, _page(run))


def _page(run: tracking.PublishedRun) -> str | None:
    """The run's page, if a server shows it; without the user and password of the tracking URI."""
    server = urlsplit(os.environ.get("MLFLOW_TRACKING_URI", ""))
    if server.scheme not in ("http", "https"):
        return None
    host = server.netloc.rpartition("@")[2]
    path = f"{server.path.rstrip('/')}/#/experiments/{run.experiment_id}/runs/{run.run_id}"
    return f"{server.scheme}://{host}{path}"


def write_report(workspace: Workspace) -> Path:
    """Write build/report.html from what the last run left; returns its path."""
    _write_report(workspace, _results(workspace))
    return REPORT


def _write_report(workspace: Workspace, results: dict[str, Any]) -> None:
    from evaluation.report import render

    render(REPORT, **results, costs=workspace.costs(), verdict=load_verdict(workspace))


def _results(workspace: Workspace) -> dict[str, Any]:
    """What pictures and report show of the steps' outputs."""
    return {
        "leaderboard": tracking.read_leaderboard(workspace.root),
        "searches": {name: _read(Path("build/search") / f"{name}.json") for name in workspace.params.merges},
        "description": _read(Path("build/extract/description.json")),
    }


def figure(workspace: Workspace, name: str) -> Path:
    """One drawn figure."""
    return workspace.path(str(FIGURES / f"{name}.png"))


def load_verdict(workspace: Workspace) -> dict[str, Any] | None:
    path = workspace.state / "verdict.json"
    return _read(path) if path.exists() else None


def _read(path: Path) -> Any:
    return json.loads(path.read_text())
