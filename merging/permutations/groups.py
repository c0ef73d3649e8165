"""What of a model may stand in another order without a change of what it computes, and putting it there.

A group is units that move together wherever they are counted: channels, hidden units of an MLP, heads of an attention.
Units may have parts that are in any order among themselves: the heads that share keys and values, the dimensions of a
head. All is read off the labels of `architecture`.

Shape suffixes: U units, R parts of each, L the indices of a dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Iterator, Mapping, NamedTuple, Sequence

from mergeline.merging.architecture import RUNNING_STATISTICS, Model, Role, TensorRole
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY = "vocabulary"  # the label of rows by token, whose order the tokenizer tells
_VALUES = (Role.VALUE, Role.ATTENTION_OUTPUT)
_SCORES = (Role.QUERY, Role.KEY)


def kind_of(group: str) -> str:
    """The last part of a group's name."""
    return group.rpartition(".")[2]


def activation_keys(group: Group) -> list[str]:
    """What the tensors are called that say how alike the units, and the parts of each split, are on examples."""
    return [f"{group.name}/{part}" for part in ("units", *range(len(group.splits)))]


@dataclass(frozen=True)
class Place:
    """Where the things of a group are counted: a stretch of a dimension of a tensor, as wide for each of them.

    weighs: whether the numbers there say which units are alike; running statistics only move along.
    """

    name: str
    axis: int
    start: int
    length: int
    weighs: bool = True

    def rows(self, tensor: Tensor, count: int) -> Tensor:
        """What a tensor has of each of `count` things, (count, ...) flattened."""
        return tensor.narrow(self.axis, self.start, self.length).movedim(self.axis, 0).reshape(count, -1)


@dataclass(frozen=True)
class Split:
    """Parts of each unit that are in any order among themselves. size: R, of each unit."""

    size: int
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Group:
    """Units that move together. places: where they are whole; splits: where their parts have orders of their own."""

    name: str
    units: int
    places: tuple[Place, ...]
    splits: tuple[Split, ...] = ()

    @property
    def kind(self) -> str:
        """The last part of its name: hidden, heads, residual, conv1 ..."""
        return kind_of(self.name)

    @property
    def counted(self) -> Iterator[tuple[Place, int, int]]:
        """All places: how many things are counted there, and by which of an `Order`'s tensors."""
        yield from ((place, self.units, 0) for place in self.places)
        for i, split in enumerate(self.splits, 1):
            yield from ((place, self.units * split.size, i) for place in split.places)

    @property
    def counts(self) -> list[int]:
        """How many things each of an `Order`'s tensors is of: the units, and the parts of each split."""
        return [self.units, *(self.units * split.size for split in self.splits)]

    @property
    def tensors(self) -> list[str]:
        """The names of what moves."""
        return list(dict.fromkeys(place.name for place, _, _ in self.counted))


class Order(NamedTuple):
    """An order of a group's units and of the parts of each: indices (U), and (U * R) for each split.

    Index i says what of a model is put at place i.
    """

    units: Tensor
    parts: tuple[Tensor, ...] = ()

    @property
    def all(self) -> tuple[Tensor, ...]:
        return (self.units, *self.parts)

    @property
    def moved(self) -> int:
        """How many units are put elsewhere, or have parts that are."""
        stays = torch.ones(len(self.units), dtype=torch.bool)
        for order in self.all:
            same = order == torch.arange(len(order))
            stays &= same.reshape(len(self.units), -1).all(1)
        return int((~stays).sum())

    def then(self, after: Order) -> Order:
        """This order, and `after` of what it gives."""
        return Order(*_joined([a[b] for a, b in zip(self.all, after.all)]))

    def undone(self) -> Order:
        """The order that puts everything back."""
        return Order(*_joined([order.argsort() for order in self.all]))


