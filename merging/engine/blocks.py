"""What a merge makes of one tensor, block by block, for one or several points of a sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterator, Mapping, Sequence

from mergeline.merging.algebra.slots import Runner, View, Views, all_finite, by_stretch
from mergeline.merging.checkpoints.checkpoint import DTYPES
from mergeline.merging.checkpoints.writer import TensorSpec
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch
from mergeline.merging.methods.bound import Bound

if TYPE_CHECKING:
    from torch import Tensor


def look_at_model(bound: Bound, views: Sequence[View], runner: Runner, found: dict[Any, Any]) -> Any:
    """What the method's look at the model finds, or did for another point of the same setting: `found` keeps it."""
    setting = bound.look_setting, *(view.name for view in views)
    if setting not in found:
        found[setting] = bound.look_at_model(Views(views, runner))
    return found[setting]


def merged_blocks(view: View, bounds: Sequence[Bound], found: Sequence[Any]) -> Iterator[tuple[int, Tensor]]:
    """All blocks of a tensor, in order, as each point merges them, with the point's index.

    found: what each point's look at the model found. Points that see the same blocks share them.
    """
    view.shared = len(bounds) > 1
    alike: dict[Any, tuple[list[View], list[int]]] = {}
    for i, bound in enumerate(bounds):
        pieces = bound.pieces(view)
        key = (bound.unit(view),) if pieces[0] is view else tuple(piece.name for piece in pieces)
        alike.setdefault(key, (pieces, []))[1].append(i)
    for pieces, indexes in alike.values():
        if pieces[0] is not view:
            yield from _assembled(pieces, {i: bounds[i] for i in indexes}, found)
            continue
        looks = {i: bounds[i].look_at_tensor(view, found[i]) for i in indexes}
        for x in view.blocks(bounds[indexes[0]].unit(view)):
            for i, look in looks.items():
                yield i, bounds[i].weights(x, found[i], look)


def _assembled(
    pieces: Sequence[View], bounds: Mapping[int, Bound], found: Sequence[Any]
) -> Iterator[tuple[int, Tensor]]:
    """The same of a tensor of several matrices: of each stretch that holds some, once all of them are merged."""
    for slab, parts in by_stretch(pieces):
        stretches = {
            i: torch.empty(slab, dtype=torch.float64, device=pieces[0].source.device) for i in bounds
        }
        for piece in parts:
            looks = {i: bound.look_at_tensor(piece, found[i]) for i, bound in bounds.items()}
            for x in piece.blocks("tensor"):
                for i, bound in bounds.items():
                    piece.matrix.put(stretches[i], bound.weights(x, found[i], looks[i]).double())
        yield from stretches.items()


def rounded(value: Tensor, spec: TensorSpec) -> Tensor:
    """The one rounding, to the dtype that is written (raises UserError if it overflows)."""
    result = value.to(torch_dtype(spec))
    if not all_finite(result):
        raise UserError(
            f"tensor '{spec.name}' overflows {result.dtype}; choose a wider dtype or a smaller scale"
        )
    return result


def torch_dtype(spec: TensorSpec) -> torch.dtype:
    return getattr(torch, DTYPES[spec.dtype][0])
