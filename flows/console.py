"""What a person sees on the terminal while the pipeline runs and when it is done.

Results go to stdout; how far things are, and notes, to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Collection, Iterator, Sequence

from mergeline.evaluation.measures import measures_of
from mergeline.evaluation.pages.figures import at_use, ranked
from mergeline.evaluation.verdicts import told
from mergeline.flows.cli.text import note, time_left
from mergeline.tasks.leaderboard import read_leaderboard
from mergeline.tasks.places import REPORT
from mergeline.tasks.progress import Running, running
from mergeline.tasks.publication import load_verdict
from mergeline.tasks.records import last_pipeline_run

if TYPE_CHECKING:
    from rich.progress import Progress

    from mergeline.tasks.status import State
    from mergeline.tasks.workspace import Workspace


_PIPED_WIDTH = 110
_SECONDS = 0.5  # between two looks
_ACTIONS = {
    "none": "up to date",
    "run": "runs",
    "restore": "comes from DVC's cache, or runs",
    "follow": "may follow",
}


@contextmanager
def watched(workspace: Workspace) -> Iterator[None]:
    """A line for each stage as it finishes; on a terminal also how far those are that run, with rate and time left."""
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
    with _bars() if sys.stderr.isatty() else nullcontext() as bars:
        ended = False
        while not ended:
            ended = done.wait(_SECONDS)  # and one last look
            for file in sorted(folder.glob("*.json"), key=lambda f: f.stat().st_mtime_ns):
                if seen.get(file.name) != file.stat().st_mtime_ns:
                    seen[file.name] = file.stat().st_mtime_ns
                    cost = json.loads(file.read_text())
                    line = f"  {time.strftime('%H:%M:%S')}  {cost['stage']:28} {cost['seconds']:6.1f} s"
                    line += f"  {cost['said']}" if "said" in cost else ""
                    bars.console.print(line, highlight=False) if bars else note(line)
            if bars:
                _show(bars, running(workspace.progress))


def _bars() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = TextColumn("  {task.description:28}"), BarColumn(20), TextColumn("{task.fields[words]}")
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _show(bars: Progress, stages: Collection[Running]) -> None:
    """A bar for each stage that runs."""
    known = {task.description: task.id for task in bars.tasks}
    for stage in stages:
        task = known.pop(stage.stage, None)
        if task is None:
            task = bars.add_task(stage.stage, total=None, words="")
        bars.update(task, completed=stage.done, total=stage.total or None, words=words(stage))
    for task in known.values():
        bars.remove_task(task)


def words(stage: Running) -> str:
    """How far a stage is, at what rate, and how long it may still take."""
    if not stage.total:
        return f"{time.time() - stage.since:.0f} s"
    seconds = time.time() - stage.counting_since
    return f"{stage.done}/{stage.total} {stage.unit}{time_left(stage.done, stage.total, seconds)}"


def print_leaderboard(workspace: Workspace) -> None:
    """The leaderboard as a table, best first."""
    from rich.console import Console
    from rich.table import Table

    board = read_leaderboard(workspace.root)
    measures = measures_of(board)
    title = f"{board['pipeline']}: test {measures.mean.title}, mean of {len(board['tasks'])} tasks"
    table = Table(title=f"{title}: {measures.mean_of}" if measures.different else title)
    table.add_column("model", no_wrap=True)
    for name in ("mean", "95 % interval", "normalised", "worst task"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("settings, chosen on validation")
    for row in ranked(board):
        table.add_row(*_cells(row), style="bold" if row["name"] == board["candidate"] else "")
    console = Console()
    console.print(table) if console.is_terminal else Console(width=_PIPED_WIDTH).print(table)
    verdict = load_verdict(workspace.state)
    if verdict:
        print(told(verdict, board["candidate"]))
        for finding in verdict["findings"]:
            print(f"  {'yes' if finding['passed'] else 'NO '} {finding['sentence']}")


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["name"] + (f" (task {at_use(row)} at use)" if at_use(row) else ""),
        f"{row['mean']:.3f}",
        f"{row['lower']:.3f} - {row['upper']:.3f}",
        "" if row["normalised"] is None else f"{row['normalised']:.3f}",
        "" if row["worst_task"] is None else f"{row['worst_task']:.3f}",
        ", ".join(f"{key} {value}" for key, value in row.get("params", {}).items()),
    ]


def print_outcome(workspace: Workspace, ran: Sequence[str] | None, whole: bool) -> None:
    """Which stages ran (None: there was nothing to do); after a whole run the leaderboard, and what came of it."""
    count = f"{len(ran or ())} of {len(workspace.stages)} stages ran"
    said = count if ran is not None else f"{count}: all that was asked for is up to date"
    if not whole:
        print(said)
        return
    print_leaderboard(workspace)
    print(f"{said}; report: {REPORT}")
    if ran is not None:
        _print_next_steps(workspace)


def _print_next_steps(workspace: Workspace) -> None:
    folder = os.path.relpath(Path(sys.executable).parent)
    tools = "" if folder.startswith("..") else f"{folder}/"
    state = workspace.state
    print(f"Prefect's pages  {tools}mergeline pages")
    print(
        f"MLflow's pages   {tools}mlflow ui --backend-store-uri sqlite:///{state}/mlflow.db, then http://127.0.0.1:5000"
    )
    print(
        f"Try next         edit merges: in params.yaml, then {tools}mergeline run: only that branch runs again"
    )


def print_plan(states: Sequence[State], then: Sequence[str]) -> None:
    """What a run would do, stage by stage, and `then`."""
    busy = [state for state in states if state.action != "none"]
    width = max((len(state.stage.name) for state in busy), default=0)
    for state in busy:
        print(f"{state.stage.name:{width}}  {_ACTIONS[state.action]}: {'; '.join(state.why)}")
    for line in then:
        print(f"then {line}")
    print(
        f"{len(busy)} of {len(states)} stages would run"
        if busy
        else f"all {len(states)} stages are up to date"
    )


def status(workspace: Workspace, found: dict[str, Any]) -> dict[str, Any]:
    """What `mergeline run --status --json` prints: `found`, and what `print_status` tells besides."""
    return {
        **found,
        "running": {stage.stage: words(stage) for stage in running(workspace.progress)},
        "seconds": {cost["stage"]: cost["seconds"] for cost in workspace.costs()},
        "verdict": load_verdict(workspace.state),
        "last_run": last_pipeline_run(workspace),
    }


def print_status(workspace: Workspace, states: Sequence[State], then: Sequence[str]) -> None:
    """Every stage with what a run would do and what its last run took; what runs now; champion and last run."""
    now = {stage.stage: words(stage) for stage in running(workspace.progress)}
    costs = {cost["stage"]: cost["seconds"] for cost in workspace.costs()}
    width = max(len(state.stage.name) for state in states)
    for state in states:
        name = state.stage.name
        took = f"{costs[name]:.1f} s" if name in costs else ""
        what = f"is running: {now[name]}" if name in now else "; ".join([_ACTIONS[state.action], *state.why])
        print(f"{name:{width}}  {took:>9}  {what}")
    if then:
        print(f"next run  {', '.join(then)}")
    print(f"champion  {_champion(workspace)}")
    run = last_pipeline_run(workspace)
    if run:
        took = f", {run['seconds']} s, {len(run['ran'])} stages ran" if "seconds" in run else ""
        print(f"last run  {run['started'].replace('T', ' ')}{took}: {run['outcome']}")
    else:
        print("last run  none here")


def _champion(workspace: Workspace) -> str:
    """As the last publication here left it: another workspace may have published since."""
    verdict = load_verdict(workspace.state)
    if not verdict or not verdict["champion_after"]:
        return "none, when results were last published here"
    return f"version {verdict['champion_after']}, when results were last published here"
