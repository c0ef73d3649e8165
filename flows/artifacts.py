"""What a run leaves on Prefect's pages: the leaderboard, the verdict, the heat map, and where MLflow shows it."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from mergeline.evaluation.measures import measures_of
from mergeline.tasks.leaderboard import read_leaderboard
from mergeline.tasks.publication import load_verdict
from mergeline.tasks.publish import figure

if TYPE_CHECKING:
    from mergeline.tasks.publish import Published
    from mergeline.tasks.workspace import Workspace


def show(workspace: Workspace, published: Published) -> None:
    """Create the artifacts of a published run."""
    board = read_leaderboard(workspace.root)
    measure = measures_of(board).mean
    create_table_artifact(
        key="leaderboard",
        table=[_row(row) for row in board["rows"]],
        description=board["pipeline"] + (f": {measure.title}" if measure.lower else ""),
    )
    create_markdown_artifact(key="report", markdown=_report(workspace, board))
    png = base64.b64encode(figure(workspace, "heatmap").read_bytes()).decode()
    create_image_artifact(
        key="heatmap", image_url=f"data:image/png;base64,{png}", description=f"{measure.title} by task"
    )
    if published.url:
        create_link_artifact(key="mlflow", link=published.url, link_text="the run in MLflow")


def _row(row: dict[str, Any]) -> dict[str, str]:
    return {
        "model": row["name"],
        "test mean": f"{row['mean']:.3f}",
        "95 % interval": f"{row['lower']:.3f} - {row['upper']:.3f}",
        "normalised": "" if row["normalised"] is None else f"{row['normalised']:.3f}",
        "worst task": "" if row["worst_task"] is None else f"{row['worst_task']:.3f}",
        "settings": json.dumps(row.get("params", {})),
    }


def _report(workspace: Workspace, board: dict[str, Any]) -> str:
    verdict = load_verdict(workspace.state)
    lines = [f"# {board['pipeline']}", "", f"Candidate: **{board['candidate']}**", ""]
    if verdict:
        lines += [f"Gates: **{'passed' if verdict['passed'] else 'not passed'}**", ""]
        lines += [f"- {'✓' if f['passed'] else '✗'} {f['sentence']}" for f in verdict["findings"]]
    return "\n".join([*lines, "", "The whole report: `build/report.html` in the workspace."])