def _joined(orders: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    return orders[0], tuple(orders[1:])


Orders = dict[str, Order]  # by the group's name


def kept_order(group: Group) -> Order:
    """The order of a group in which nothing moves."""
    return Order(
        torch.arange(group.units), tuple(torch.arange(group.units * split.size) for split in group.splits)
    )


def random_order(group: Group, generator: torch.Generator) -> Order:
    """An order drawn at random."""
    units_U = torch.randperm(group.units, generator=generator)
    parts = []
    for split in group.splits:
        inner_UR = torch.stack([torch.randperm(split.size, generator=generator) for _ in range(group.units)])
        parts.append((units_U[:, None] * split.size + inner_UR).reshape(-1))
    return Order(units_U, tuple(parts))


def reordered(
    tensors: Mapping[str, Tensor], groups: Sequence[Group], orders: Mapping[str, Order]
) -> dict[str, Tensor]:
    """All tensors of a model with its units in another order; those that do not move are the same objects."""
    indices: dict[tuple[str, int], Tensor] = {}
    for group in groups:
        if group.name not in orders:
            continue
        order = orders[group.name].all
        for place, count, which in group.counted:
            key = place.name, place.axis
            if key not in indices:
                indices[key] = torch.arange(tensors[place.name].shape[place.axis])
            width = place.length // count
            moved_L = (order[which][:, None] * width + torch.arange(width)).reshape(-1)
            indices[key][place.start : place.start + place.length] = place.start + moved_L
    found = dict(tensors)
    for (name, axis), index_L in indices.items():
        if not torch.equal(index_L, torch.arange(len(index_L))):
            found[name] = found[name].index_select(axis, index_L.to(found[name].device))
    return found


# ------------------------------------------------------------------------------------------ from the description


def groups_of(model: Model) -> list[Group]:
    """The groups of a model, sorted by name; of one whose names and configuration say nothing, none."""
    members: dict[str, list[tuple[TensorRole, int]]] = {
        label: [] for label, units in model.units.items() if label.rpartition("/")[2] != VOCABULARY and units > 1
        or label.endswith(".heads")
    }  # fmt: skip
    for tensor in model.tensors.values():
        for axis, label in enumerate(tensor.axes):
            if label in members:
                members[label].append((tensor, axis))
    made = (
        _heads(label, model.units[label], found, "dimensions" in model.permutes)
        if label.endswith(".heads")
        else Group(label, model.units[label], tuple(p for t, axis in found for p in _places(t, axis)))
        for label, found in sorted(members.items())
    )
    return [group for group in made if group.units > 1 or group.splits]


def _places(tensor: TensorRole, axis: int) -> list[Place]:
    """A dimension, part by part of what is fused."""
    parts = tensor.parts if axis == tensor.outputs else 1
    length = tensor.shape[axis] // parts
    weighs = tensor.role not in RUNNING_STATISTICS
    return [Place(tensor.name, axis, part * length, length, weighs) for part in range(parts)]


def _heads(label: str, units: int, members: Sequence[tuple[TensorRole, int]], by_dimension: bool) -> Group:
    """The heads of an attention: with groups of queries, or with dimensions in any order, where these are known.

    by_dimension: whether the dimensions of queries and keys have no order, as rotated positions give them one.
    """
    by_role: dict[Role, list[Place]] = {role: [] for role in (*_SCORES, *_VALUES)}
    others: list[tuple[TensorRole, int]] = []
    for tensor, axis in members:
        role = tensor.of or tensor.role
        if role in by_role:
            by_role[role] += _places(tensor, axis)
        elif role is Role.QKV_THIRDS and tensor.parts == 3:
            for part, place in zip((Role.QUERY, Role.KEY, Role.VALUE), _places(tensor, axis)):
                by_role[part].append(place)
        else:
            others.append((tensor, axis))
    rest = [place for tensor, axis in others for place in _places(tensor, axis)]
    if not by_role[Role.QUERY] or not by_role[Role.KEY]:  # head by head in one tensor
        everything = [place for places in by_role.values() for place in places]
        return Group(label, units, (*everything, *rest))
    queries, keys = (by_role[role][0].length for role in _SCORES)
    if queries != keys:  # some heads share keys and values
        shared = [p for p in (*by_role[Role.KEY], *by_role[Role.VALUE])]
        own = [*by_role[Role.QUERY], *by_role[Role.ATTENTION_OUTPUT]]
        for (
            tensor,
            axis,
        ) in others:  # a norm of all keys is theirs; of all queries, or a number a head, the queries'
            (shared if tensor.role is Role.NORM and tensor.shape[axis] == keys else own).extend(
                _places(tensor, axis)
            )
        return Group(label, units, tuple(shared), (Split(queries // keys, tuple(own)),))
    scores, values = ([p for role in roles for p in by_role[role]] for roles in (_SCORES, _VALUES))
    width = keys // units
    if rest or width == 1:
        return Group(label, units, (*scores, *values, *rest))
    if by_dimension:
        return Group(label, units, (), (Split(width, tuple(scores)), Split(width, tuple(values))))
    return Group(label, units, tuple(scores), (Split(width, tuple(values)),))
