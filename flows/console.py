"""What a person sees on the terminal while the pipeline runs and when it is done."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Iterator

from tasks.publish import REPORT, load_verdict
from tasks.tracking import read_leaderboard

if TYPE_CHECKING:
    from tasks.workspace import Workspace


_PIPED_WIDTH = 110


@contextmanager
def watched(workspace: Workspace) -> Iterator[None]:
    """A line for each stage as it finishes."""
    done = Event()
    watcher = Thread(target=_watch, args=(workspace, done), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _watch(workspace: Workspace, done: Event) -> None:
    folder = workspace.state / "costs"
    seen = {f.name: f.stat().st_mtime_ns for f in folder.glob("*.json")}
    while not done.wait(0.5):
        for file in sorted(folder.glob("*.json"), key=lambda f: f.stat().st_mtime_ns):
            if seen.get(file.name) != file.stat().st_mtime_ns:
                seen[file.name] = file.stat().st_mtime_ns
                cost = json.loads(file.read_text())
                print(
                    f"  {time.strftime('%H:%M:%S')}  {cost['stage']:28} {cost['seconds']:6.1f} s", flush=True
                )


def print_leaderboard(workspace: Workspace) -> None:
    """The leaderboard as a table, best first."""
    from rich.console import Console
    from rich.table import Table

    board = read_leaderboard(workspace.root)
    table = Table(title=f"{board['pipeline']}: test accuracy, mean of {len(board['tasks'])} tasks")
    table.add_column("model", no_wrap=True)
    for name in ("mean", "95 % interval", "normalised", "worst task"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("settings, chosen on validation")
    for row in sorted(board["rows"], key=lambda r: -r["mean"]):
        table.add_row(*_cells(row), style="bold" if row["name"] == board["candidate"] else "")
    console = Console()
    console.print(table) if console.is_terminal else Console(width=_PIPED_WIDTH).print(table)
    verdict = load_verdict(workspace)
    if verdict:
        state = "passed the gates" if verdict["passed"] else "did not pass the gates"
        print(f"{verdict['candidate']} {state}; champion: version {verdict['champion_after'] or 'none yet'}")
        for finding in verdict["findings"]:
            print(f"  {'yes' if finding['passed'] else 'NO '} {finding['sentence']}")


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["name"],
        f"{row['mean']:.3f}",
        f"{row['lower']:.3f} - {row['upper']:.3f}",
        "" if row["normalised"] is None else f"{row['normalised']:.3f}",
        f"{row['worst_task']:.3f}",
        ", ".join(f"{key} {value}" for key, value in row.get("params", {}).items()),
    ]


def print_next_steps(workspace: Workspace, ran: list[str]) -> None:
    """Where to look and what to try, in a few lines."""
    print(f"{len(ran)} of {len(workspace.stages)} stages ran; report: {REPORT}")
    folder = os.path.relpath(Path(sys.executable).parent)
    tools = "" if folder.startswith("..") else f"{folder}/"
    state = workspace.state
    print(
        f"Prefect's pages  PREFECT_HOME={state}/prefect {tools}prefect server start, then http://127.0.0.1:4200"
    )
    print(
        f"MLflow's pages   {tools}mlflow ui --backend-store-uri sqlite:///{state}/mlflow.db, then http://127.0.0.1:5000"
    )
    print(
        f"Try next         edit merges: in params.yaml, then {tools}mergeline run: only that branch runs again"
    )
