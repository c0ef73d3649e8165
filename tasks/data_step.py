"""The step `data`, which prepares the dataset of each task in build/data, and what follows from where that lies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

from mergeline.tasks.step import Stage, StageTemplate, Step

if TYPE_CHECKING:
    from mergeline.tasks.digests import Digests
    from mergeline.tasks.schema import Params, Sources


def dataset(build: Path, task: str) -> Path:
    """The prepared dataset of a task."""
    return build / "data" / task


def data_step(section: str, run: Callable[[Params, Stage], None], code: tuple[str, ...], *how: str) -> Step:
    """The step of a modality.

    section: where params.yaml has the `files` and `uris` of its tasks. run: prepares one. code: what prepares them, in
    the notation of dvc.yaml. how: parameters that decide what is prepared of a source; `${key}` is the task.
    """

    def template(name: str, kind: str, deps: tuple[str, ...]) -> StageTemplate:
        return StageTemplate(
            name,
            deps=deps,
            params=(f"{section}.{kind}.${{key}}", *how),
            outs=("build/data/${key}",),
            foreach=f"{section}.{kind}",
        )

    templates = (template("data-file", "files", ("${item}", *code)), template("data-uri", "uris", code))
    return Step("data", "decode datasets into build/data", run, templates, downloads=True)


def dataset_paths(section: str, sources: Sources) -> dict[tuple[str, ...], str]:
    """Where the files of datasets are named in params.yaml, as keys -> path."""
    return {(*section.split("."), "files", task): where for task, where in sources.files.items()}


def dataset_lineage(workspace: Path, board: dict[str, Any], digests: Digests) -> dict[str, str]:
    """Tags `lineage.data.TASK`: the digest of each prepared dataset (raises UserError where one is missing)."""
    from mergeline.tasks.leaderboard import present

    folders = {task: present(dataset(workspace / "build", task)) for task in board["tasks"]}
    return {f"lineage.data.{task}": str(digests.of(folder)) for task, folder in folders.items()}
