"""Merging two models in part: units that are alike become one, the others stay beside one another, unit by unit.

PLeaS (Nasery et al. 2024, arXiv 2407.02447; SewoongLab/PLeaS-Merging). A model grows by as many units as stay apart: a
group of U units of which m stay has U + m. The official code keeps one unit merged even where none should be.

Shape suffixes: U units of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Mapping, Sequence

from mergeline.merging.lazy import torch
from mergeline.merging.permutations.groups import Group, Order

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """Which units of two models become one: those of `merged`, pair by pair; `apart` are each one's own."""

    merged: tuple[Tensor, Tensor]
    apart: tuple[Tensor, Tensor]

    @property
    def width(self) -> int:
        """How many units there are in the end."""
        return len(self.merged[0]) + len(self.apart[0]) + len(self.apart[1])


def blocks(order: Order, alike_UU: Tensor, ratio: float) -> Blocks:
    """Units in order of the first model; those pairs stay apart that are least alike. ratio: 0 merges all, 1 none."""
    units_U, all_U = order.units, torch.arange(len(order.units))
    found_U = alike_UU[all_U, units_U]
    stays_U = (
        found_U >= torch.quantile(found_U, ratio)
        if ratio < 1
        else torch.zeros_like(units_U, dtype=torch.bool)
    )
    return Blocks((all_U[stays_U], units_U[stays_U]), (all_U[~stays_U], units_U[~stays_U]))


def partly_merged(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    groups: Sequence[Group],
    found: Mapping[str, Blocks],
    outputs: Mapping[str, int],
) -> dict[str, Tensor]:
    """The tensors of the wider model, of groups whose units are whole: what is merged first, then a's own, then b's.

    A unit that is merged is the mean of two, and reads half of what either reads alone; one that stays apart reads
    what is merged, and what is apart of its own model. outputs: the axis of a tensor that counts what it gives, 0 if it
    is not named.
    """
    spread: list[dict[str, Tensor]] = [{n: t.double() for n, t in state.items()} for state in (a, b)]
    merged: dict[str, Tensor] = {
        name: torch.ones(()) for name in a
    }  # how many models an output is the mean of
    for group in groups:
        if group.splits:
            raise ValueError(f"{group.name}: its units have parts")
        own = found[group.name]
        for place in group.places:
            axis, size = place.axis, place.length // group.units
            if place.length != a[place.name].shape[axis]:
                raise ValueError(f"{place.name}: is of several parts")
            for model, state in enumerate(spread):
                state[place.name] = _spread(state[place.name], axis, size, own, model)
            if axis == outputs.get(place.name, 0):
                shape = [-1 if i == axis else 1 for i in range(a[place.name].ndim)]
                halves = torch.full((own.width,), 1.0)
                halves[: len(own.merged[0])] = 0.5
                merged[place.name] = halves.repeat_interleave(size).reshape(shape)
    touched = {name for name, share in merged.items() if share.ndim}
    result = {}
    for name, tensor in a.items():
        share = merged[name] if name in touched else torch.tensor(0.5)
        result[name] = (share * (spread[0][name] + spread[1][name])).to(tensor.dtype)
    return result


def _spread(tensor: Tensor, axis: int, size: int, own: Blocks, model: int) -> Tensor:
    """A model's tensor with its units where the wider model has them, and 0 where units are the other model's."""
    merged, apart, others = own.merged[model], own.apart[model], own.apart[1 - model]
    rows = tensor.movedim(axis, 0).unflatten(0, (-1, size))
    none = rows.new_zeros(len(others), *rows.shape[1:])
    parts = [rows[merged], rows[apart], none] if model == 0 else [rows[merged], none, rows[apart]]
    return torch.cat(parts).flatten(0, 1).movedim(0, axis)
