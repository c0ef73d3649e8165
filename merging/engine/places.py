"""Where an output may go: never in the place of an input, nor of what is no earlier output of the same kind."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import Any, Callable, Iterable, Literal, Mapping

from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.checkpoints.companions import CONFIG_FILES, INDEX
from mergeline.merging.checkpoints.heads import HEADS
from mergeline.merging.checkpoints.task_adapters import ADAPTERS
from mergeline.merging.engine.card import CARD
from mergeline.merging.engine.manifest import (
    MANIFEST,
    is_single,
    manifest_name,
    manifest_path,
    read_manifest,
    signature_path,
    sub_folders,
)
from mergeline.merging.errors import UserError
from mergeline.merging.files import staging_of, user_errors

# What a checkpoint was written as: by merge or sweep, compress, extract-lora, merge-experts, moe, extract-expert,
# export, transplant, align.
Kind = Literal["merge", "store", "adapter", "mixture", "moe", "expert", "export", "transplant", "aligned"]

_MARK = "mergeline."  # how keys of the metadata of files begin that Mergeline wrote
_STAGING = re.compile(r"\..*\.partial")


def kind_of(manifest: Mapping[str, Any]) -> Kind | None:
    """What a manifest is of; None if it is none of Mergeline's."""
    if manifest.get("format") != 1 or not isinstance(manifest.get("output"), dict):
        return None
    if isinstance(manifest.get("extracted"), dict):
        return "expert"
    if isinstance(manifest.get("exported"), dict):
        return "export"
    if isinstance(manifest.get("transplanted"), dict):
        return "transplant"
    if isinstance(manifest.get("aligned"), dict):
        return "aligned"
    if not isinstance(manifest.get("recipe"), dict):
        return None
    kinds: tuple[Kind, ...] = ("store", "adapter", "mixture", "moe")
    return next((kind for kind in kinds if kind in manifest), "merge")


def replaced(out: Path) -> str | None:
    """What an output at `out` will have replaced, in words; None where nothing is."""
    if not os.path.exists(out) or os.path.isdir(out) and not os.listdir(out):
        return None
    manifest = _manifest(out)
    kind = kind_of(manifest)
    if kind is None:
        return "what was there"
    try:
        if kind == "expert":
            store = manifest["extracted"]["store"]
            path = store["path"] if isinstance(store, dict) else store  # of an earlier Mergeline
            return f"the expert {manifest['extracted']['expert']} of {Path(path).name}"
        if kind == "export":
            exported = manifest["exported"]
            return f"the task {exported['task']} of {Path(exported['merge']['path']).name}"
        if kind == "transplant":
            names = [Path(manifest["transplanted"][key]["path"]).name for key in ("model", "donor")]
            return f"{names[0]} with the vocabulary of {names[1]}"
        if kind == "aligned":
            aligned = manifest["aligned"]
            paths = [aligned["models"][aligned["model"]]["path"], aligned["reference"]["path"]]
            return "{} in the order of {}".format(*(Path(path).name for path in paths))
        recipe = manifest["recipe"]
        base = [Path(recipe["base"]["path"]).name] if recipe["base"] else []
        return f"the {kind} by {recipe['method']} of {', '.join([*base, *recipe['experts']])}"
    except (KeyError, TypeError):
        return f"an earlier {kind}"


# ---------------------------------------------------------------------------------------------- checkpoints


def refuse_place(out: Path, inputs: Iterable[Path], kind: Kind, force: bool = False) -> None:
    """Raises UserError unless a checkpoint may be written to `out`.

    That is where nothing is, or what a command of the same kind wrote, and nobody added to. With `force` it is anything
    but inputs (by path, link or inode), a link, the current folder or one above it, or what holds a repository.
    """
    inputs = list(inputs)
    single = is_single(out)
    refuse_always(out, inputs)
    if single:
        refuse_always(out.with_name(manifest_name(out)), inputs)
    for path in inputs if single else ():
        if path.is_dir() and _inode(path) == _inode(out.parent):
            raise UserError(f"{out}: would become a part of the input {path}; choose another place")
    if out.is_dir() and single:
        raise UserError(f"{out}: is a folder; choose a name for a file, or one without .safetensors")
    if out.exists() and not out.is_dir() and not single:
        raise UserError(f"{out}: is a file, and a folder is to be made; choose another place")
    if force:
        if not single and out.is_dir():
            _refuse_repository(out)
        return
    if single:
        taken = out.exists() or manifest_path(out).exists()
    else:
        taken = out.is_dir() and any(out.iterdir())
    if not taken:
        return
    manifest = _manifest(out)
    if kind_of(manifest) != kind or not _is_written(out):
        raise UserError(
            f"{out}: is there already and is no earlier {kind}; choose another place, or replace it with --force"
        )
    if not single:
        _refuse_added(out, manifest)


