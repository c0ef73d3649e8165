"""A device that is none: its tensors say that they lie elsewhere, hold their values here, and refuse to meet the CPU's.

Its name is `meta`, whose tensors need no driver and which autograd runs as it runs the CPU's. In a block of
`pretended_device()`, what is brought there or made there is a `Pretended`; an operation on tensors of both devices
raises, as it would with an accelerator, but for what PyTorch allows: copies from one to the other, numbers of no axis
beside tensors, and indices of the CPU.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Iterator, Sequence
from unittest.mock import patch

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mergeline.merging import api
from mergeline.merging.engine import output

DEVICE = "meta"
_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put_.default,
    _aten.index_put.default,
    _aten._index_put_impl_.default,
}
# The numbers of no axis that they take have to lie beside the rest.
_TOGETHER = {_aten.cat.default, _aten.stack.default}


class Mixed(RuntimeError):
    """Tensors of two devices met."""


class Pretended(torch.Tensor):
    """A tensor of the pretended device; `held` has its values, on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Pretended:
        own = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device(DEVICE), requires_grad=held.requires_grad,
        )  # fmt: skip
        own.held = held
        return own

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def numpy(self, **_: Any) -> Any:
        raise Mixed("a tensor of the device is no array of NumPy's; bring it to the CPU with .cpu() first")

    def new_tensor(self, data: Any, **given: Any) -> torch.Tensor:  # type: ignore[override]
        return Pretended(self.held.new_tensor(data, **given))

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Pretended({self.held!r})"


class _Mode(TorchDispatchMode):
    """Brings to the pretended device what is asked for there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def pretended_device() -> Iterator[str]:
    """In this block, tensors can be brought to the device whose name is given; merges take it for one that is here."""
    with ExitStack() as stack:
        for module in (api, output):
            stack.enter_context(patch.object(module, "check_device", lambda device: None))
        # Modes are of a thread; those of a pool end with it.
        stack.enter_context(patch.object(output, "own_stream", lambda device: _Mode().__enter__()))
        stack.enter_context(patch.object(torch, "empty", partial(_unpinned, torch.empty)))
        for make in (torch.tensor, torch.as_tensor):
            stack.enter_context(patch.object(torch, make.__name__, partial(_brought, make)))
        stack.enter_context(_Mode())
        yield DEVICE


def _unpinned(empty: Any, *sizes: Any, pin_memory: bool = False, **given: Any) -> torch.Tensor:
    """Without memory that only a driver can pin."""
    return empty(*sizes, **given)


def _brought(make: Any, data: Any, *, device: Any = None, **given: Any) -> torch.Tensor:
    """Numbers of Python go to `meta` past every mode, and are lost there."""
    made = make(data, **given)
    return made if device is None else made.to(device)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in given if isinstance(x, Pretended)]
    if there and len(there) < len(given):
        _refuse_mixing(func, args, [x for x in given if not isinstance(x, Pretended)], there)
    place = kwargs.get("device")
    asked = place is not None and torch.device(place).type == DEVICE
    to_there = asked or (place is None and bool(there))
    if func is _aten.copy_.default:
        to_there = isinstance(args[0], Pretended)
    if place is not None and (asked or there):
        kwargs = kwargs | {"device": torch.device("cpu")}
    inside = {id(x.held): x for x in there}
    args, kwargs = pytree.tree_map_only(Pretended, lambda x: x.held, (args, kwargs))
    found = func(*args, **kwargs)

    def outside(x: torch.Tensor) -> torch.Tensor:
        if id(x) in inside:  # what was changed in place stays the tensor that it is
            return inside[id(x)]
        # A copy to where a tensor lies already is the tensor itself; elsewhere it is none.
        return Pretended(x) if to_there else x

    return pytree.tree_map_only(torch.Tensor, outside, found)


def _refuse_mixing(func: Any, args: Any, here: Sequence[torch.Tensor], there: Sequence[torch.Tensor]) -> None:
    if func in _COPIES:
        return
    if func in _INDEXING:  # only where what is indexed lies there
        indices = [x for x in args[1] if x is not None]
        here = [x for x in here if not any(x is index for index in indices)]
        if isinstance(args[0], Pretended) and all(x.ndim == 0 for x in here):
            return
    elif func not in _TOGETHER and all(x.ndim == 0 for x in here):
        return
    shapes = [tuple(x.shape) for x in here], [tuple(x.shape) for x in there]
    raise Mixed(f"{func}: tensors of the CPU {shapes[0]} meet those of the device {shapes[1]}")
