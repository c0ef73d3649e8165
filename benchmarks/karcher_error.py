"""The error of a Karcher mean in bfloat16 against one computed in float64.

The error is relative and Frobenius: ||output - reference|| / ||reference||. Rounding a perfect result to
bfloat16 costs about 1.66e-3 by itself, so that is the floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from compare import Tensors
from torch import Tensor


def karcher_mean(tensors: Sequence[Tensor], tolerance: float = 1e-14, iterations: int = 200) -> Tensor:
    """The equally weighted Karcher mean of directions on the sphere, times the mean norm, in float64."""
    flat = [t.double().flatten() for t in tensors]
    norms = [t.norm() for t in flat]
    units = [t / n for t, n in zip(flat, norms)]
    mean = sum(units) / len(units)
    mean = mean / mean.norm()
    before = float("inf")
    for _ in range(iterations):
        tangent = torch.zeros_like(mean)
        for unit in units:
            cosine = torch.dot(mean, unit).clamp(-1, 1)
            across = unit - cosine * mean
            sine = across.norm()  # acos loses half the digits near 1: take the angle from both sides
            if sine > 0:
                tangent += across * (torch.atan2(sine, cosine) / sine) / len(units)
        step = tangent.norm()
        if step < tolerance or step >= before:  # as near as float64 comes
            break
        before = step
        mean = torch.cos(step) * mean + torch.sin(step) * (tangent / step)
        mean = mean / mean.norm()
    return (mean * (sum(norms) / len(norms))).reshape(tensors[0].shape)


def karcher_error(experts: Sequence[Path], output: Path) -> float:
    """The largest error over a few matrices of the model, one of each shape."""
    inputs, merged = [Tensors(path) for path in experts], Tensors(output)
    chosen: dict[torch.Size, str] = {}
    for name in merged.names():
        if merged[name].ndim == 2:
            chosen.setdefault(merged[name].shape, name)
    errors = []
    for name in chosen.values():
        reference = karcher_mean([expert[name] for expert in inputs])
        errors.append(float((merged[name].double() - reference).norm() / reference.norm()))
    return max(errors)
