"""Stacks: a model of runs of layers, each of which is merged, or taken as it is, from layers of the recipe's models.

Depth up-scaling, pruning, repeats, and slices of different models are all the same here: layer i of the output is made
of one layer of each of some models. Models of several towers have parts for each, by the names that these match. What
is read for a tensor stands under its name in the output, so that a merge goes on as any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, Mapping, Sequence

from mergeline.merging.architecture import Model, describe
from mergeline.merging.checkpoints.checkpoint import Checkpoint, TensorInfo
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.recipes.recipe import Part
from mergeline.merging.recipes.rules import matches


@dataclass(frozen=True)
class Stacked:
    """One tensor of the output: what it is made of.

    part: which. layer: of the part's `count` layers, from 0; None outside of layers. sources: of its experts.
    """

    part: int
    layer: int | None
    count: int
    sources: dict[str, TensorInfo]
    base: TensorInfo | None


@dataclass(frozen=True)
class Stack:
    """Where the tensors of the output come from.

    checkpoints: of the recipe, with the tensors that are read of each under their names in the output. layers: of each
    tower whose layers are moved ("" of whole models): model, and its layer, whose place in the configuration each layer
    of the output takes.
    rest: what no part is of, by its name in the base, whose it stays.
    """

    checkpoints: dict[str, Checkpoint]
    tensors: dict[str, Stacked]
    layers: dict[str, list[tuple[str, int]]]
    rest: dict[str, TensorInfo]


def stack(checkpoints: Mapping[str, Checkpoint], parts: Sequence[Part]) -> Stack:
    """Number the layers of all parts of a tower one after the other.

    Embeddings are made of what the first of these parts is, other tensors outside of layers (the last norm, the output
    matrix) of what the last is. A part that is alone in what it matches, and takes all layers of its models, may be of
    any tensors.

    Raises:
        UserError: an unknown model, layers that it lacks, parts that take more layers of one model than of another,
            tensors that not all have, parts whose layers stand in several towers or none, tensors of no part without a
            base.
    """
    _refuse_unknown(checkpoints, parts)
    used = {name: c for name, c in checkpoints.items() if any(name in part.spans for part in parts)}
    models = {name: describe({n: i.shape for n, i in c.tensors.items()}) for name, c in used.items()}
    groups = _groups(parts)
    owned = {name: _owned(checkpoint, list(groups)) for name, checkpoint in checkpoints.items()}
    tensors: dict[str, Stacked] = {}
    layers: dict[str, list[tuple[str, int]]] = {}
    for match, numbers in groups.items():
        own = {name: found[match] for name, found in owned.items()}
        made = _Group(parts, numbers, own, models)
        if made.is_whole:
            made.keep()
        else:
            layers["" if match == ("*",) else made.tower] = made.move()
        tensors |= made.tensors
    rest = _rest(checkpoints, owned, tensors)
    return Stack(_views(checkpoints, parts, tensors, rest), tensors, layers, rest)


def _groups(parts: Sequence[Part]) -> dict[tuple[str, ...], list[int]]:
    """The numbers of the parts that match the same names."""
    found: dict[tuple[str, ...], list[int]] = {}
    for number, part in enumerate(parts):
        found.setdefault(tuple(part.match), []).append(number)
    return found


_Tensors = dict[str, TensorInfo]


def _owned(
    checkpoint: Checkpoint, groups: Sequence[tuple[str, ...]]
) -> dict[tuple[str, ...] | None, _Tensors]:
    """The tensors of each group: of the last one that matches; None: of no group."""
    found: dict[tuple[str, ...] | None, _Tensors] = {None: {}, **{group: {} for group in groups}}
    for name, info in checkpoint.tensors.items():
        found[next((group for group in reversed(groups) if matches(group, name)), None)][name] = info
    return found


def _rest(
    checkpoints: Mapping[str, Checkpoint],
    owned: Mapping[str, Mapping[tuple[str, ...] | None, _Tensors]],
    made: Mapping[str, Stacked],
) -> _Tensors:
    """What no part is of (raises UserError without a base, and where it has the name of what is made)."""
    rest = sorted({name for found in owned.values() for name in found[None]})
    if rest and "base" not in checkpoints:
        raise UserError(
            f"stack: {len(rest)} tensors are of no part, '{rest[0]}' first, and there is no base to take them from"
        )
    if taken := next((name for name in rest if name in made), None):
        raise UserError(
            f"stack: parts make '{taken}', which they do not match; match whole towers, such as 'encoder.*'"
        )
    return dict(owned["base"][None]) if rest else {}


class _Group:
    """The parts of one tower, or of whatever the same names match.

    own: the tensors of each checkpoint that are of these parts. tensors: of the output.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        numbers: Sequence[int],
        own: Mapping[str, _Tensors],
        models: Mapping[str, Model],
    ):
        self.parts, self.numbers, self.own, self.models = parts, numbers, own, models
        self.tensors: dict[str, Stacked] = {}
        self.spans = {number: parts[number].spans for number in numbers}
        used = dict.fromkeys(name for spans in self.spans.values() for name in spans)
        self.towers = {
            name: {models[name].tensors[tensor].tower for tensor in own[name]} - {None} for name in used
        }

    @property
    def is_whole(self) -> bool:
        """Whether this is one part of whole models, which may have any towers."""
        whole = all(span == (0, -1) for spans in self.spans.values() for span in spans.values())
        return whole and len(self.numbers) == 1 and any(len(towers) != 1 for towers in self.towers.values())

    @property
    def tower(self) -> str:
        towers = {tower for found in self.towers.values() for tower in found if tower is not None}
        if len(towers) != 1 or not all(self.towers.values()):
            found = ", ".join(sorted(towers)) or "none"
            raise UserError(f"stack: all models need their layers in one tower of one name; found {found}")
        return towers.pop()

    def _add(
        self, name: str, number: int, layer: int | None, count: int, found: Mapping[str, TensorInfo]
    ) -> None:
        part = self.parts[number]
        sources = {expert: found[expert] for expert in part.experts}
        base = found.get(part.origin or "")
        self.tensors[name] = Stacked(number, layer, count, sources or _alone(part, found), base)

    def keep(self) -> None:
        """All tensors, where they are."""
        [number] = self.numbers
        own = {name: self.own[name] for name in self.spans[number]}
        model = self.models[next(iter(own))]
        for name in _names(number, own):
            role = model.tensors[name]
            count = model.layers.get(role.tower or "", 0)
            self._add(name, number, role.layer, count, {expert: infos[name] for expert, infos in own.items()})

    def move(self) -> list[tuple[str, int]]:
        """Number the layers anew; returns whose layer each is."""
        tower = self.tower
        layers: list[tuple[str, int]] = []
        for number in self.numbers:
            ranges = {
                name: _layers(number, name, span, self.models[name].layers[tower])
                for name, span in self.spans[number].items()
            }
            counts = {name: len(found) for name, found in ranges.items()}
            if len({*counts.values()}) > 1:
                raise UserError(
                    f"{_which(number)}: takes {_counted(counts)} layers; take equally many of each model"
                )
            count = next(iter(counts.values()))
            for layer in range(count):
                taken = {name: found[layer] for name, found in ranges.items()}
                own = {name: dict(_of_layer(self.own[name], tower, i)) for name, i in taken.items()}
                for rest in _names(number, own):
                    found = {name: infos[rest] for name, infos in own.items()}
                    self._add(f"{tower}{len(layers)}.{rest}", number, layer, count, found)
                donor = self.parts[number].origin or self.parts[number].experts[0]
                layers.append((donor, taken[donor]))
        for number, before in ((self.numbers[0], True), (self.numbers[-1], False)):
            own = {
                name: dict(_outside(self.own[name], self.models[name], before)) for name in self.spans[number]
            }
            for name in _names(number, own):
                self._add(name, number, None, 0, {model: infos[name] for model, infos in own.items()})
        return layers


