"""Re-derive a merged checkpoint from its manifest and say whether it is bit-identical."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from merging.checkpoint import open_checkpoint
from merging.engine import merge
from merging.errors import UserError
from merging.files import user_errors
from merging.lora import extract_lora
from merging.manifest import manifest_path
from merging.stores import compress


class _Origin(BaseModel):
    path: str
    digest: str


class _Lineage(BaseModel):
    model_config = ConfigDict(extra="allow")

    method: str
    params: dict[str, Any]
    base: _Origin | None
    experts: dict[str, _Origin]
    statistics: dict[str, list[_Origin]] = {}


class _Output(BaseModel):
    digest: str
    tensors: dict[str, str]


class _Adapter(BaseModel):
    """How an adapter was made."""

    rank: int | float | None
    modules_to_save: list[str]


class _Manifest(BaseModel):
    """What `verify` needs of a manifest."""

    recipe: _Lineage
    output: _Output
    device: str
    versions: dict[str, str]
    store: dict[str, Any] | None = None  # of a compressed store
    adapter: _Adapter | None = None


def verify(out: Path) -> str:
    """Check the files of `out` against its manifest, its inputs against their digests, and merge once more.

    Returns a sentence.

    Raises:
        UserError: no manifest, files or inputs that changed, or a merge that comes out differently.
    """
    manifest = _read(manifest_path(out))
    recipe, digest = manifest.recipe, manifest.output.digest
    found = open_checkpoint(out).digest()
    if found != digest:
        raise UserError(
            f"{out}: its content is {found}, its manifest says {digest}: it was changed after the merge"
        )
    folder = out if out.is_dir() else out.parent
    origins = [*recipe.experts.items(), *([("base", recipe.base)] if recipe.base else [])]
    origins += [(kind, origin) for kind, files in recipe.statistics.items() for origin in files]
    for name, origin in origins:
        if open_checkpoint(folder / origin.path).digest() != origin.digest:
            raise UserError(
                f"{folder / origin.path}: is no longer the '{name}' that was merged ({origin.digest})"
            )
    again = {
        **recipe.model_dump(),
        "base": recipe.base and folder / recipe.base.path,
        "experts": {name: folder / origin.path for name, origin in recipe.experts.items()},
        "statistics": {kind: [folder / o.path for o in files] for kind, files in recipe.statistics.items()},
    }
    with (
        user_errors(out.parent),
        tempfile.TemporaryDirectory(dir=out.parent, prefix=".verify-", suffix=".partial") as scratch,
    ):
        place = Path(scratch) / f"again{out.suffix if out.is_file() else ''}"
        if manifest.adapter:
            made = extract_lora(again, place, **manifest.adapter.model_dump(), device=manifest.device)
        else:
            made = (compress if manifest.store else merge)(again, place, device=manifest.device)
    if made["output"]["digest"] != digest:
        differ = [n for n, h in made["output"]["tensors"].items() if manifest.output.tensors.get(n) != h]
        versions = {k: v for k, v in manifest.versions.items() if made["versions"].get(k) != v}
        raise UserError(
            f"{out}: merged again, {len(differ)} tensor(s) differ, first '{differ[0]}'; "
            f"made with {versions or 'the same versions'}"
        )
    return f"{out}: bit-identical to a new merge of its inputs ({digest})"


def _read(path: Path) -> _Manifest:
    try:
        return _Manifest.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no manifest; only what Mergeline merged can be verified") from None
    except ValidationError as error:
        first = error.errors()[0]
        if b'"extracted": {' in path.read_bytes():
            raise UserError(f"{path}: was extracted from a store; verify the store that it names") from None
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: the manifest was damaged: {where}: {first['msg']}") from None