def _manifest(out: Path) -> dict[str, Any]:
    try:
        return read_manifest(out)
    except UserError:  # no JSON: not Mergeline's
        return {}


def _is_written(out: Path) -> bool:
    """Whether the weights are Mergeline's, too, not a user's under a name that a manifest describes.

    What cannot be opened was damaged since, or is gone.
    """
    try:
        return any(key.startswith(_MARK) for key in open_checkpoint(out).metadata)
    except UserError:
        return True


def _refuse_added(out: Path, manifest: Mapping[str, Any]) -> None:
    written, beside = manifest["output"].get("files"), manifest.get("files")
    known = {CARD, MANIFEST, signature_path(out).name, INDEX, *CONFIG_FILES}
    known.update(str(name) for names in (written, beside) if isinstance(names, list | dict) for name in names)
    # Of folders, those of heads, of adapters of tasks and of modules alone are Mergeline's.
    parts = {ADAPTERS, HEADS, *sub_folders(known)}
    folders = [part for part in sorted(parts) if (out / part).is_dir()]
    held = {part: [f"{part}/{name}" for name in os.listdir(out / part)] for part in folders}
    inside = [name for names in held.values() for name in names]
    own = {part for part, names in held.items() if not known.isdisjoint(names)}
    for name in sorted({*os.listdir(out), *inside} - own):
        if name not in known:
            raise UserError(
                f"{out}: holds '{name}', which Mergeline did not write; move it away, choose another place, or replace "
                "everything with --force"
            )


def _refuse_repository(out: Path) -> None:
    for folder, folders, files in os.walk(out):
        if ".git" in folders or ".git" in files:
            raise UserError(f"{folder}: is a git repository; choose another place, or move it away")


# ---------------------------------------------------------------------------------------------- other files


def refuse_file(
    out: Path, inputs: Iterable[Path], is_own: Callable[[Path], bool], what: str, force: bool = False
) -> None:
    """Raises UserError unless a page or a table may be written to `out`.

    That is where nothing is, or `what` Mergeline wrote, as `is_own` tells; with `force`, a file that is no input.
    """
    refuse_always(out, list(inputs))
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name a file")
    if out.exists() and not force and not is_own(out):
        raise UserError(
            f"{out}: is there already and is no {what} of Mergeline's; choose another place, or replace it with --force"
        )


# ---------------------------------------------------------------------------------------------- always


def refuse_always(out: Path, inputs: Iterable[Path]) -> None:
    """Raises UserError for a place that nothing may take: an input's, a link, the current folder, a repository's."""
    if "\0" in str(out) or out.name in ("", ".."):
        raise UserError(f"{out}: is no name for what is written; choose another place")
    if _STAGING.fullmatch(out.name):
        raise UserError(f"{out}: names like that are for unfinished outputs; choose another place")
    if ".git" in out.absolute().parts:
        raise UserError(f"{out}: lies in a git repository's own folder; choose another place")
    with user_errors(out):
        if out.is_symlink():
            raise UserError(f"{out}: is a link to {os.readlink(out)}; name that, or choose another place")
        if path := _held((out, staging_of(out)), inputs):
            raise UserError(f"{out}: holds the input {path}; choose another place")
        if folder := _held([out], (Path.cwd(), Path(os.path.expanduser("~")))):
            raise UserError(f"{out}: is the folder {folder}, or holds it; choose another place")


def _held(places: Iterable[Path], paths: Iterable[Path]) -> Path | None:
    """The first of `paths` that is one of the places, or lies in one: by name, by link or by inode."""
    inodes = cache(_inode)
    taken = {inode for place in places if (inode := inodes(place))}
    for path in paths if taken else ():
        real = path.resolve()
        if any(inodes(p) in taken for p in (real, *real.parents)):
            return path
    return None


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
