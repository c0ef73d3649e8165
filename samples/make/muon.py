"""Muon: momentum whose update is made nearly orthogonal. https://kellerjordan.github.io/posts/muon/"""

from __future__ import annotations

from collections import defaultdict
from typing import Sequence

import torch
from torch import Tensor

_MOMENTUM = 0.95
_WEIGHT_DECAY = 0.01
_COEFFICIENTS = (3.4445, -4.775, 2.0315)  # of the Newton-Schulz iteration
_ITERATIONS = 5


class Muon:
    """An optimiser for matrices. Matrices of equal shape are orthogonalised together."""

    def __init__(self, matrices: Sequence[Tensor], learning_rate: float) -> None:
        self._matrices = matrices
        self._learning_rate = learning_rate
        self._momenta = [torch.zeros_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update, at `factor` times the learning rate."""
        by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for matrix, momentum in zip(self._matrices, self._momenta):
            momentum.mul_(_MOMENTUM).add_(matrix.grad)
            update = matrix.grad + _MOMENTUM * momentum
            for part, change in zip(_parts(matrix), _parts(update)):
                if part.shape[0] > part.shape[1]:
                    part, change = part.t(), change.t()
                by_shape[tuple(part.shape)].append((part, change))
        for shape, pairs in by_shape.items():
            changes = _orthogonalised(torch.stack([change for _, change in pairs]))
            for (part, _), change in zip(pairs, changes):
                part.mul_(1 - self._learning_rate * factor * _WEIGHT_DECAY)
                part.add_(change, alpha=-self._learning_rate * factor * 0.2 * max(shape) ** 0.5)


def _parts(matrix: Tensor) -> Sequence[Tensor]:
    """Query, key and value of an attention's input matrix are three matrices."""
    return matrix.chunk(3 if matrix.shape[0] == 3 * matrix.shape[1] else 1)


def _orthogonalised(matrices: Tensor) -> Tensor:
    """(N, rows, columns), rows <= columns: singular values brought close to 1; computed in bfloat16."""
    a, b, c = _COEFFICIENTS
    x = (matrices / (matrices.flatten(1).norm(dim=1)[:, None, None] + 1e-7)).bfloat16()
    for _ in range(_ITERATIONS):
        square = x @ x.transpose(1, 2)
        x = a * x + (b * square + c * (square @ square)) @ x
    return x.float()
