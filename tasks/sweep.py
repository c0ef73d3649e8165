"""A sweep of a params.yaml: its stages side by side in processes, without Prefect or MLflow, and a table of merges."""

from __future__ import annotations

import json
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator

from merging.files import write_bytes, write_json
from merging.methods import catalogue, get_method
from merging.recipe import canonical_json
from tasks.tracking import candidate_row, read_leaderboard
from tasks.workspace import Workspace

if TYPE_CHECKING:
    from tasks.graph import Stage
    from tasks.params import Params


def run_stages(workspace: Workspace, workers: int | None = None) -> list[str]:
    """Run every stage that is stale, as many at a time as there are workers (None: cores); returns those that ran.

    A stage is stale unless the digests of what it reads, its parameters and its outputs are those of its last run here,
    so that a sweep which was killed goes on where it was. The current folder must be the workspace.

    Raises:
        UserError: bad input, in any stage; the others that run are awaited.
    """
    left = {stage.name: stage for stage in workspace.stages}
    needed = {name: {other.name for other in workspace.needs(stage)} for name, stage in left.items()}
    ran: list[str] = []
    # Spawned: a process that was forked beside running threads may hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running: dict[Future[None], tuple[Stage, dict[str, Any]]] = {}
        try:
            while left or running:
                waiting = {*left, *(stage.name for stage, _ in running.values())}
                for name in [name for name in left if not needed[name] & waiting]:
                    stage = left.pop(name)
                    record = workspace.record(stage)
                    if _last_run(workspace, stage) != record | {"outs": workspace.outputs(stage)}:
                        running[pool.submit(_run, workspace.params_file, name)] = stage, record
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    stage, record = running.pop(future)
                    future.result()
                    write_json(_record_file(workspace, stage), record | {"outs": workspace.outputs(stage)})
                    ran.append(stage.name)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return ran


def _run(params_file: Path, name: str) -> None:
    """In a process of the pool: run one stage."""
    workspace = Workspace(params_file)
    workspace.run(next(stage for stage in workspace.stages if stage.name == name))


def _last_run(workspace: Workspace, stage: Stage) -> dict[str, Any] | None:
    try:
        return json.loads(_record_file(workspace, stage).read_text())
    except (FileNotFoundError, ValueError):
        return None


def _record_file(workspace: Workspace, stage: Stage) -> Path:
    return workspace.state / "records" / f"{stage.name}.json"


# ---------------------------------------------------------------------------------------------- the table


def write_table(workspace: Workspace, out: Path) -> None:
    """The leaderboard of a workspace as Markdown: every merge, best first, and which methods cannot run there."""
    board = read_leaderboard(workspace.root)
    write_bytes(out, "\n".join([*_table(board), "", *_left_out(workspace.params), ""]).encode())


def _table(board: dict[str, Any]) -> Iterator[str]:
    merges = [row for row in board["rows"] if row["kind"] == "merge"]
    best, points = candidate_row(board)["name"], sum(max(1, row["searched"]) for row in merges)
    yield f"# {board['pipeline']}"
    yield ""
    yield f"Test accuracy, mean of {len(board['tasks'])} tasks, with 95 % intervals over test examples; normalised by"
    yield f"each task's own expert. {len(merges)} merges; each one's setting is the best of its grid on validation,"
    yield f"which alone chose among {points} points. Best on validation: {best}."
    yield ""
    yield "| merge | method | test mean | 95 % interval | normalised | worst task | validation | settings | points |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in sorted(board["rows"], key=lambda row: -row["mean"]):
        name = f"**{row['name']}**" if row["name"] == best else row["name"]
        cells = [
            name,
            row.get("method", ""),
            f"{row['mean']:.3f}",
            f"{row['lower']:.3f} to {row['upper']:.3f}",
            "" if row["normalised"] is None else f"{row['normalised']:.3f}",
            f"{row['worst_task']:.3f}",
            f"{row['val_mean']:.3f}",
            ", ".join(f"{key} {_plain(value)}" for key, value in row.get("params", {}).items()),
            str(max(1, row["searched"])) if "searched" in row else "",
        ]
        yield f"| {' | '.join(cells)} |"


def _left_out(params: Params) -> Iterator[str]:
    """Methods that no merge uses, and why they could not, for so many experts and a base."""
    used = set()
    for merge in params.merges.values():
        method = get_method(merge.method)
        for bound in method.bind(method.resolve(next(merge.points))).chain:
            used |= {part.method.id for part in (bound.origin, bound) if part}
    yield "| not here | why |"
    yield "|---|---|"
    for entry in catalogue().values():
        if entry.id in used:
            continue
        misuses = list(entry.misuses(entry.resolve({}), len(params.experts), True))
        if entry.store:
            misuses.append(f"{entry.id} keeps every expert, and gives back one of them")
        yield f"| {entry.id} | {'; '.join(misuses) or 'not among the merges of the parameter file'} |"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else canonical_json(value)
