"""A pipeline on an executor: what is heavy in its stages goes to workers, who see the same workspace.

A stage that is on the device goes there as a whole; of a search, batches of points; of a merge, tensors.
"""

from __future__ import annotations

import os
import platform
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Iterator, NamedTuple

from mergeline.merging.engine.elsewhere import refuse_other_versions
from mergeline.merging.engine.manifest import versions
from mergeline.merging.errors import UserError
from mergeline.merging.methods.contract import load_methods
from mergeline.tasks import progress
from mergeline.tasks.evaluations import afresh, is_afresh
from mergeline.tasks.executors import opened

if TYPE_CHECKING:
    from mergeline.tasks.schema import Params
    from mergeline.tasks.step import Stage

_open: list[Executor] = []  # of this process, which runs one pipeline at a time


@contextmanager
def over(name: str | None) -> Iterator[None]:
    """In this block the stages that this process runs send what is heavy to the executor of this name, if there is one.

    Raises:
        UserError: as `opened`.
    """
    with opened(name) as executor:
        _open.extend([executor] if executor else [])
        try:
            yield
        finally:
            _open.clear()


def executor() -> Executor | None:
    """The executor that the stages of this process are spread over."""
    return _open[-1] if _open else None


class Scene(NamedTuple):
    """What a worker is told of a pipeline; plain data."""

    root: str
    params: Params
    versions: dict[str, str]
    afresh: bool


def scene_of(params: Params) -> Scene:
    """Of the pipeline in the current folder."""
    return Scene(str(Path.cwd()), params, versions(), is_afresh())


@contextmanager
def at(scene: Scene) -> Iterator[None]:
    """On a worker: in the workspace, as the coordinator is (raises UserError if it is not there, or other code is)."""
    refuse_other_versions(scene.versions)
    try:
        os.chdir(scene.root)
    except OSError as error:
        raise UserError(
            f"the worker on {platform.node()} does not see {scene.root} ({error.strerror}); workers need the same "
            "files under the same paths"
        ) from None
    for file in scene.params.methods:
        load_methods(Path(file))
    with afresh(scene.afresh):
        yield


def run_there(executor: Executor, params: Params, stage: Stage) -> str:
    """Run a whole stage on a worker; returns what it says of itself."""
    return executor.submit(_run_whole, scene_of(params), stage).result()


def _run_whole(scene: Scene, stage: Stage) -> str:
    from mergeline.tasks.modalities import modality_of
    from mergeline.tasks.steps import steps

    with at(scene), TemporaryDirectory() as folder, progress.told(Path(folder), "stage") as told:
        step = next(step for step in steps(modality_of(scene.params)) if step.name == stage.step)
        step.run(scene.params, stage)
    return told.said
