"""Task vectors as a fit reads them twice a step: a block at a time into memory that is there, from files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterator, Protocol, Sequence

from mergeline.merging.algebra.slots import View
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 18  # elements at a time: base and expert stay in a core's cache
_SMALL = 1 << 13  # elements of tensors whose task vectors are kept: most tensors, and a hundredth of a model


class Reader(Protocol):
    """Checkpoints that are merged."""

    experts: Sequence[str]

    def read_into(self, out_X: Tensor, origin: str, name: str, start: int) -> None:
        """Elements from `start` on of a tensor of an expert or the `base`, as many as there is place for."""
        ...


class TaskVectors:
    """Experts minus base, tensor by tensor; D experts, X the elements of a flattened tensor."""

    def __init__(self, inputs: Reader, dtype: torch.dtype):
        self._inputs, self._dtype = inputs, dtype
        self._base_X, self._tau_X = torch.empty(2, _BLOCK, dtype=dtype)
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    def put(self, view: View, c_D: Tensor, into_X: Tensor, multiplier_X: Tensor | None = None) -> None:
        """Write base + multiplier * sum of c * task vector."""
        if view.elements <= _SMALL:
            base_X, tau_DX = self._small(view)
            update_X = c_D @ tau_DX
            torch.add(base_X, update_X if multiplier_X is None else update_X * multiplier_X, out=into_X)
            return
        factors = c_D.tolist()
        for part, base_X, taus in self._blocks(view):
            out_X = into_X[part].zero_()
            for factor, tau_X in zip(factors, taus, strict=True):
                out_X.add_(tau_X, alpha=factor)
            if multiplier_X is not None:
                out_X.mul_(multiplier_X[part])
            out_X.add_(base_X)

    def along(self, view: View, gradient_X: Tensor) -> Tensor:
        """The inner product of every task vector with a gradient: (D,)."""
        if view.elements <= _SMALL:
            return self._small(view)[1] @ gradient_X
        found = [0.0] * len(self._inputs.experts)
        for part, _, taus in self._blocks(view):
            for d, tau_X in enumerate(taus):
                found[d] += float(torch.dot(tau_X, gradient_X[part]))
        return torch.tensor(found, dtype=self._dtype)

    def _small(self, view: View) -> tuple[Tensor, Tensor]:
        """The base (X) and the task vectors (D, X) of a tensor that is one block."""
        if view.name not in self._kept:
            [(_, base_X, taus)] = self._blocks(view)
            self._kept[view.name] = base_X.clone(), torch.stack([tau_X.clone() for tau_X in taus])
        return self._kept[view.name]

    def _blocks(self, view: View) -> Iterator[tuple[slice, Tensor, Iterator[Tensor]]]:
        """Blocks of a tensor: their place, the base and the task vectors there, each until the next is asked for."""
        name = view.stored_name

        def taus(start: int, base_X: Tensor, tau_X: Tensor) -> Iterator[Tensor]:
            for expert in self._inputs.experts:
                self._inputs.read_into(tau_X, expert, name, start)
                yield tau_X.sub_(base_X)

        for start in range(0, view.elements, _BLOCK):
            size = min(_BLOCK, view.elements - start)
            base_X, tau_X = self._base_X[:size], self._tau_X[:size]
            self._inputs.read_into(base_X, "base", name, start)
            yield slice(start, start + size), base_X, taus(start, base_X, tau_X)
