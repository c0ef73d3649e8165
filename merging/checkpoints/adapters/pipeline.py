"""LoRA of a pipeline: what one file makes of all components at once."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from mergeline.merging.checkpoints.adapters.single_file import adapt_component, components_in
from mergeline.merging.checkpoints.checkpoint import Checkpoint
from mergeline.merging.checkpoints.components import by_component, component_folders
from mergeline.merging.errors import UserError


class AdaptedPipeline(NamedTuple):
    """What a file of LoRA makes of a pipeline, and what is to be said of it."""

    checkpoint: Checkpoint
    notes: list[str]


def adapt_pipeline(base: Checkpoint, file: Checkpoint) -> AdaptedPipeline:
    """What a file of LoRA makes of each component that it has factors for; of one component what it makes of that.

    Raises:
        UserError: as `adapt_component`; no component of the base is one that the file is for.
    """
    parts = by_component(base.tensors, component_folders(base.path) if base.path.is_dir() else [])
    if not any(parts):
        return AdaptedPipeline(*adapt_component(base, file))
    wanted = components_in(file)
    known = {prefix: names for prefix, names in parts.items() if any(_plain(prefix) in of for of in wanted)}
    left = sorted(" or ".join(of) for of in wanted if not {f"{name}/" for name in of} & known.keys())
    if not known:
        raise UserError(
            f"{file.path}: is LoRA of {', '.join(left)}, and the base has {', '.join(map(_plain, parts))}; "
            "name the base that it was trained on"
        )
    tensors = dict(base.tensors)
    for prefix, names in known.items():
        own = {
            (inner := name.removeprefix(prefix)): replace(base.tensors[name], name=inner) for name in names
        }
        component = Checkpoint(base.path / prefix, own)
        adapted, _ = adapt_component(component, file)
        changed = {n: info for n, info in adapted.tensors.items() if info is not own.get(n)}
        tensors |= {prefix + n: replace(info, name=prefix + n) for n, info in changed.items()}
    notes = [f"{file.path.name} changes {', '.join(map(_plain, known))}"]
    if left:
        notes.append(f"what {file.path.name} holds for {', '.join(left)} is not merged: the base has none")
    return AdaptedPipeline(file.view(tensors), notes)


def _plain(prefix: str) -> str:
    return prefix.rstrip("/")
