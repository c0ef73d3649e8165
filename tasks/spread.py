"""A pipeline on an executor: what is heavy in its stages goes to workers, who see the same workspace.

A stage that is on the device goes there as a whole; of a search, batches of points; of a merge, tensors.
"""

from __future__ import annotations

import os
import platform
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Iterator, NamedTuple

from mergeline.merging.engine.elsewhere import refuse_other_versions
from mergeline.merging.engine.manifest import versions
from mergeline.merging.errors import UserError
from mergeline.merging.methods.contract import load_methods
from mergeline.tasks.evaluations import afresh, is_afresh
from mergeline.tasks.executors import opened

if TYPE_CHECKING:
    from mergeline.tasks.schema import Params


class _Wanted:
    """An executor that is opened when it is first asked for: where nothing is stale, no cluster is needed."""

    def __init__(self, name: str, stack: ExitStack):
        self._name, self._stack, self._lock = name, stack, Lock()
        self._opened: Executor | None = None

    def executor(self) -> Executor | None:
        with self._lock:
            if self._opened is None:
                self._opened = self._stack.enter_context(opened(self._name))
            return self._opened


_wanted: list[_Wanted] = []  # of this process, which runs one pipeline at a time


@contextmanager
def over(name: str | None) -> Iterator[None]:
    """In this block the stages that this process runs send what is heavy to the executor of this name, if there is one.

    Raises:
        UserError: as `opened`.
    """
    with ExitStack() as stack:
        _wanted.extend([_Wanted(name, stack)] if name else [])
        try:
            yield
        finally:
            _wanted.clear()


def executor() -> Executor | None:
    """The executor that the stages of this process are spread over (raises UserError as `opened`)."""
    return _wanted[-1].executor() if _wanted else None


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
