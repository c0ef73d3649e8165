"""Stacks: a model of ranges of layers, each taken from one of the experts as it is (passthrough, depth up-scaling)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, Mapping, Sequence

from mergeline.merging.architecture import Model, describe
from mergeline.merging.checkpoints.checkpoint import Checkpoint, TensorInfo
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.recipes.recipe import Range


@dataclass(frozen=True)
class Stack:
    """Where each tensor of the stack comes from: its name there -> expert; layers: those of the donor's numbering."""

    checkpoints: dict[str, Checkpoint]
    origin: dict[str, str]
    layers: list[int]


def stack(experts: Mapping[str, Checkpoint], ranges: Sequence[Range]) -> Stack:
    """Number the layers of all ranges one after the other.

    Embeddings come from the first range's expert, other tensors outside of layers (the last norm, the output matrix)
    from the last's.

    Raises:
        UserError: an unknown expert, layers that it lacks, or a model whose layers stand in several towers.
    """
    models = {name: describe({n: i.shape for n, i in c.tensors.items()}) for name, c in experts.items()}
    tower = _tower(models)
    counts = {name: model.layers[tower] for name, model in models.items()}
    origin: dict[str, str] = {}
    tensors: dict[str, dict[str, TensorInfo]] = {name: {} for name in experts}
    layers: list[int] = []

    def give(expert: str, name: str, info: TensorInfo) -> None:
        origin[name] = expert
        tensors[expert][name] = info

    for part in ranges:
        if part.expert not in experts:
            raise UserError(f"stack: no expert is named '{part.expert}'{did_you_mean(part.expert, experts)}")
        for layer in _layers(part, counts[part.expert]):
            for rest, info in _of_layer(experts[part.expert], tower, layer):
                give(part.expert, f"{tower}{len(layers)}.{rest}", info)
            layers.append(layer)
    for expert, first in ((ranges[0].expert, True), (ranges[-1].expert, False)):
        for name, info in experts[expert].tensors.items():
            role = models[expert].tensors[name]
            if role.layer is None and role.before_layers == first:
                give(expert, name, info)
    return Stack({name: c.view(tensors[name]) for name, c in experts.items()}, origin, layers)


def _tower(models: Mapping[str, Model]) -> str:
    towers = {tower for model in models.values() for tower in model.layers}
    if len(towers) != 1 or not all(model.layers for model in models.values()):
        found = ", ".join(sorted(towers)) or "none"
        raise UserError(f"stack: all experts need their layers in one tower of one name; found {found}")
    return towers.pop()


def _layers(part: Range, count: int) -> range:
    first, last = (layer + count if layer < 0 else layer for layer in part.layers)
    if not 0 <= first <= last < count:
        raise UserError(f"stack: layers {list(part.layers)} of '{part.expert}', which has {count}")
    return range(first, last + 1)


def _of_layer(checkpoint: Checkpoint, tower: str, layer: int) -> Iterator[tuple[str, TensorInfo]]:
    start = f"{tower}{layer}."
    for name, info in checkpoint.tensors.items():
        if name.startswith(start):
            yield name.removeprefix(start), info
