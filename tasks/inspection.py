"""What is in a checkpoint or a family of them, and how two of them differ; of remote ones from their headers alone."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Sequence

from mergeline.merging.architecture import describe_all
from mergeline.merging.checkpoints.carried import carried_files
from mergeline.merging.checkpoints.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from mergeline.merging.checkpoints.components import by_component, component_folders, configurations
from mergeline.merging.checkpoints.quantised.formats import dequantised
from mergeline.merging.checkpoints.remote import refuse_changed_remotes, remote_source
from mergeline.merging.engine.inputs import files_of, places_of
from mergeline.merging.engine.places import refuse_file
from mergeline.merging.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def describe(path: Path, *, values: bool = True, beside: Sequence[str] | None = None) -> dict[str, Any]:
    """What a checkpoint is: all of `mergeline inspect`, as JSON values.

    digest: None where values are not read. dtypes: how many tensors have each, as they are stored. architecture: the
    id of its row in the catalogue, `unknown` if names fit none; layers: how many each tower has. components: tensors
    and bytes of each, if it has several. companions: files that go with the weights; unread: those of them that lie
    elsewhere and were not brought. notes: what is read otherwise than it is stored, or cannot be read. table: of each
    tensor, as it is stored, `tensor`, `dtype`, `shape`, and its `role` in the model, None where it is read as part of
    another.

    Args:
        path: a file or a folder; it may be one of headers alone.
        values: whether all data is read, for the digest.
        beside: names of the files that lie beside remote weights; None: those of the folder.

    Raises:
        UserError: what `open_checkpoint` refuses; values that cannot be read, or changed meanwhile.
    """
    checkpoint = open_checkpoint(path)
    digest = checkpoint.digest() if values else None
    if values:
        refuse_changed_remotes(files_of(checkpoint))
    read, notes = _as_it_is_read(checkpoint)
    configs = configurations(path) if path.is_dir() else {"": {}}
    model = describe_all({name: info.shape for name, info in read.tensors.items()}, configs)
    companions = [*(carried_files(path) if path.is_dir() else ())] if beside is None else beside
    return {
        "path": _shown(path),
        "digest": digest,
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.nbytes,
        "dtypes": dict(Counter(t.dtype for t in checkpoint.tensors.values())),
        "architecture": model.architecture,
        "layers": {tower.rstrip("."): count for tower, count in model.layers.items()},
        "metadata": checkpoint.metadata,
        "components": _components(checkpoint),
        "companions": sorted(companions),
        "unread": sorted(name for name in companions if not (path / name).is_file()),
        "notes": notes,
        "table": [
            {
                "tensor": info.name,
                "dtype": info.dtype,
                "shape": list(info.shape),
                "role": model.tensors[info.name].role if info.name in model.tensors else None,
            }
            for info in checkpoint.tensors.values()
        ],
    }


def _as_it_is_read(checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """A checkpoint as a merge would read it, or as it is stored where none could; and sentences on what is so."""
    try:
        read, notes = dequantised(checkpoint)
    except UserError as error:
        return checkpoint, [*checkpoint.notes, f"cannot be merged: {error}"]
    return read, [*checkpoint.notes, *notes]


def _shown(path: Path) -> str:
    """What the headers of a folder are of, or the path."""
    return remote_source(path) or str(path)


def _components(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    parts = component_folders(checkpoint.path) if checkpoint.path.is_dir() else []
    return {
        prefix.rstrip("/") or ".": {
            "tensors": len(names),
            "bytes": sum(checkpoint.tensors[name].nbytes for name in names),
        }
        for prefix, names in by_component(checkpoint.tensors, parts).items()
        if parts
    }


def describe_family(
    base: Path,
    experts: dict[str, Path],
    page: Path | None,
    *,
    force: bool = False,
    ranks: Sequence[float] | None,
    heads: Sequence[str] = (),
    composition: bool = False,
    workers: int | None,
    memory: int | None,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """What `merging.describe.describe_family` finds, and the same as an HTML page if one is wanted.

    Raises:
        UserError: as there; the page would replace an input, or what is no page of Mergeline's, without `force`.
    """
    from mergeline.evaluation.pages.family import render_family
    from mergeline.evaluation.pages.page import is_page
    from mergeline.merging import describe as family

    if page:
        refuse_file(page, places_of([base, *experts.values()]), is_page, "page", force)
    found = family.describe_family(
        base,
        experts,
        ranks=ranks or family.RANKS,
        heads=heads,
        composition=composition,
        workers=workers,
        memory=memory,
        progress=progress,
    )
    refuse_changed_remotes(f for path in (base, *experts.values()) for f in files_of(open_checkpoint(path)))
    found["base"] = _shown(base)
    if page:
        render_family(page, found)
    return found


def differences(a: Path, b: Path, *, values: bool = True) -> dict[str, Any]:
    """How two checkpoints differ.

    differences: of each tensor that does, by name: `what` ("values", "dtype", "shape", or "missing" in one of them),
    words that say more, and of one shape the `norm` of the difference, `relative` to the norm in `a`, and the `largest`
    difference. norm, relative_norm: of all tensors that both have in one shape. Numbers that are not finite are None.

    Without `values` headers alone are compared: unread, how many tensors are of one shape in both and may differ;
    unread_bytes, their size in the first; norm and relative_norm are None.

    Raises:
        UserError: what `open_checkpoint` refuses; values that cannot be read, or changed meanwhile.
    """
    left, right = open_checkpoint(a), open_checkpoint(b)
    names = sorted(left.tensors.keys() | right.tensors.keys())
    rows: list[dict[str, Any]] = []
    unread: list[TensorInfo] = []
    squares = base_squares = 0.0
    for name in names:
        x, y = left.tensors.get(name), right.tensors.get(name)
        if x is None or y is None:
            words = f"only in {_shown(a if y is None else b)}"
            rows.append({"tensor": name, "what": "missing", "words": words})
        elif x.shape != y.shape:
            words = f"{x.dtype} {list(x.shape)} against {y.dtype} {list(y.shape)}"
            rows.append({"tensor": name, "what": "shape", "words": words})
        else:
            same = x.dtype == y.dtype
            row = {"tensor": name, "what": "values"}
            row |= {} if same else {"what": "dtype", "words": f"{x.dtype} against {y.dtype}"}
            if not values:
                unread.append(x)
                rows += [] if same else [row]
                continue
            old, new = left.read(name), right.read(name)
            base_squares += float(old.double().norm()) ** 2
            if not (same and _same_bytes(old, new)):
                delta = new.double() - old.double()
                squares += float(delta.norm()) ** 2
                rows.append({**row, **_measured(delta, old.double())})
    if values:
        refuse_changed_remotes([*files_of(left), *files_of(right)])
    norm, base_norm = math.sqrt(squares), math.sqrt(base_squares)
    return {
        "a": _shown(a),
        "b": _shown(b),
        "tensors": len(names),
        "differing": len(rows),
        "unread": len(unread),
        "unread_bytes": sum(info.nbytes for info in unread),
        "norm": _finite(norm) if values else None,
        "relative_norm": _finite(_ratio(norm, base_norm)) if values else None,
        "differences": rows,
    }


def _same_bytes(x: Tensor, y: Tensor) -> bool:
    import torch

    return torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (x, y)))


def _measured(delta: Tensor, old: Tensor) -> dict[str, float | None]:
    norm = float(delta.norm())
    largest = float(delta.abs().max()) if delta.numel() else 0.0
    found = {"norm": norm, "relative": _ratio(norm, float(old.norm())), "largest": largest}
    return {key: _finite(value) for key, value in found.items()}


def _ratio(norm: float, base: float) -> float:
    return norm / base if base else math.inf if norm else 0.0


def _finite(value: float) -> float | None:
    """The number, or None where JSON has none for it."""
    return value if math.isfinite(value) else None
