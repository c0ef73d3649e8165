"""Rolling back: any registered version becomes the champion again, with its files brought back if need be."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from mergeline.merging.errors import UserError
from mergeline.tasks import kept, registry, tracking
from mergeline.tasks.kept import Say, silent
from mergeline.tasks.registry import Version


class RolledBack(NamedTuple):
    """The champion, where its files lie as seen from the workspace, and which version it replaced, if another."""

    champion: Version
    files: Path
    before: Version | None


def rollback(workspace: Path, params: dict[str, Any], version: str, say: Say = silent) -> RolledBack:
    """Make a registered version champion, without judging it. A run does not promote again what it replaces.

    say: is told where the files came from.

    Raises:
        UserError: there is no such version; its files are nowhere; MLflow, or DVC's remote, does not answer.
    """
    model = params["name"]
    with tracking.locked(workspace):
        client = tracking.connect(workspace)
        versions = {v.version: v for v in registry.versions(client, model)}
        target = versions.get(str(version))
        if target is None:
            known = ", ".join(sorted(versions, key=int)) or "none"
            raise UserError(f"{model}: has no version {version}; there are: {known}")
        files = version_files(workspace, target, say)
        experiment_id = tracking.experiment(client, workspace, model)
        return RolledBack(target, files, registry.put_back(client, experiment_id, target))


def version_files(workspace: Path, target: Version, say: Say) -> Path:
    """Where the files of a version lie, seen from the workspace; brought back if need be.

    Raises:
        UserError: they are nowhere, or are not its own; DVC's remote does not answer.
    """
    if target.md5:
        digests = tracking.digests(workspace)
        files = kept.bring_back(workspace, target.md5, tracking.registry_name(workspace), digests, say)
        if files is None:
            raise UserError(
                f"{target.model} version {target.version}: its files ({target.md5}) are neither in {kept.KEPT}, nor "
                "among the merges, nor in DVC's cache or default remote; run this where it was registered, or `dvc "
                "push` there"
            )
    else:
        files = Path(target.uri)
    if problem := kept.file_problem(workspace, files, target.digest):
        raise UserError(f"{target.model} version {target.version}: {problem}")
    return files
