"""What is in a checkpoint or a family of them, and how two of them differ."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Callable, Sequence

from merging.checkpoint import open_checkpoint


def describe(path: Path) -> dict[str, Any]:
    """Digest, size, dtypes and metadata of a checkpoint."""
    checkpoint = open_checkpoint(path)
    return {
        "path": str(path),
        "digest": checkpoint.digest(),
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.nbytes,
        "dtypes": dict(Counter(t.dtype for t in checkpoint.tensors.values())),
        "metadata": checkpoint.metadata,
    }


def describe_family(
    base: Path,
    experts: dict[str, Path],
    page: Path | None,
    *,
    ranks: Sequence[float] | None,
    workers: int | None,
    memory: int | None,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """What `merging.family.describe_family` finds, and the same as an HTML page if one is wanted."""
    from evaluation.family import render_family
    from merging import family

    found = family.describe_family(
        base, experts, ranks=ranks or family.RANKS, workers=workers, memory=memory, progress=progress
    )
    if page:
        render_family(page, found)
    return found


def differences(a: Path, b: Path) -> list[tuple[str, str]]:
    """Tensors that differ, with a few words on how."""
    left, right = open_checkpoint(a), open_checkpoint(b)
    rows = []
    for name in sorted(left.tensors.keys() | right.tensors.keys()):
        x, y = left.tensors.get(name), right.tensors.get(name)
        if x is None or y is None:
            rows.append((name, f"only in {a if y is None else b}"))
        elif (x.dtype, x.shape) != (y.dtype, y.shape):
            rows.append((name, f"{x.dtype} {list(x.shape)} against {y.dtype} {list(y.shape)}"))
        elif left.tensor_hashes[name] != right.tensor_hashes[name]:
            delta = left.read(name).double() - right.read(name).double()
            rows.append(
                (
                    name,
                    f"norm of the difference {float(delta.norm()):.4g}, largest {float(delta.abs().max()):.4g}",
                )
            )
    return rows
