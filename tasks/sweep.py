"""A sweep of a params.yaml: its stages side by side in processes, without Prefect or MLflow, and a table of merges."""

from __future__ import annotations

from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator

from mergeline.evaluation.measures import measures_of
from mergeline.evaluation.pages.figures import at_use, ranked
from mergeline.merging.canonical import canonical_json
from mergeline.merging.engine.places import refuse_file
from mergeline.merging.files import write_bytes
from mergeline.merging.methods import catalogue, get_method
from mergeline.merging.methods.bound import bind
from mergeline.tasks import spread
from mergeline.tasks.leaderboard import candidate_row, read_leaderboard
from mergeline.tasks.records import remember
from mergeline.tasks.seen import NOTHING
from mergeline.tasks.status import refuse_missing, vouched
from mergeline.tasks.workspace import Workspace

if TYPE_CHECKING:
    from mergeline.tasks.schema import Params
    from mergeline.tasks.step import Stage

_HEADINGS = "| merge | method | test mean | 95 % interval | normalised | worst task | validation | settings | points |"


def run_stages(workspace: Workspace, workers: int | None = None, executor: str | None = None) -> list[str]:
    """Run every stage that is stale, as many at a time as there are workers (None: cores); returns those that ran.

    A stage is stale unless the digests of what it reads, its parameters and its outputs are those of its last run here,
    so that a sweep which was killed goes on where it was. The current folder must be the workspace. With the name of an
    `executor`, what is heavy in a stage runs there, and stages wait for it in threads.

    Raises:
        UserError: bad input, in any stage; the others that run are awaited.
    """
    refuse_missing(workspace, workspace.stages)
    left = {stage.name: stage for stage in workspace.stages}
    needed = {name: {other.name for other in workspace.needs(stage)} for name, stage in left.items()}
    ran: list[str] = []
    with spread.over(executor), _pool(workers, executor) as pool:
        running: dict[Future[None], tuple[Stage, dict[str, Any]]] = {}
        try:
            while left or running:
                waiting = {*left, *(stage.name for stage, _ in running.values())}
                for name in [name for name in left if not needed[name] & waiting]:
                    stage = left.pop(name)
                    record = workspace.record(stage)
                    if not vouched(workspace, stage, record):
                        running[pool.submit(_run, workspace.params_file, name)] = stage, record
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    stage, record = running.pop(future)
                    future.result()
                    remember(workspace, stage, record | {"outs": workspace.outputs(stage)})
                    ran.append(stage.name)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return ran


def _pool(workers: int | None, executor: str | None) -> Executor:
    if executor:
        return ThreadPoolExecutor(workers)
    # Spawned: a process that was forked beside running threads may hang.
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


def _run(params_file: Path, name: str) -> None:
    """In a process, or thread, of the pool: run one stage."""
    workspace = Workspace(params_file)
    workspace.run(next(stage for stage in workspace.stages if stage.name == name))


# ---------------------------------------------------------------------------------------------- the table


def refuse_table(workspace: Workspace, out: Path, force: bool) -> None:
    """Raises UserError unless the table may be written to `out`: never in the place of what the pipeline has."""
    names = {name for stage in workspace.stages for name in (*stage.deps, *stage.outs)}
    files = [workspace.params_file, *map(workspace.path, ("dvc.yaml", "dvc.lock", *sorted(names)))]
    refuse_file(out, [file for file in files if file.exists()], _is_table, "table", force)


def _is_table(path: Path) -> bool:
    return _HEADINGS.encode() in path.read_bytes()


def write_table(workspace: Workspace, out: Path) -> None:
    """The leaderboard of a workspace as Markdown: every merge, best first, and which methods cannot run there.

    A file of a few merges, which leaves more methods out than it has, does not mean to have all: they are not listed.
    """
    head, *left_out = _left_out(workspace.params)
    rows = [*_table(read_leaderboard(workspace.root)), ""]
    if len(left_out) <= 1 + len(workspace.params.all_merges):  # below its head a table has a line
        rows += [head, *left_out, ""]
    write_bytes(out, "\n".join(rows).encode())


def _table(board: dict[str, Any]) -> Iterator[str]:
    """Where any merge was fitted, a column says to what; what is told the task, or finds it, has its own rows."""
    merges = [row for row in board["rows"] if row["kind"] == "merge"]
    best, points = candidate_row(board)["name"], sum(max(1, row["searched"]) for row in merges)
    told = any(_seen(row) for row in merges)
    yield f"# {board['pipeline']}"
    yield ""
    tasks = f"{len(board['tasks'])} tasks"
    measures = measures_of(board)
    search = "search" if any("search" in row for row in merges) else "grid"
    of = f" of {measures.mean_of}" if measures.different else ""
    yield f"Test {measures.mean.title}{of}, mean of {tasks}, with 95 % intervals over test examples; normalised by"
    yield f"each task's own expert. {len(merges)} merges; each one's setting is the best of its {search} on validation,"
    yield f"which alone chose among {points} points. Best on validation: {best}."
    rows = ranked(board)
    yield from _rows([row for row in rows if not at_use(row)], best, told)
    apart = [row for row in rows if at_use(row)]
    if apart:
        yield ""
        yield "Where the task of an example is known to the model when it is used, or is found by a router:"
        yield from _rows(apart, best, told)


def _rows(rows: list[dict[str, Any]], best: str, told: bool) -> Iterator[str]:
    yield ""
    yield _HEADINGS + (" seen |" if told else "")
    yield "|---|---|---|---|---|---|---|---|---|" + ("---|" if told else "")
    for row in rows:
        name = f"**{row['name']}**" if row["name"] == best else row["name"]
        cells = [
            name,
            row.get("method", ""),
            f"{row['mean']:.3f}",
            f"{row['lower']:.3f} to {row['upper']:.3f}",
            "" if row["normalised"] is None else f"{row['normalised']:.3f}",
            "" if row["worst_task"] is None else f"{row['worst_task']:.3f}",
            f"{row['val_mean']:.3f}",
            ", ".join(f"{key} {_plain(value)}" for key, value in row.get("params", {}).items())
            + (f" (task {at_use(row)} at use)" if at_use(row) else ""),
            str(max(1, row["searched"])) if "searched" in row else "",
            *([_seen(row) or ("none" if "searched" in row else "")] if told else []),
        ]
        yield f"| {' | '.join(cells)} |"


def _seen(row: dict[str, Any]) -> str:
    """What a merge was fitted to, in words; "" of one that was not fitted."""
    words = row.get("seen", NOTHING)["words"]
    return "" if words == NOTHING["words"] else words


def _left_out(params: Params) -> Iterator[str]:
    """Methods that no merge uses, and why they could not, for so many experts and a base."""
    used = set()
    for name, merge in params.all_merges.items():
        if merge.is_learned:
            continue
        settings = params.settings_of(name) if merge.within else [next(params.settings_of(name))]
        for id, point in settings:
            method = get_method(id)
            used |= {part.method.id for part in bind(method, method.resolve(point)).parts}
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
