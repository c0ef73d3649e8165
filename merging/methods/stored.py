"""How a method that gives one expert back is kept for all of them, in a compressed store (`merging.compress`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Iterator, Literal, NamedTuple

from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Stored = Literal["float32", "float16", "bfloat16"]


class Part(NamedTuple):
    """What is kept as one tensor, in the shape that it has for a whole tensor.

    kind: `number`, in the dtype of `stored_dtype`; `exact`, what an expert itself holds, in its own; `bits`, a mask;
    `fact`, a number of each expert that the method's look at the model found, the same for all tensors. of_group: it is
    the same for all matrices of a group, and kept with one of them.
    """

    kind: Literal["number", "exact", "bits", "fact"]
    shape: tuple[int, ...] = ()
    of_group: bool = False


Parts = tuple[dict[str, Part], dict[str, Part]]  # kept once, and of each expert
Encoded = tuple[dict[str, "Tensor"], Iterator[dict[str, Any]]]


class Store(NamedTuple):
    """What a method keeps of a tensor that it treats, and how it reads that again.

    parts(shape, experts, **params): what is kept, once and of every expert: names to `Part`s.
    encode(x, [merge,] tasks, **params): the parts of a block, once and of each task, made when they are asked for.
    decode(once, own, shape, dtype, **params): what the method returns for the block (X) of that shape, in float64 or
    the dtype that the block is computed in.
    other: the same of tensors that are no matrices to the method, where decode gives the weights themselves.
    group(name, found): of a matrix the names of those that have parts in common with it, of what the method's look at
        the model found; parts is then told how many these are, as `together`.
    """

    parts: Callable[..., Parts]
    encode: Callable[..., Encoded]
    decode: Callable[..., Tensor]
    other: Store | None = None
    group: Callable[[str, Any], list[str]] | None = None


WHOLE = Store(  # of each expert as it is
    lambda shape, experts, **_: ({}, {"whole": Part("exact", tuple(shape))}),
    lambda x, tasks, **_: ({}, ({"whole": x.experts[t]} for t in tasks)),
    lambda once, own, shape, dtype, **_: own["whole"].to(dtype),
)


def stored_dtype(x: Slot, stored: Stored | None) -> torch.dtype:
    """What numbers of a store are kept in: the dtype asked for, or what the tensor is read as."""
    return getattr(torch, stored) if stored else x.dtype


def given_back(store: Store, x: Slot, *inner: Any, task: int, **params: Any) -> Tensor:
    """What a method of stores returns for expert number `task`: encoded and read again."""
    once, own = store.encode(x, *inner, [task], **params)
    return store.decode(once, next(iter(own)), x.shape, x.dtype, **params)
