"""Stacks: a model of runs of layers, each of which is merged, or taken as it is, from layers of the recipe's models.

Depth up-scaling, pruning, repeats, and slices of different models are all the same here: layer i of the output is made
of one layer of each of some models. What is read for a tensor stands under its name in the output, so that a merge goes
on as any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, Mapping, Sequence

from mergeline.merging.architecture import Model, describe
from mergeline.merging.checkpoints.checkpoint import Checkpoint, TensorInfo
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.recipes.recipe import Part


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

    checkpoints: of the recipe, with the tensors that are read of each under their names in the output. layers: model,
    and its layer, whose place in the configuration each layer of the output takes.
    """

    checkpoints: dict[str, Checkpoint]
    tensors: dict[str, Stacked]
    layers: list[tuple[str, int]]


def stack(checkpoints: Mapping[str, Checkpoint], parts: Sequence[Part]) -> Stack:
    """Number the layers of all parts one after the other.

    Embeddings are made of what the first part is, other tensors outside of layers (the last norm, the output matrix) of
    what the last is.

    Raises:
        UserError: an unknown model, layers that it lacks, parts that take more layers of one model than of another,
            tensors that not all have, or models whose layers stand in several towers.
    """
    _refuse_unknown(checkpoints, parts)
    used = {name: c for name, c in checkpoints.items() if any(name in part.spans for part in parts)}
    models = {name: describe({n: i.shape for n, i in c.tensors.items()}) for name, c in used.items()}
    tower = _tower(models)
    tensors: dict[str, Stacked] = {}
    layers: list[tuple[str, int]] = []

    def add(name: str, number: int, layer: int | None, count: int, found: dict[str, TensorInfo]) -> None:
        base = found.get(parts[number].origin or "")
        sources = {expert: found[expert] for expert in parts[number].experts}
        tensors[name] = Stacked(number, layer, count, sources or _alone(parts[number], found), base)

    for number, part in enumerate(parts):
        ranges = {
            name: _layers(number, name, span, models[name].layers[tower]) for name, span in part.spans.items()
        }
        counts = {name: len(found) for name, found in ranges.items()}
        if len({*counts.values()}) > 1:
            raise UserError(
                f"{_which(number)}: takes {_counted(counts)} layers; take equally many of each model"
            )
        count = next(iter(counts.values()))
        for layer in range(count):
            taken = {name: found[layer] for name, found in ranges.items()}
            own = {name: dict(_of_layer(checkpoints[name], tower, i)) for name, i in taken.items()}
            for rest in _names(number, own):
                found = {name: infos[rest] for name, infos in own.items()}
                add(f"{tower}{len(layers)}.{rest}", number, layer, count, found)
            donor = part.origin or part.experts[0]
            layers.append((donor, taken[donor]))
    for number, before in ((0, True), (len(parts) - 1, False)):
        own = {name: dict(_outside(checkpoints[name], models[name], before)) for name in parts[number].spans}
        for name in _names(number, own):
            add(name, number, None, 0, {model: infos[name] for model, infos in own.items()})
    return Stack(_views(checkpoints, parts, tensors), tensors, layers)


def _alone(part: Part, found: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """A part of nothing but a base is that."""
    assert part.origin is not None, "a part names a model"
    return {part.origin: found[part.origin]}


def _views(
    checkpoints: Mapping[str, Checkpoint], parts: Sequence[Part], tensors: Mapping[str, Stacked]
) -> dict[str, Checkpoint]:
    own: dict[str, dict[str, TensorInfo]] = {name: {} for name in checkpoints}
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


def _tower(models: Mapping[str, Model]) -> str:
    towers = {tower for model in models.values() for tower in model.layers}
    if len(towers) != 1 or not all(model.layers for model in models.values()):
        found = ", ".join(sorted(towers)) or "none"
        raise UserError(f"stack: all models need their layers in one tower of one name; found {found}")
    return towers.pop()


def _layers(number: int, name: str, span: tuple[int, int], count: int) -> range:
    first, last = (layer + count if layer < 0 else layer for layer in span)
    if not 0 <= first <= last < count:
        raise UserError(f"{_which(number)}: layers {list(span)} of '{name}', which has {count}")
    return range(first, last + 1)


def _counted(counts: Mapping[str, int]) -> str:
    return " and ".join(f"{count} of '{name}'" for name, count in counts.items())


def _of_layer(checkpoint: Checkpoint, tower: str, layer: int) -> Iterator[tuple[str, TensorInfo]]:
    start = f"{tower}{layer}."
    for name, info in checkpoint.tensors.items():
        if name.startswith(start):
            yield name.removeprefix(start), info


def _outside(checkpoint: Checkpoint, model: Model, before: bool) -> Iterator[tuple[str, TensorInfo]]:
    for name, info in checkpoint.tensors.items():
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
