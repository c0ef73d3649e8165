"""The manifest of a merge: what it was made from and how, the digests that prove it; and how a merge appears."""

from __future__ import annotations

import os
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Iterable, Mapping

from mergeline.merging.canonical import canonical_json, text_digest
from mergeline.merging.checkpoints.carried import Changes, carry, without_quantisation
from mergeline.merging.checkpoints.checkpoint import content_digest, header_digest
from mergeline.merging.checkpoints.companions import source_of
from mergeline.merging.checkpoints.heads import head_config, write_head
from mergeline.merging.checkpoints.remote import remote_source
from mergeline.merging.checkpoints.router import ROUTER
from mergeline.merging.checkpoints.task_adapters import adapter_path, refuse_other_merge
from mergeline.merging.checkpoints.writer import CheckpointWriter
from mergeline.merging.engine.card import CARD, model_card
from mergeline.merging.engine.plan import Plan
from mergeline.merging.engine.sources import FileInputs
from mergeline.merging.errors import UserError
from mergeline.merging.files import beside, json_bytes, publish, read_object, write_bytes
from mergeline.merging.reading import sha256_of

Manifest = dict[str, Any]

MANIFEST = "manifest.json"


def is_single(out: Path) -> bool:
    """Whether an output of this name is a single file; others are folders."""
    return out.suffix == ".safetensors"


def manifest_name(out: Path) -> str:
    """The name of the manifest, beside a single file or in a folder."""
    return f"{out.name}.{MANIFEST}" if is_single(out) else MANIFEST


def manifest_path(out: Path) -> Path:
    """Where the manifest of a merged file or folder lies."""
    return beside(out, manifest_name(out)) if is_single(out) else out / MANIFEST


def signature_path(out: Path) -> Path:
    """Where the signature of a merged file or folder lies."""
    path = manifest_path(out)
    return path.with_name(f"{path.name}.sig")


def checkpoint_metadata(plan: Plan) -> dict[str, str]:
    """The metadata of a merged safetensors file: its recipe, without paths."""
    recipe = {
        "method": plan.recipe.method,
        "params": plan.params,
        "experts": list(plan.experts),
        **plan.recipe.settings,
        **({"methods": outside} if (outside := _outside_methods(plan)) else {}),
    }
    return {**_kept_metadata(plan), "format": "pt", "mergeline.recipe": canonical_json(recipe)}


def _kept_metadata(plan: Plan) -> dict[str, str]:
    """What the files of the base, or first expert, say of themselves; hashes and recipes are no longer true."""
    first = next(iter(plan.checkpoints.values())).metadata
    return {
        key: value for key, value in first.items() if not key.startswith("mergeline.") and "hash" not in key
    }


def identity(plan: Plan, device: str) -> str:
    """What must be the same for a merge to go on where another one stopped: recipe, files, code."""
    files = sorted(plan.stamps.items())
    return text_digest(
        {
            "recipe": plan.recipe.model_dump(mode="json"),
            "methods": _outside_methods(plan),
            "experts": list(plan.experts),  # their order
            "params": plan.params,
            "files": [[str(file), s.size, s.modified, s.changed, s.inode] for file, s in files],
            "device": device,
            "versions": versions(),
        }
    )


def _outside_methods(plan: Plan) -> dict[str, str]:
    """The digests of the files that define the methods which are none of Mergeline's own, by their ids."""
    methods = {part.method for part in plan.bound.parts if part.method.is_outside} if plan.method else set()
    return {method.id: method.digest for method in sorted(methods, key=lambda method: method.id)}


def sub_folders(files: Iterable[str]) -> set[str]:
    """The folders that names of files in a folder begin with."""
    return {folder for name in files if (folder := name.rpartition("/")[0])}


def read_manifest(out: Path) -> Manifest:
    """The manifest of a file or folder; empty if there is none (raises UserError if it is no JSON object)."""
    return read_object(manifest_path(out))


def make_manifest(
    plan: Plan, source: FileInputs, writer: CheckpointWriter, out: Path, device: str
) -> Manifest:
    """What is said of a merge whose files are finished; what was not read of its inputs is read for their digests."""
    lineage, digest = lineage_of(plan, source, out)
    return {
        "format": 1,
        "recipe": lineage,
        "recipe_digest": digest,
        "output": described_output(writer),
        **({"read_as": plan.read_as} if plan.read_as else {}),
        "treatments": plan.treatments(),
        "device": device.split(":")[0],
        "versions": versions(),
    }


def lineage_of(plan: Plan, source: FileInputs, out: Path) -> tuple[dict[str, Any], str]:
    """The recipe with the digests of what it is of, and a digest of both, wherever the inputs lie."""
    recipe = plan.recipe
    origin = partial(origin_of, out)
    experts = {name: origin(p, source.checkpoint_digest(name)) for name, p in recipe.experts.items()}
    base = origin(recipe.base, source.checkpoint_digest("base")) if recipe.base else None
    onto = _onto(plan, out, {**recipe.experts, "base": recipe.base}, {**experts, "base": base})
    statistics = {
        kind: [origin(c.path, c.digest()) for c in checkpoints]
        for kind, checkpoints in plan.statistics.items()
    }
    outside = _outside_methods(plan)
    lineage = {
        "method": recipe.method,
        "params": plan.params,
        **recipe.settings,
        **({"methods": outside} if outside else {}),
        "base": base,
        "experts": experts,
        **({"onto": onto} if onto else {}),
        "statistics": statistics,
        **_companions(plan),
    }
    by_content = {
        **lineage,
        "base": base and base["digest"],
        "experts": [[name, e["digest"]] for name, e in experts.items()],
        **({"onto": {name: o["digest"] for name, o in onto.items()}} if onto else {}),
        "statistics": {kind: [s["digest"] for s in files] for kind, files in statistics.items()},
    }
    return lineage, text_digest(by_content)