def _alone(part: Part, found: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """A part of nothing but a base is that."""
    assert part.origin is not None, "a part names a model"
    return {part.origin: found[part.origin]}


def _views(
    checkpoints: Mapping[str, Checkpoint],
    parts: Sequence[Part],
    tensors: Mapping[str, Stacked],
    rest: _Tensors,
) -> dict[str, Checkpoint]:
    own: dict[str, _Tensors] = {name: dict(rest) if name == "base" else {} for name in checkpoints}
    for name, made in tensors.items():
        for model, info in made.sources.items():
            own[model][name] = info
        if made.base:
            own[parts[made.part].origin or ""][name] = made.base
    return {name: checkpoint.view(own[name]) for name, checkpoint in checkpoints.items()}


def _which(number: int) -> str:
    return f"stack: part {number + 1}"


def _refuse_unknown(checkpoints: Mapping[str, Checkpoint], parts: Sequence[Part]) -> None:
    """Raises UserError for a model that is none of the recipe's."""
    for number, part in enumerate(parts):
        for name in part.spans:
            if name not in checkpoints:
                what = "the recipe has no base" if name == "base" else f"no expert is named '{name}'"
                raise UserError(f"{_which(number)}: {what}{did_you_mean(name, checkpoints)}")


def _layers(number: int, name: str, span: tuple[int, int], count: int) -> range:
    first, last = (layer + count if layer < 0 else layer for layer in span)
    if not 0 <= first <= last < count:
        raise UserError(f"{_which(number)}: layers {list(span)} of '{name}', which has {count}")
    return range(first, last + 1)


def _counted(counts: Mapping[str, int]) -> str:
    return " and ".join(f"{count} of '{name}'" for name, count in counts.items())


def _of_layer(tensors: _Tensors, tower: str, layer: int) -> Iterator[tuple[str, TensorInfo]]:
    start = f"{tower}{layer}."
    for name, info in tensors.items():
        if name.startswith(start):
            yield name.removeprefix(start), info


def _outside(tensors: _Tensors, model: Model, before: bool) -> Iterator[tuple[str, TensorInfo]]:
    for name, info in tensors.items():
        role = model.tensors[name]
        if role.layer is None and role.before_layers == before:
            yield name, info


def _names(number: int, own: Mapping[str, Mapping[str, TensorInfo]]) -> list[str]:
    """The tensors that all models of a part have (raises UserError for one that some lack)."""
    names = sorted({name for infos in own.values() for name in infos})
    for model, infos in own.items():
        if lacking := [name for name in names if name not in infos]:
            raise UserError(
                f"{_which(number)}: '{model}' lacks {len(lacking)} tensor(s) that others have, first '{lacking[0]}'"
            )
    return names
