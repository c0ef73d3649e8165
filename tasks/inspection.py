"""What is in a checkpoint or a family of them, and how two of them differ."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Sequence

from mergeline.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mergeline.merging.checkpoints.components import by_component, component_folders
from mergeline.merging.engine.inputs import files_of
from mergeline.merging.engine.places import refuse_file

if TYPE_CHECKING:
    from torch import Tensor


def describe(path: Path) -> dict[str, Any]:
    """Digest, size, dtypes and metadata of a checkpoint; tensors and bytes of each component, if it has several."""
    checkpoint = open_checkpoint(path)
    return {
        "path": str(path),
        "digest": checkpoint.digest(),
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.nbytes,
        "dtypes": dict(Counter(t.dtype for t in checkpoint.tensors.values())),
        "metadata": checkpoint.metadata,
        "components": _components(checkpoint),
    }


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
        read = [
            file for path in (base, *experts.values()) for file in (path, *files_of(open_checkpoint(path)))
        ]
        refuse_file(page, read, is_page, "page", force)
    found = family.describe_family(
        base,
        experts,
        ranks=ranks or family.RANKS,
        heads=heads,
        workers=workers,
        memory=memory,
        progress=progress,
    )
    if page:
        render_family(page, found)
    return found


def differences(a: Path, b: Path) -> dict[str, Any]:
    """How two checkpoints differ.

    differences: of each tensor that does, by name: `what` ("values", "shape", or "missing" in one of them), words that
    say more, and for values the `norm` of the difference, `relative` to the norm in `a`, and the `largest` difference.
    norm, relative_norm: of all tensors that both have in one shape. Numbers that are not finite are None.
    """
    left, right = open_checkpoint(a), open_checkpoint(b)
    names = sorted(left.tensors.keys() | right.tensors.keys())
    rows: list[dict[str, Any]] = []
    squares = base_squares = 0.0
    for name in names:
        x, y = left.tensors.get(name), right.tensors.get(name)
        if x is None or y is None:
            rows.append({"tensor": name, "what": "missing", "words": f"only in {a if y is None else b}"})
        elif (x.dtype, x.shape) != (y.dtype, y.shape):
            words = f"{x.dtype} {list(x.shape)} against {y.dtype} {list(y.shape)}"
            rows.append({"tensor": name, "what": "shape", "words": words})
        else:
            old = left.read(name).double()
            base_squares += float(old.norm()) ** 2
            if left.tensor_hashes[name] != right.tensor_hashes[name]:
                delta = right.read(name).double() - old
                squares += float(delta.norm()) ** 2
                rows.append({"tensor": name, "what": "values", **_measured(delta, old)})
    return {
        "a": str(a),
        "b": str(b),
        "tensors": len(names),
        "differing": len(rows),
        "norm": _finite(math.sqrt(squares)),
        "relative_norm": _finite(_ratio(math.sqrt(squares), math.sqrt(base_squares))),
        "differences": rows,
    }


def _measured(delta: Tensor, old: Tensor) -> dict[str, float | None]:
    norm = float(delta.norm())
    largest = float(delta.abs().max())
    found = {"norm": norm, "relative": _ratio(norm, float(old.norm())), "largest": largest}
    return {key: _finite(value) for key, value in found.items()}


def _ratio(norm: float, base: float) -> float:
    return norm / base if base else math.inf if norm else 0.0


def _finite(value: float) -> float | None:
    """The number, or None where JSON has none for it."""
    return value if math.isfinite(value) else None
