"""The manifest of a merge: what it was made from and how, the digests that prove it; and how a merge appears."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any, Iterable

from merging.adapters import ADAPTER_CONFIG
from merging.card import model_card
from merging.checkpoint import content_digest
from merging.companions import TOKENIZER, carry, source_of
from merging.errors import UserError
from merging.files import publish, read_object, write_json
from merging.inputs import FileInputs
from merging.plan import Plan
from merging.recipe import canonical_json, text_digest
from merging.writer import CheckpointWriter

Manifest = dict[str, Any]


def manifest_path(out: Path) -> Path:
    """Where the manifest of a merged file or folder lies."""
    return (
        out.with_name(out.name + ".manifest.json") if out.suffix == ".safetensors" else out / "manifest.json"
    )


def checkpoint_metadata(plan: Plan) -> dict[str, str]:
    """The metadata of a merged safetensors file: its recipe, without paths."""
    recipe = {
        "method": plan.recipe.method,
        "params": plan.params,
        "experts": list(plan.experts),
        **plan.recipe.settings,
    }
    return {"format": "pt", "mergeline.recipe": canonical_json(recipe)}


def identity(plan: Plan, device: str) -> str:
    """What must be the same for a merge to go on where another one stopped: recipe, files, code."""
    checkpoints = [
        *plan.experts.values(),
        *([plan.base] if plan.base else []),
        *sum(plan.statistics.values(), []),
    ]
    beside = (c.folder / name for c in checkpoints for name in (ADAPTER_CONFIG, TOKENIZER))
    files = {info.file for c in checkpoints for info in c.stored.tensors.values()}
    files = sorted(files.union(path for path in beside if path.is_file()))
    stats = [(str(file), file.stat()) for file in files]
    return text_digest(
        {
            "recipe": plan.recipe.model_dump(mode="json"),
            "experts": list(plan.experts),  # their order
            "params": plan.params,
            "files": [[f, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for f, s in stats],
            "device": device,
            "versions": _versions(),
        }
    )


def refuse_to_replace(plan: Plan, out: Path) -> None:
    """Only a merge gives way to a merge: raises UserError for an input, or a folder of something else."""
    statistics = [checkpoint.path for files in plan.statistics.values() for checkpoint in files]
    refuse_place(filter(None, (*plan.recipe.experts.values(), plan.recipe.base, *statistics)), out)


def refuse_place(inputs: Iterable[Path], out: Path) -> None:
    """Raises UserError if `out` holds an input, or is there and was not made by Mergeline."""
    for path in inputs:
        if path.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{out}: holds the input {path}; choose another place")
    if out.suffix == ".safetensors":
        fits = not out.is_dir()
    elif out.is_dir():
        fits = bool(out.name) and (manifest_path(out).exists() or not any(out.iterdir()))
    else:
        fits = not out.exists()
    if not fits:
        raise UserError(f"{out}: is there already and is no earlier merge; choose another place")


def read_manifest(out: Path) -> Manifest:
    """The manifest of a file or folder; empty if there is none (raises UserError if it is no JSON object)."""
    return read_object(manifest_path(out))


def publish_merge(
    plan: Plan,
    source: FileInputs,
    writer: CheckpointWriter,
    out: Path,
    staging: Path,
    device: str,
    more: dict[str, Any] | None = None,
) -> Manifest:
    """Give the finished files in `staging/out` their final name, with manifest, card and configs beside them.

    more: what the manifest says of a compressed `store`, or of an `adapter`, which has a configuration of its own.
    """
    manifest = _manifest(plan, source, writer, out, device) | (more or {})
    if out.suffix == ".safetensors":
        write_json(manifest_path(out), manifest)
        publish(writer.folder / writer.files[0], out)
        return manifest
    if plan.donor and "adapter" not in manifest:
        layers = plan.stack.layers if plan.stack else None
        carry(plan.donor, [entry.spec for entry in plan.entries], writer.folder, plan.alignment, layers)
    (writer.folder / "README.md").write_text(model_card(manifest))
    (writer.folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    publish(writer.folder, out)
    return manifest


def _manifest(plan: Plan, source: FileInputs, writer: CheckpointWriter, out: Path, device: str) -> Manifest:
    recipe = plan.recipe
    folder = out.parent if out.suffix == ".safetensors" else out

    def origin(path: Path, digest: str) -> dict[str, str]:
        found = {"path": Path(os.path.relpath(path, folder)).as_posix(), "digest": digest}
        source = source_of(path)
        return {**found, "source": source} if source else found

    experts = {name: origin(p, source.checkpoint_digest(name)) for name, p in recipe.experts.items()}
    base = origin(recipe.base, source.checkpoint_digest("base")) if recipe.base else None
    statistics = {
        kind: [origin(c.path, c.digest()) for c in checkpoints]
        for kind, checkpoints in plan.statistics.items()
    }
    lineage = {
        "method": recipe.method,
        "params": plan.params,
        **recipe.settings,
        "base": base,
        "experts": experts,
        "statistics": statistics,
    }
    by_content = {
        **lineage,
        "base": base and base["digest"],
        "experts": [[name, e["digest"]] for name, e in experts.items()],
        "statistics": {kind: [s["digest"] for s in files] for kind, files in statistics.items()},
    }
    return {
        "format": 1,
        "recipe": lineage,
        "recipe_digest": text_digest(by_content),
        "output": described_output(writer),
        "device": device.split(":")[0],
        "versions": _versions(),
    }


def described_output(writer: CheckpointWriter) -> dict[str, Any]:
    """What a manifest says of the files that were written."""
    specs = writer.specs.values()
    return {
        "digest": content_digest((t.name, t.dtype, t.shape, writer.hashes[t.name]) for t in specs),
        "files": writer.files,
        "bytes": sum(t.nbytes for t in specs),
        "tensors": dict(sorted(writer.hashes.items())),
    }


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("mergeline", "torch", "numpy", "safetensors")}
