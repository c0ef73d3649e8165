"""`mergeline run`: the pipeline with an embedded or a team's Prefect server; and what it would do, without one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Sequence

from mergeline.flows import console
from mergeline.flows.cli.text import note
from mergeline.flows.ending import in_thread, terminable
from mergeline.flows.server import prefect_server
from mergeline.merging.engine.machine import check_device
from mergeline.tasks import status
from mergeline.tasks.publication import is_published
from mergeline.tasks.versioning import is_committed

if TYPE_CHECKING:
    from mergeline.tasks.status import State
    from mergeline.tasks.step import Stage
    from mergeline.tasks.workspace import Workspace


class Work(NamedTuple):
    """What a run does: with each of its stages, in their order; and then, in words."""

    states: list[State]
    then: list[str]

    @property
    def busy(self) -> list[State]:
        """The stages with which something is done, or may be."""
        return [state for state in self.states if state.action != "none"]

    def __bool__(self) -> bool:
        return bool(self.busy or self.then)


def look(workspace: Workspace, only: Sequence[str] = (), force: Sequence[str] = ()) -> Work:
    """What a run would do, by comparing digests with what is recorded: nothing heavy is imported, no server asked.

    Raises:
        UserError: no such stage, or files that are missing, all of them named.
    """
    chosen, forced = status.chosen_stages(workspace, only, force)
    status.refuse_missing(workspace, chosen)
    note(f"checking {len(chosen)} stages ...")  # files that are new, and large, take long to digest
    states = status.states(workspace, chosen, forced)
    busy = any(state.action != "none" for state in states)
    then = []
    if workspace.has_dvc and (busy or not _is_committed(workspace, chosen)):
        then.append("write dvc.lock")
    if not only and (busy or not is_published(workspace)):
        then.append("publish the results")
    return Work(states, then)


def _is_committed(workspace: Workspace, chosen: Sequence[Stage]) -> bool:
    return is_committed(
        workspace, {s.name: {**workspace.record(s), "outs": workspace.outputs(s)} for s in chosen}
    )


def run_pipeline(
    workspace: Workspace, only: Sequence[str] = (), force: Sequence[str] = ()
) -> list[str] | None:
    """Run what of the pipeline of a workspace is not up to date; returns the stages that ran.

    Servers are started, and what is heavy is imported, only if there is something to do; else it is None.

    Raises:
        UserError: bad input, or another run in this workspace.
        KeyboardInterrupt: a signal came.
    """
    with workspace.lock():
        workspace.tidy()
        work = look(workspace, only, force)
    if not work:
        return None
    if any(workspace.steps[state.stage.step].on_device for state in work.busy):
        check_device(workspace.params.device)
    note(f"{_in_short(work)}; starting Prefect ...")
    with (
        terminable(),
        prefect_server(workspace.state, keep=workspace.params.retention.age),
        console.watched(workspace),
    ):
        from mergeline.flows.pipeline import pipeline, report_stop

        try:
            return in_thread(
                lambda: pipeline(
                    str(workspace.params_file), only=list(only) or None, force=list(force) or None
                )
            ).result()
        except KeyboardInterrupt:
            report_stop()
            raise


def _in_short(work: Work) -> str:
    if not work.busy:
        return f"0 of {len(work.states)} stages to run, then {' and '.join(work.then)}"
    following = sum(state.action == "follow" for state in work.busy)
    sure = len(work.busy) - following
    return f"{sure} of {len(work.states)} stages to run" + (f", {following} may follow" if following else "")


def as_json(work: Work) -> dict[str, Any]:
    """What `mergeline run --dry-run --json` prints."""
    stages = [{"stage": s.stage.name, "action": s.action, "why": s.why} for s in work.states]
    return {"stages": stages, "then": work.then}


def summary(workspace: Workspace, ran: Sequence[str] | None, whole: bool) -> dict[str, Any]:
    """What `mergeline run --json` prints: the stages that ran, and after a whole run leaderboard and verdict."""
    from mergeline.tasks.leaderboard import read_leaderboard
    from mergeline.tasks.places import REPORT
    from mergeline.tasks.publication import load_verdict

    made: dict[str, Any] = {"pipeline": workspace.params.name, "stages": len(workspace.stages)}
    made["ran"] = list(ran or ())
    if whole:
        made |= {
            "leaderboard": read_leaderboard(workspace.root),
            "verdict": load_verdict(workspace.state),
            "report": str(workspace.path(str(REPORT))),
        }
    return made
