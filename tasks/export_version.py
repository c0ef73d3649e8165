"""Exporting a registered version: its files, with a card of what was measured, its manifest and its report."""

from __future__ import annotations

import re
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, NamedTuple

from mergeline.merging.engine.card import CARD
from mergeline.merging.engine.manifest import MANIFEST
from mergeline.merging.errors import UserError
from mergeline.merging.files import link_or_copy, read_object, staged, write_bytes, write_json
from mergeline.tasks import tracking
from mergeline.tasks.credentials import without_credentials
from mergeline.tasks.destinations import refuse_destination, send
from mergeline.tasks.digests import files_of
from mergeline.tasks.hub_card import exported_card, license_of
from mergeline.tasks.kept import Say, silent
from mergeline.tasks.leaderboard import LEADERBOARD
from mergeline.tasks.modalities import modality_named
from mergeline.tasks.places import REPORT
from mergeline.tasks.registry import Version, version_by_alias, versions
from mergeline.tasks.rollback import version_files

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Exported(NamedTuple):
    """Which version, by what it can be opened now, and the licence that its card says ("": none)."""

    version: Version
    place: str
    license: str


def export_version(
    workspace: Path,
    params: dict[str, Any],
    name: str,
    to: str,
    *,
    license: str | None = None,
    private: bool = False,
    force: bool = False,
    say: Say = silent,
) -> Exported:
    """Copy or push a version of the registry.

    name: NAME, NAME@ALIAS or NAME@VERSION; without either it is the champion. to: a folder, s3://... or whatever fsspec
    knows, hf://org/name. license: an id of the Hub's, where the cards of the parts do not say one. private: whether a
    repository that is made is.

    Raises:
        UserError: there is no such version, or it was not measured here; its files are nowhere; the licences of its
            parts differ, or a repository is to have none; the destination cannot be written.
    """
    with tracking.locked(workspace):
        client = tracking.connect(workspace)
        version = _version(client, name)
        files = workspace / version_files(workspace, version, say)
        refuse_destination(to, [files], force)
        with tempfile.TemporaryDirectory() as folder:
            board, report = _published(client, version, Path(folder))
            row = _row(board, version)
            found = license_of(_parts(workspace, board, row), license)
            if found is None and to.startswith("hf://"):
                raise UserError(f"{to}: the cards of its parts say no licence; say which holds: --license ID")
            with staged(workspace / tracking.STATE / "scratch" / "export") as out:
                card = exported_card(
                    (files / CARD).read_text(encoding="utf-8"),
                    to.rstrip("/").rpartition("/")[2],
                    board,
                    row,
                    modality_named(board["modality"]).hub_task,
                    found,
                    sorted(set(_datasets(params))),
                )
                _fill(out, files, card, report)
                size = sum(file.stat().st_size for file in files_of(out))
                what = f"{version.model} version {version.version} ({version.merge})"
                say(
                    f"{what}: {len([*files_of(out)])} files, {size / 1e6:.1f} MB, go to {without_credentials(to)} ..."
                )
                place = send(out, to, f"{what}, exported by Mergeline", private)
    return Exported(version, place, found or "")


def _version(client: MlflowClient, name: str) -> Version:
    model, _, which = name.partition("@")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", model):
        raise UserError(f"'{name}': write NAME, NAME@ALIAS or NAME@VERSION of the registry")
    if which.isdecimal():
        known = {version.version: version for version in versions(client, model)}
        if which not in known:
            there = ", ".join(sorted(known, key=int)) or "none"
            raise UserError(f"{model}: has no version {which}; there are: {there}")
        return known[which]
    found = version_by_alias(client, model, which or "champion")
    if found is None:
        raise UserError(f"{model}: the registry has no '{which or 'champion'}' of this name")
    return found


def _published(client: MlflowClient, version: Version, folder: Path) -> tuple[dict[str, Any], Path | None]:
    """The leaderboard of the run that registered a version, and its report if that was written."""
    parent = client.get_run(version.run_id).data.tags.get(tracking.PARENT_TAG)
    if parent is None:
        raise UserError(
            f"{version.model} version {version.version}: MLflow has lost the run that measured it"
        )
    there = {file.path for file in client.list_artifacts(parent)}
    leaderboard = Path(LEADERBOARD).name
    board = read_object(Path(client.download_artifacts(parent, leaderboard, str(folder))))
    if REPORT.name not in there:
        return board, None
    return board, Path(client.download_artifacts(parent, REPORT.name, str(folder)))


def _row(board: dict[str, Any], version: Version) -> dict[str, Any]:
    for row in board["rows"]:
        if row["name"] == version.merge and row.get("digest") == version.digest:
            return row
    raise UserError(f"{version.model} version {version.version}: the run that measured it has no row of it")


def _parts(workspace: Path, board: dict[str, Any], row: dict[str, Any]) -> dict[str, Path]:
    """The checkpoints that a merge is made of, where they are, or were, in the workspace."""
    lineage = board["lineage"]
    experts = [name for name in row.get("experts") or lineage["experts"] if name in lineage["experts"]]
    names = [lineage["base"]["name"], *(experts or lineage["experts"])]
    return {name: workspace / "build" / "checkpoints" / name for name in names}


def _datasets(params: Any) -> Iterator[str]:
    """The datasets of the Hub that a params.yaml names."""
    if isinstance(params, dict | list):
        for value in params.values() if isinstance(params, dict) else params:
            yield from _datasets(value)
    elif isinstance(params, str) and (found := re.match(r"hf-dataset://([\w.-]+/[\w.-]+)", params)):
        yield found[1]


def _fill(out: Path, files: Path, card: str, report: Path | None) -> None:
    """Link the files of a version, and write what is exported with them; the manifest knows both."""
    own = {CARD: card.encode()} | ({REPORT.name: report.read_bytes()} if report else {})
    for file in files_of(files):
        target = out / file.relative_to(files)
        if file.relative_to(files).as_posix() not in (MANIFEST, *own):
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(file, target)
    manifest = read_object(files / MANIFEST)
    for name, data in own.items():
        write_bytes(out / name, data)
        manifest.setdefault("files", {})[name] = f"sha256:{sha256(data).hexdigest()}"
    write_json(out / MANIFEST, manifest)
