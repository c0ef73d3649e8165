"""Heads of tasks: what each expert of a merge keeps for itself, such as its classifier.

A merge's folder holds them as `heads/EXPERT.safetensors`, with the expert's own tensors by their names, and
`heads/EXPERT.json`, the expert's configuration, which names its classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping

from mergeline.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mergeline.merging.checkpoints.companions import ADAPTER_CONFIG, CONFIG, adapted_class, read_config
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.files import json_bytes, read_object, write_bytes

if TYPE_CHECKING:
    from torch import Tensor

HEADS = "heads"  # the folder of a merge that holds them
# What a configuration says of a head.
_OF_HEAD = ("architectures", "id2label", "label2id", "num_labels", "problem_type")


def head_names(folder: Path) -> list[str]:
    """The experts whose heads lie beside a merge; none where there are no heads."""
    return sorted(file.stem for file in (folder / HEADS).glob("*.safetensors"))


def head_config(path: Path, head: Mapping[str, Tensor], base: Path | None) -> dict[str, Any]:
    """The configuration of an expert under its own head; empty where there is none.

    An adapter has none: it is the base's, with as many classes as its head has, without names, and the class of model
    that PEFT says.

    Raises:
        UserError: a damaged configuration; an adapter's head that holds no matrix.
    """
    if not path.is_dir():
        return {}
    if base is None or not (path / ADAPTER_CONFIG).is_file() or (path / CONFIG).is_file():
        return read_config(path)
    if not (config := {k: v for k, v in read_config(base).items() if k not in _OF_HEAD}):
        return {}
    kind = adapted_class(read_object(path / ADAPTER_CONFIG))
    labels = [f"LABEL_{i}" for i in range(outputs(head))]
    return {
        **config,
        **({"architectures": [kind]} if kind else {}),
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def outputs(head: Mapping[str, Tensor]) -> int:
    """How many numbers a head gives: the rows of its last matrix, by the numbers of its modules.

    Raises:
        UserError: it has no matrix.
    """
    matrices = [name for name, tensor in head.items() if tensor.ndim == 2]
    if not matrices:
        raise UserError(f"heads: {', '.join(sorted(head)[:3])} hold no matrix, which a classifier has")
    last = max(matrices, key=lambda name: [(part.isdecimal(), part.zfill(9)) for part in name.split(".")])
    return head[last].shape[0]


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
