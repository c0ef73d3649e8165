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

from tasks.publish import figure, load_verdict
from tasks.tracking import read_leaderboard

if TYPE_CHECKING:
    from tasks.publish import Published
    from tasks.workspace import Workspace


def show(workspace: Workspace, published: Published) -> None:
    """Create the artifacts of a published run."""
    board = read_leaderboard(workspace.root)
    create_table_artifact(
        key="leaderboard", table=[_row(row) for row in board["rows"]], description=board["pipeline"]
    )
    create_markdown_artifact(key="report", markdown=_report(workspace, board))
    png = base64.b64encode(figure(workspace, "heatmap").read_bytes()).decode()
    create_image_artifact(
        key="heatmap", image_url=f"data:image/png;base64,{png}", description="accuracy by task"
    )
    if published.url:
        create_link_artifact(key="mlflow", link=published.url, link_text="the run in MLflow")


def _row(row: dict[str, Any]) -> dict[str, str]:
    return {
        "model": row["name"],
        "test mean": f"{row['mean']:.3f}",
        "95 % interval": f"{row['lower']:.3f} - {row['upper']:.3f}",
        "normalised": "" if row["normalised"] is None else f"{row['normalised']:.3f}",
        "worst task": f"{row['worst_task']:.3f}",
        "settings": json.dumps(row.get("params", {})),
    }


def _report(workspace: Workspace, board: dict[str, Any]) -> str:
    verdict = load_verdict(workspace)
    lines = [f"# {board['pipeline']}", "", f"Candidate: **{board['candidate']}**", ""]
    if verdict:
        lines += [f"Gates: **{'passed' if verdict['passed'] else 'not passed'}**", ""]
        lines += [f"- {'✓' if f['passed'] else '✗'} {f['sentence']}" for f in verdict["findings"]]
    return "\n".join([*lines, "", "The whole report: `build/report.html` in the workspace."])
