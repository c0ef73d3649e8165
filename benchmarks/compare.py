"""How two merged checkpoints differ, tensor by tensor: `python compare.py A B`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


class Tensors:
    """A checkpoint, a file or a folder of safetensors, read one tensor at a time."""

    def __init__(self, path: Path) -> None:
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        self._file = {name: f for f in files for name in safe_open(f, "pt").keys()}

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._file[name], "pt") as file:
            return file.get_tensor(name)

    def names(self) -> Iterable[str]:
        return self._file.keys()


@dataclass(frozen=True)
class Difference:
    """How far b is from a.

    ulps: the largest distance, counted in representable numbers of the dtype. apart: the share of elements
    that are not the same; beyond: more than one such number apart. relative: ||b - a|| / ||a|| over all tensors
    (Frobenius). update: the same of the updates from the base, ||b - a|| / ||a - base||, if a base was given.
    largest: the largest absolute difference.
    """

    ulps: int
    apart: float
    beyond: float
    relative: float
    update: float | None
    largest: float


def difference(a: Path, b: Path, base: Path | None = None) -> Difference:
    """Compare checkpoint b with a; both hold the same tensors in the same dtypes."""
    left, right = Tensors(a), Tensors(b)
    origin = Tensors(base) if base else None
    if set(left.names()) != set(right.names()):
        raise ValueError(f"different tensors: {sorted(set(left.names()) ^ set(right.names()))[:5]}")
    ulps = apart = beyond = elements = 0
    squares = norm = moved = largest = 0.0
    for name in left.names():
        x, y = left[name], right[name]
        if x.dtype != y.dtype or x.shape != y.shape:
            raise ValueError(f"{name}: {x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}")
        if not x.is_floating_point():
            continue
        distance = (_ordinal(x) - _ordinal(y)).abs_()
        ulps = max(ulps, int(distance.max()))
        apart += int(distance.count_nonzero())
        beyond += int((distance > 1).count_nonzero())
        elements += x.numel()
        x64 = x.double()
        delta = y.double().sub_(x64)
        squares += float(delta.square().sum())
        largest = max(largest, float(delta.abs().max()))
        norm += float(x64.square().sum())
        if origin:
            moved += float(x64.sub_(origin[name]).square().sum())
    update = math.sqrt(squares / moved) if moved else None
    return Difference(ulps, apart / elements, beyond / elements, math.sqrt(squares / norm), update, largest)


def _ordinal(x: Tensor) -> Tensor:
    """Integers in the order of the floats: neighbours are 1 apart, and both zeros are 0."""
    kind = _BITS[x.dtype]
    bits = x.contiguous().view(kind).long()
    return torch.where(bits < 0, torch.iinfo(kind).min - bits, bits)


def main() -> None:
    found = difference(*map(Path, sys.argv[1:]))
    print(json.dumps(found.__dict__, indent=1))


if __name__ == "__main__":
    main()
