"""Export one task of a merge with heads: the merged trunk under the head of one expert, as a plain checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Callable

from mergeline.merging.canonical import canonical_json
from mergeline.merging.checkpoints.carried import carried_files, carry
from mergeline.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mergeline.merging.checkpoints.companions import CONFIG, stem_of
from mergeline.merging.checkpoints.components import configurations
from mergeline.merging.checkpoints.heads import read_head
from mergeline.merging.checkpoints.writer import CheckpointWriter, TensorSpec
from mergeline.merging.engine.inputs import files_of, refuse_changed, stamps
from mergeline.merging.engine.manifest import (
    Manifest,
    described_output,
    is_single,
    origin_of,
    publish_files,
    read_manifest,
    versions,
)
from mergeline.merging.engine.places import refuse_place
from mergeline.merging.errors import UserError
from mergeline.merging.files import staged, write_json
from mergeline.merging.recipes.rules import matches


def export_task(
    merge: str | os.PathLike,
    task: str,
    out: str | os.PathLike,
    *,
    shard_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    force: bool = False,
) -> Manifest:
    """Write what a merge is for one task into the folder `out`; returns its manifest.

    Its tensors are those of the merge, but for the heads, and those of the head; its configuration is that of the
    head's expert, the files beside it (tokenizer, processor) are the merge's.

    Raises:
        UserError: no merge with heads, no head of this name, files that change while they are read, an `out` that holds
            something else (`force` as with `merging.merge`).
    """
    merge, out = Path(merge), Path(out)
    merged, (head, config) = open_checkpoint(merge), read_head(merge, task)
    if is_single(out):
        raise UserError(f"{out}: a configuration lies beside the weights; name a folder")
    before = stamps(file for checkpoint in (merged, head) for file in files_of(checkpoint))
    refuse_place(out, [merge, *before], "export", force)
    patterns = read_manifest(merge).get("recipe", {}).get("heads", [])
    own = {name: info for name, info in merged.tensors.items() if not matches(patterns, name)}
    sources = dict.fromkeys(own, merged) | dict.fromkeys(head.tensors, head)
    specs = [_spec(checkpoint, name) for name, checkpoint in sorted(sources.items())]
    metadata = {"format": "pt", "mergeline.export": canonical_json({"task": task})}
    with staged(out) as folder:
        stems = {prefix: stem_of(own) for prefix, own in configurations(merge).items()}
        writer = CheckpointWriter(folder, specs, metadata, shard_size, stems=stems)
        for done, spec in enumerate(specs, 1):
            sink = writer.open(spec.name)
            sink.append(sources[spec.name].read(spec.name))
            sink.close()
            if progress:
                progress(done, len(specs))
        writer.finish()
        exported = {"merge": origin_of(out, merge, merged.digest()), "task": task, "shard_size": shard_size}
        output = described_output(writer)
        manifest: Manifest = {"format": 1, "exported": exported, "output": output, "versions": versions()}
        if carried_files(merge):
            carry(merge, specs, writer.folder)
        if config:
            write_json(writer.folder / CONFIG, config)
        refuse_changed(before)
        publish_files(manifest, writer, out)
    return manifest


def _spec(checkpoint: Checkpoint, name: str) -> TensorSpec:
    info = checkpoint.tensors[name]
    return TensorSpec(name, info.dtype, info.shape, info.nbytes)
