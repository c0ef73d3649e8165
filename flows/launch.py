"""`mergeline run`: the pipeline with an embedded or a team's Prefect server, and its results on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flows.console import print_leaderboard, print_next_steps, watched
from flows.server import prefect_server

if TYPE_CHECKING:
    from tasks.workspace import Workspace


def run_pipeline(workspace: Workspace) -> None:
    """Run the pipeline of a workspace and print its leaderboard.

    Raises:
        UserError: bad input, or another run in this workspace.
    """
    with workspace.lock():
        pass  # say so at once, before a server is started
    with prefect_server(workspace.state), watched(workspace):
        from flows.pipeline import pipeline

        ran = pipeline(str(workspace.params_file))
    print_leaderboard(workspace)
    print_next_steps(workspace, ran)
