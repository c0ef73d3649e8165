"""Heads of tasks: what each expert of a merge keeps for itself, such as its classifier.

A merge's folder holds them as `heads/EXPERT.safetensors`, with the expert's own tensors by their names, and
`heads/EXPERT.json`, the expert's configuration, which names its classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping

from mergeline.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.files import json_bytes, read_object, write_bytes

if TYPE_CHECKING:
    from torch import Tensor

HEADS = "heads"  # the folder of a merge that holds them


def head_names(folder: Path) -> list[str]:
    """The experts whose heads lie beside a merge; none where there are no heads."""
    return sorted(file.stem for file in (folder / HEADS).glob("*.safetensors"))


def write_head(folder: Path, expert: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Lay the head of an expert, and its configuration if it has one, beside the merge in `folder`."""
    from safetensors.torch import save

    own = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    write_bytes(folder / HEADS / f"{expert}.safetensors", save(own, {"format": "pt"}))
    if config:
        write_bytes(folder / HEADS / f"{expert}.json", json_bytes(config))


def read_head(folder: Path, expert: str) -> tuple[Checkpoint, dict[str, Any]]:
    """The head of an expert beside a merge, and its configuration, empty if it has none.

    Raises:
        UserError: there is none of this name, or it is damaged.
    """
    names = head_names(folder)
    if expert not in names:
        known = f"; it has those of {', '.join(names)}" if names else ""
        raise UserError(f"{folder}: has no head of '{expert}'{did_you_mean(expert, names) or known}")
    place = folder / HEADS
    return open_checkpoint(place / f"{expert}.safetensors"), read_object(place / f"{expert}.json")