def _onto(
    plan: Plan, out: Path, paths: Mapping[str, Path | None], known: Mapping[str, dict[str, str] | None]
) -> dict[str, dict[str, str]]:
    """What adapters add to that is not the base; read for its digest where nothing else has it."""
    digests = {
        path.resolve(): origin["digest"] for name, path in paths.items() if path and (origin := known[name])
    }
    found = {}
    for name, path in plan.recipe.onto.items():
        if path.resolve() not in digests:
            digests[path.resolve()] = plan.onto[name].stored.digest()
        found[name] = origin_of(out, path, digests[path.resolve()])
    return found


def origin_of(out: Path, path: Path, digest: str) -> dict[str, str]:
    """What the manifest of `out` says of something that was read for it; of what was read elsewhere, its URI."""
    if there := remote_source(path):
        return {"path": there, "digest": digest, "source": there}
    folder = out.parent if is_single(out) else out
    found = {"path": Path(os.path.relpath(path, folder)).as_posix(), "digest": digest}
    source = source_of(path)
    return {**found, "source": source} if source else found


def _companions(plan: Plan) -> dict[str, Any]:
    """The digests of the adapters of tasks, or of the router, that lie beside the weights."""
    adapters = {task: f"sha256:{sha256_of(a.file)}" for task, a in sorted(plan.adapters.items())}
    router = f"sha256:{sha256_of(plan.router.file)}" if plan.router else None
    return {**({"adapters": adapters} if adapters else {}), **({"router": router} if router else {})}


def write_companions(plan: Plan, source: FileInputs, manifest: Manifest, folder: Path) -> None:
    """Lay configurations, tokenizer, heads and adapters of tasks, router and card beside the weights in `folder`.

    Raises:
        UserError: an adapter was made for another merge, or the router for another base.
    """
    for expert, names in plan.heads.items():
        head = {name: source.whole(expert, name) for name in names}
        config = head_config(plan.recipe.experts[expert], head, plan.recipe.base)
        write_head(folder, expert, head, without_quantisation(config))
    for task, adapter in plan.adapters.items():
        refuse_other_merge(adapter, manifest["output"]["digest"])
        write_bytes(adapter_path(folder, task), adapter.file.read_bytes())
    if plan.router:
        base = manifest["recipe"]["base"]
        if not base or plan.router.base != base["digest"]:
            raise UserError(
                f"{plan.router.file}: was made for another base ({plan.router.base}); fit it again"
            )
        write_bytes(folder / ROUTER, plan.router.file.read_bytes())
    if plan.donor and "adapter" not in manifest:
        moved = plan.stack.layers if plan.stack else {}
        layers = {t: [(plan.checkpoints[name].path, i) for name, i in found] for t, found in moved.items()}
        changes = Changes(
            alignment=plan.alignment,
            layers=layers,
            chat_template=plan.recipe.chat_template,
            quantised=plan.recipe.requantise,
            untied=plan.untied is not None,
            configured=plan.configured,
        )
        carry(plan.donor, [entry.spec for entry in plan.entries], folder, changes)
    (folder / CARD).write_text(model_card(manifest))


def publish_files(manifest: Manifest, writer: CheckpointWriter, out: Path) -> None:
    """Give what a writer finished in the staging folder of `out` its final name, with its manifest.

    The manifest gets the digests of the `files` that lie beside the weights.
    """
    manifest["files"] = {} if is_single(out) else _digests(writer.folder, but=writer.files)
    text = json_bytes(manifest)
    if is_single(out):
        publish(writer.folder / writer.files[0], out, {manifest_name(out): text})
        signature_path(out).unlink(missing_ok=True)  # of what stood here before
    else:
        (writer.folder / MANIFEST).write_bytes(text)
        publish(writer.folder, out)


def _digests(folder: Path, but: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of all other files in a folder and below, by their paths in it."""
    files = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    return {name: f"sha256:{sha256_of(path)}" for name, path in files.items() if name not in set(but)}


def described_output(writer: CheckpointWriter) -> dict[str, Any]:
    """What a manifest says of the files that were written."""
    specs = writer.specs.values()
    return {
        "digest": content_digest((t.name, t.dtype, t.shape, writer.hashes[t.name]) for t in specs),
        "files": writer.files,
        "headers": {name: header_digest(writer.folder / name) for name in writer.files},
        "bytes": sum(t.nbytes for t in specs),
        "tensors": dict(sorted(writer.hashes.items())),
    }


def versions() -> dict[str, str]:
    """Of what computes and writes."""
    return {name: version(name) for name in ("mergeline", "torch", "numpy", "safetensors")}
