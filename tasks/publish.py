"""Publish a finished workspace: MLflow runs, the registry, figures and the HTML report; safe to repeat."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mergeline.merging.engine.places import refuse_file
from mergeline.merging.errors import UserError
from mergeline.tasks import history, tracking
from mergeline.tasks.credentials import without_credentials
from mergeline.tasks.examples import shown_examples
from mergeline.tasks.kept import Say, silent
from mergeline.tasks.leaderboard import read_leaderboard
from mergeline.tasks.places import REPORT
from mergeline.tasks.publication import load_verdict, note_published, published_digest
from mergeline.tasks.register import Serving, register
from mergeline.tasks.serving.contract import Served
from mergeline.tasks.serving.served import served

if TYPE_CHECKING:
    from mergeline.evaluation.pages.examples import TaskExamples
    from mergeline.tasks.workspace import Workspace

FIGURES = Path(".mergeline/figures")


@dataclass(frozen=True)
class Published:
    """The parent run in MLflow, and its page if a server shows it."""

    run_id: str
    url: str | None


def publish(workspace: Workspace, say: Say = silent) -> Published:
    """Publish to MLflow, register the candidate through the gates, and write the report.

    say: is told what is done with the candidate's files.

    Raises:
        UserError: the pipeline has not run yet, or MLflow cannot be reached.
    """
    from mergeline.evaluation.pages.figures import draw_all

    digest = published_digest(workspace)
    results = _results(workspace)
    figures = draw_all(FIGURES, **results)
    run = tracking.publish(workspace.root, workspace.raw, figures)
    register(workspace.root, workspace.raw, run, say, serving_of(workspace))
    history.keep(workspace.root)
    _write_report(workspace, results)
    tracking.attach(workspace.root, run, REPORT)
    note_published(workspace, digest)
    return Published(run.run_id, _page(run))


def serving_of(workspace: Workspace) -> Serving:
    """How the merges of a workspace are served, by their rows of the leaderboard, or why they are not."""

    def serving(row: dict[str, Any]) -> Served | str:
        build = workspace.root / "build"
        try:
            return served(workspace.modality, workspace.params, build, build / "merges" / row["name"], row)
        except UserError as error:  # it is said: data may be gone when a workspace is published again
            return str(error)

    return serving


def _page(run: tracking.PublishedRun) -> str | None:
    """The run's page, if a server shows it; without the user and password of the tracking URI."""
    server = urlsplit(without_credentials(os.environ.get("MLFLOW_TRACKING_URI", "")))
    if server.scheme not in ("http", "https"):
        return None
    path = f"{server.path.rstrip('/')}/#/experiments/{run.experiment_id}/runs/{run.run_id}"
    return f"{server.scheme}://{server.netloc}{path}"


def write_report(workspace: Workspace, force: bool = False) -> Path:
    """Write build/report.html from what the last run left; returns its path.

    Raises:
        UserError: no run has ended; something that is no page of Mergeline's is there, and `force` is not given.
    """
    from mergeline.evaluation.pages.page import is_page

    refuse_file(REPORT, [], is_page, "page", force)
    _write_report(workspace, _results(workspace))
    return REPORT


def _write_report(workspace: Workspace, results: dict[str, Any]) -> None:
    from mergeline.evaluation.pages.report import render

    board = results["leaderboard"]
    section = workspace.modality.report(board)
    verdict = load_verdict(workspace.state)
    changes = history.since_before(workspace.root)
    examples: list[TaskExamples] | str
    try:
        examples = shown_examples(workspace.modality, workspace.params, REPORT.parent, board)
    except UserError as error:  # the page says it: data may be gone when a report is written again
        examples = str(error)
    render(
        REPORT,
        **results,
        costs=workspace.costs(),
        verdict=verdict,
        section=section,
        changes=changes,
        examples=examples,
    )


def _results(workspace: Workspace) -> dict[str, Any]:
    """What pictures and report show of the steps' outputs."""
    return {
        "leaderboard": read_leaderboard(workspace.root),
        "searches": {
            name: _read(Path("build/search") / f"{name}.json") for name in workspace.params.all_merges
        },
        "description": _read(Path("build/extract/description.json")),
    }


def figure(workspace: Workspace, name: str) -> Path:
    """One drawn figure."""
    return workspace.path(str(FIGURES / f"{name}.png"))


def _read(path: Path) -> Any:
    return json.loads(path.read_text())
