"""Tensors that are computed from stored ones as they are read, and what a thread keeps of them between two readings."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Callable

from mergeline.merging.checkpoints.checkpoint import Files, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

Elements = Callable[[TensorInfo, int, int], "Tensor"]

_MOST_KEPT = 1 << 27  # bytes that a thread keeps of all tensors


class _Keepers(threading.local):
    """The tensors of which a thread keeps something, those it read last at the end."""

    def __init__(self) -> None:
        self.tensors: OrderedDict[int, ComputedTensor] = OrderedDict()

    def add(self, tensor: ComputedTensor) -> None:
        """Note a tensor that was read; others forget what they keep where all of it is too much."""
        self.tensors.pop(id(tensor), None)
        if vars(tensor._last):
            self.tensors[id(tensor)] = tensor
        while len(self.tensors) > 1 and sum(t.kept_bytes for t in self.tensors.values()) > _MOST_KEPT:
            vars(self.tensors.popitem(last=False)[1]._last).clear()


_KEEPERS = _Keepers()


def forget() -> None:
    """Let go of what this thread keeps of tensors that it did not read to their ends."""
    for tensor in _KEEPERS.tensors.values():
        vars(tensor._last).clear()
    _KEEPERS.tensors.clear()


Files.on_close.append(forget)


@dataclass(frozen=True)
class ComputedTensor(TensorInfo):
    """What `read` gives is computed; what is wanted again is kept in `_last`, which `_noted` bounds.

    _last: of a thread, by name pairs of what was computed or read, and the numbers.
    """

    _last: threading.local = field(default_factory=threading.local, repr=False, compare=False, kw_only=True)

    @property
    def kept_bytes(self) -> int:
        """What this thread keeps."""
        return sum(part.nbytes for _, part in vars(self._last).values())

    def _noted(self) -> None:
        """To be called at the end of a reading."""
        _KEEPERS.add(self)
