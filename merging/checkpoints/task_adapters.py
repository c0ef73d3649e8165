"""Adapters of tasks: what a merge is corrected by where the task of an input is known when the merge is used.

A merge's folder holds them as `adapters/TASK.safetensors`, a few kilobytes each. The metadata say what it computes, for
which task, and which merge it was made for, by the digest of its weights.

    linear      matrix (d, d), offset (d):                    f + matrix f + offset of the final features f
    surgery     down (r, d), up (d, r):                       f - up relu(down f)
    surgery_v2  BLOCK/down, BLOCK/up of every block BLOCK:    the same of every token of the block's output
    smile       what the task's expert adds to linear maps where tokens are routed to it: see upscaling.py

Representation Surgery: arXiv 2402.02705, 2410.14389 (V2).
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Literal, Mapping, cast, get_args

from mergeline.merging.checkpoints import upscaling
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.errors import UserError
from mergeline.merging.files import write_bytes
from mergeline.merging.reading import parsed_json

if TYPE_CHECKING:
    from torch import Tensor, nn

Kind = Literal["linear", "surgery", "surgery_v2", "smile"]

ADAPTERS = "adapters"  # the folder of a merge that holds them
_METADATA = "mergeline.task_adapter"


@dataclass(frozen=True, eq=False)
class TaskAdapter:
    """What corrects the merge of the digest `model` on inputs of `task`; `file` is where it was read."""

    kind: Kind
    task: str
    model: str
    tensors: Mapping[str, Tensor]
    file: Path = field(default=Path(), kw_only=True)

    @property
    def blocks(self) -> list[str]:
        """The blocks after which it adds something, by their names in the model."""
        return sorted({name.rpartition("/")[0] for name in self.tensors} - {""})

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def features(self, features_BD: Tensor) -> Tensor:
        """The final features (B, d), corrected (raises UserError where they have another width)."""
        if self.kind == "surgery_v2":
            return features_BD
        own = {name: tensor.to(features_BD) for name, tensor in self.tensors.items()}
        width = own["matrix" if self.kind == "linear" else "down"].shape[1]
        if width != features_BD.shape[1]:
            raise UserError(
                f"{self.file}: corrects features of width {width}, and the model's have {features_BD.shape[1]}"
            )
        if self.kind == "linear":
            return features_BD + features_BD @ own["matrix"].T + own["offset"]
        return operated(features_BD, own["down"], own["up"])

    @contextmanager
    def inside(self, module: nn.Module) -> Iterator[None]:
        """In this block, `module` runs with what is added after its blocks (raises UserError if it has others)."""
        handles = []
        try:
            for name in self.blocks:
                try:
                    block = module.get_submodule(name)
                except AttributeError:
                    raise UserError(f"{self.file}: corrects '{name}', which the model has not") from None
                factors = self.tensors[f"{name}/down"], self.tensors[f"{name}/up"]
                handles.append(block.register_forward_hook(partial(_after, *factors)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def operated(x: Tensor, down_RD: Tensor, up_DR: Tensor) -> Tensor:
    """x - up relu(down x), of rows of width d: the module of Representation Surgery."""
    return x - (x @ down_RD.T).relu() @ up_DR.T


def _after(down_RD: Tensor, up_DR: Tensor, _block: Any, _inputs: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return operated(output[0], down_RD.to(output[0]), up_DR.to(output[0])), *output[1:]
    return operated(output, down_RD.to(output), up_DR.to(output))


# ---------------------------------------------------------------------------------------------- files


def adapter_path(folder: Path, task: str) -> Path:
    """Where the adapter of a task lies in the folder of a merge."""
    return folder / ADAPTERS / f"{task}.safetensors"


def write_task_adapter(path: Path, adapter: TaskAdapter) -> None:
    """Write an adapter, in float32 (raises UserError if a number is not finite)."""
    import torch
    from safetensors.torch import save

    tensors = {
        name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in adapter.tensors.items()
    }
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise UserError(
            f"the adapter of '{adapter.task}' is not finite; use more examples, or a larger ridge"
        )
    facts = {"kind": adapter.kind, "model": adapter.model, "task": adapter.task}
    write_bytes(path, save(tensors, {_METADATA: json.dumps(facts, sort_keys=True)}))


def read_task_adapter(path: Path, task: str) -> TaskAdapter:
    """The adapter of a task.

    Raises:
        UserError: no such file, none of Mergeline's adapters of tasks, another task's, or a damaged one.
    """
    import torch

    checkpoint = open_checkpoint(path)
    text = checkpoint.metadata.get(_METADATA)
    if text is None:
        raise UserError(
            f"{path}: is no adapter of a task; `mergeline fit` makes one (linear_adapter, surgery)"
        )
    try:
        facts = parsed_json(text)
        kind, model, own = (str(facts[key]) for key in ("kind", "model", "task"))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: its description was damaged; copy it again") from None
    if own != task:
        raise UserError(f"{path}: is the adapter of '{own}', not of '{task}'; put each under its own name")
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    finite = all(t.is_floating_point() and bool(torch.isfinite(t).all()) for t in tensors.values())
    if kind not in get_args(Kind) or not finite or not _fits(kind, shapes):
        raise UserError(
            f"{path}: is no adapter of a known kind, or was damaged; copy it again, or fit it again"
        )
    return TaskAdapter(cast(Kind, kind), own, model, tensors, file=path)


def _fits(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether tensors of these shapes are those of a kind."""
    if kind == "smile":
        return upscaling.fits(shapes)
    if kind == "linear":
        width = shapes.get("offset", ())
        return len(width) == 1 and shapes == {"matrix": width * 2, "offset": width}
    places = {name.rpartition("/")[0] for name in shapes}
    if not places or (kind == "surgery") != (places == {""}) or len(shapes) != 2 * len(places):
        return False
    pairs = [[shapes.get(f"{p}/{part}" if p else part, ()) for part in ("down", "up")] for p in places]
    return all(len(down) == 2 and up == down[::-1] for down, up in pairs)


def task_adapters(folder: Path) -> dict[str, TaskAdapter]:
    """The adapters that lie beside a merge, by task; none for a single file, or where there are none.

    Raises:
        UserError: one of them is damaged, or was made for another task or another merge.
    """
    files = sorted((folder / ADAPTERS).glob("*")) if (folder / ADAPTERS).is_dir() else []
    found = {file.stem: read_task_adapter(file, file.stem) for file in files}
    if found:
        digest = open_checkpoint(folder).digest()
        for adapter in found.values():
            refuse_other_merge(adapter, digest)
    return found


def refuse_other_merge(adapter: TaskAdapter, digest: str) -> None:
    """Raises UserError unless an adapter was made for the merge of this digest."""
    if adapter.model != digest:
        raise UserError(
            f"{adapter.file}: was made for another merge ({adapter.model}) than this one ({digest}); fit it again"
        )
