"""Re-derive a merged checkpoint from its manifest and say whether it is bit-identical."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from merging.checkpoint import open_checkpoint
from merging.engine import manifest_path, merge
from merging.errors import UserError


def verify(out: Path) -> str:
    """Check the files of `out` against its manifest, its inputs against their digests, and merge once more.

    Returns a sentence.

    Raises:
        UserError: no manifest, files or inputs that changed, or a merge that comes out differently.
    """
    manifest = _read(manifest_path(out))
    recipe, digest = manifest["recipe"], manifest["output"]["digest"]
    found = open_checkpoint(out).digest()
    if found != digest:
        raise UserError(f"{out}: its content is {found}, its manifest says {digest}: it was changed after the merge")
    folder = out if out.is_dir() else out.parent
    sources = {name: folder / entry["path"] for name, entry in recipe["experts"].items()}
    base = folder / recipe["base"]["path"] if recipe["base"] else None
    for name, path in {**sources, **({"base": base} if base else {})}.items():
        wanted = (recipe["base"] if path is base else recipe["experts"][name])["digest"]
        if open_checkpoint(path).digest() != wanted:
            raise UserError(f"{path}: is no longer the '{name}' that was merged ({wanted})")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".verify-", suffix=".partial") as scratch:
        again = merge(
            {
                "method": recipe["method"],
                "params": recipe["params"],
                "base": base,
                "experts": sources,
                "dtype": recipe["dtype"],
                "seed": recipe["seed"],
                "shard_size": recipe["shard_size"],
            },
            Path(scratch) / "again",
            device=manifest["device"],
        )
    if again["output"]["digest"] != digest:
        differ = [n for n, h in again["output"]["tensors"].items() if manifest["output"]["tensors"].get(n) != h]
        made = {k: v for k, v in manifest["versions"].items() if again["versions"].get(k) != v}
        raise UserError(f"{out}: merged again, {len(differ)} tensor(s) differ, first '{differ[0]}'; made with {made or 'the same versions'}")
    return f"{out}: bit-identical to a new merge of its inputs ({digest})"


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no manifest; only what Mergeline merged can be verified") from None
    except ValueError:
        raise UserError(f"{path}: is not valid JSON; the manifest was damaged") from None
