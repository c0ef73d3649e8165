"""A device that is none: its tensors say that they lie elsewhere, hold their values here, and refuse to meet the CPU's.

Its name is `meta`, whose tensors need no driver and which autograd runs as it runs the CPU's. In a block of
`pretended_device()`, what is brought there or made there is a `Pretended`; an operation on tensors of both devices
raises, as it would with an accelerator, but for what PyTorch allows: copies from one to the other, numbers of no axis
beside tensors, and indices of the CPU.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partialmethod
from threading import Thread
from typing import Any, Callable, Iterator, Sequence
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from mergeline.merging import api
from mergeline.merging.engine import output

DEVICE = "meta:0"
_PLACE = torch.device(DEVICE)
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
            device=_PLACE, requires_grad=held.requires_grad,
        )  # fmt: skip
        own.held = held
        return own

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})

    def numpy(self, **_: Any) -> Any:
        raise Mixed("a tensor of the device is no array of NumPy's; bring it to the CPU with .cpu() first")

    @property
    def data(self) -> torch.Tensor:
        return Pretended(self.held.detach())

    @data.setter  # type: ignore[override]
    def data(self, value: Pretended) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held = value.held

    def new_tensor(self, data: Any, **given: Any) -> torch.Tensor:  # type: ignore[override]
        return Pretended(self.held.new_tensor(data, **given))

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Pretended({self.held!r})"


class _Operations(TorchDispatchMode):
    """Brings to the pretended device what is asked for there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Makes tensors by way of operations, where PyTorch would make them of `meta` past those."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty:
            given.pop("pin_memory", None)  # which is asked of a driver
        place = given.pop("device", None) if func in (torch.tensor, torch.as_tensor) else None
        made = func(*args, **given)
        return made if place is None else made.to(place)


@contextmanager
def pretended_device() -> Iterator[str]:
    """In this block, tensors can be brought to the device whose name is given; merges take it for one that is here."""
    with ExitStack() as stack:
        for module in (api, output):
            stack.enter_context(patch.object(module, "check_device", lambda device: None))
        stack.enter_context(patch.object(output, "own_stream", lambda device: None))
        stack.enter_context(patch.object(Thread, "run", partialmethod(_run_thread, Thread.run)))
        stack.enter_context(patch.object(torch.cuda, "get_device_name", lambda device: "none"))
        # Views inside it of tensors from outside it are beyond tensors with a class of their own.
        for name in ("__enter__", "__exit__"):
            stack.enter_context(patch.object(torch.inference_mode, name, getattr(torch.no_grad, name)))
        # Else a module that is brought there has other parameters afterwards, and those that are tied are so no more.
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.enter_context(_Operations())
        stack.enter_context(_Functions())
        yield DEVICE


def _run_thread(thread: Thread, run: Callable[[Thread], None]) -> None:
    """Modes are of a thread."""
    with _Operations(), _Functions():
        run(thread)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = pytree.tree_leaves((args, kwargs))
    given = [x for x in leaves if isinstance(x, torch.Tensor)]
    there = [x for x in given if isinstance(x, Pretended)]
    if there and len(there) < len(given):
        _refuse_mixing(func, args, [x for x in given if not isinstance(x, Pretended)], there)
    place = kwargs.get("device")
    asked = place is not None and torch.device(place) == _PLACE
    to_there = asked or (place is None and bool(there))
    if (to_there or there) and any(isinstance(x, torch.Generator) for x in leaves):
        raise Mixed(f"{func}: a generator of the CPU draws for the device")
    if func is _aten.copy_.default:
        to_there = isinstance(args[0], Pretended)
    if place is not None and (asked or there):
        kwargs = kwargs | {"device": torch.device("cpu")}
    if torch.Tag.inplace_view in func.tags:  # the shape that is said changes, too
        with no_dispatch():
            func(*args, **kwargs)
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
