"""A model that examples can be run through, and the examples: all that learning asks of a kind of models."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, Mapping, Sequence

from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

# What a model is run on: tensors whose first axis are the B examples, and "task", the name of their task.
Batch = Mapping[str, Any]
_SMALL = 1 << 16  # numbers in the images of batches that are run at once; more of them save little time


@dataclass(frozen=True)
class Pictures:
    """How pictures become the "images" of a batch: prepared takes bytes (B, size, size, 3), and gives (B, 3, H, W)."""

    size: int
    prepared: Callable[[np.ndarray], Tensor]


@dataclass(frozen=True)
class Network:
    """A model of one architecture, which is given the weights of one checkpoint after another.

    module: in eval mode and float32; its parameters and buffers are named as the checkpoint's tensors are after
    `prefix`, or as `names` says, by the module's name. run: of the module and a batch, the features (R, d): a row for
    each example, or for each of its tokens that count. score: of features and the name of a task, the logits (R, C);
    None where there are none. heads: names of the tensors that `score` reads; none where heads belong to tasks, and all
    models have the same. apart: names of a checkpoint's tensors that belong to its task, and are not taken over.
    numbers: the tasks whose logits are no logits of classes, but numbers, the means of normal distributions of
    variance 1. extend: of the module, a batch of texts and a number, the batch with up to so many tokens more after
    each, the likeliest ones. pictures: of models of images, for methods that draw some; else None.
    """

    module: nn.Module
    run: Callable[[nn.Module, Batch], Tensor]
    score: Callable[[Tensor, str], Tensor] | None = None
    prefix: str = ""
    heads: tuple[str, ...] = ()
    apart: frozenset[str] = frozenset()
    numbers: frozenset[str] = frozenset()
    extend: Callable[[nn.Module, Batch, int], Batch] | None = None
    pictures: Pictures | None = None
    names: Mapping[str, str] = field(default_factory=dict)

    def stored(self, inside: str) -> str:
        """The checkpoint's name of a tensor by that of the module."""
        return self.names.get(inside, self.prefix + inside)

    def inside(self, stored: str) -> str:
        """The module's name of a tensor by that of the checkpoint."""
        return self._insides.get(stored, stored.removeprefix(self.prefix))

    @cached_property
    def _insides(self) -> dict[str, str]:
        return {stored: inside for inside, stored in self.names.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Its parameters and buffers by the checkpoint's names, themselves; of tied ones the first name."""
        own = [*self.module.named_parameters(), *self.module.named_buffers()]
        named = ((self.stored(name), tensor) for name, tensor in own)
        return {name: tensor for name, tensor in named if name not in self.apart}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over tensors of a checkpoint, in place; those that `state` lacks stay, those outside of it are left.

        Raises:
            UserError: a tensor has another shape, or the module has none of this name under `prefix`.
        """
        own = self.tensors()
        tied = {self.stored(name) for name in self.module.state_dict(keep_vars=True)}
        for name, value in state.items():
            if name in self.apart:
                continue
            if name in own:
                take_over(own[name], name, value)
            elif name.startswith(self.prefix) and name not in tied:
                raise UserError(f"the model has no tensor '{name}'{did_you_mean(name, own)}")

    def features(self, batch: Batch) -> Tensor:
        """The features (R, d) of a batch."""
        return self.run(self.module, batch)

    def logits(self, features: Tensor, task: str) -> Tensor:
        """The logits (R, C) of features (R, d) (raises UserError where the models have none)."""
        if self.score is None:
            raise UserError("these models have features, but no logits; choose an objective of features")
        return self.score(features, task)

    @contextmanager
    def lent(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """In this block, some of its tensors have other values."""
        own = self.tensors()
        before = {name: own[name].data for name in tensors}
        try:
            for name, value in tensors.items():
                own[name].data = value
            yield
        finally:
            for name, value in before.items():
                own[name].data = value


def take_over(own: Tensor, name: str, value: Tensor) -> None:
    """Copy the tensor `name` of a checkpoint into a network's own (raises UserError for another shape)."""
    if value.shape != own.shape:
        raise UserError(f"'{name}' is {tuple(value.shape)}, in the model {tuple(own.shape)}")
    with torch.no_grad():
        own.copy_(value)


@dataclass(frozen=True)
class Examples:
    """A few examples of each task.

    batches: task -> gives its batches, in the same order whenever it is called. counts: task -> how many examples
    these are. owners: task -> the expert that was tuned for it. digests: task -> of the examples' content.
    split: which part of the data they are of. labelled: whether batches hold "labels", int64 (B). first: how many of
    each task are used at most.
    """

    batches: Mapping[str, Callable[[], Iterable[Batch]]]
    counts: Mapping[str, int]
    owners: Mapping[str, str]
    digests: Mapping[str, str]
    split: str
    labelled: bool = False
    first: int | None = None

    def tasks_of(self, expert: str) -> list[str]:
        """The tasks that an expert was tuned for."""
        return [task for task, owner in self.owners.items() if owner == expert]

    def of(self, task: str) -> Iterator[Batch]:
        """The batches of a task, `first` examples at most."""
        left = self.counts[task] if self.first is None else min(self.first, self.counts[task])
        for batch in self.batches[task]():
            size = batch_size(batch)
            yield batch if size <= left else taken(batch, slice(left))
            left -= size
            if left <= 0:
                return

    def count(self, task: str) -> int:
        """How many examples `of` gives."""
        return self.counts[task] if self.first is None else min(self.first, self.counts[task])


def batch_size(batch: Batch) -> int:
    """How many examples a batch has."""
    return next(len(value) for value in batch.values() if isinstance(value, torch.Tensor))


def mask_of(batch: Batch) -> torch.Tensor | None:
    """Which tokens of a batch of texts count, (B, L) int64 or bool; None where its examples are no texts."""
    mask = batch.get("attention_mask")
    return mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None


def taken(batch: Batch, which: Any) -> dict[str, Any]:
    """Some examples of a batch, by a slice or by indices."""
    return {key: value[which] if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def are_small(shapes: Sequence[Sequence[int] | None]) -> bool:
    """Whether batches of images (B, ...) are best run at once: of one size, so few that the weights are more work than
    they. None: a batch of something else.
    """
    images = [tuple(shape) for shape in shapes if shape is not None]
    alike = len(images) == len(shapes) and len({shape[1:] for shape in images}) == 1
    return alike and sum(map(prod, images)) <= _SMALL


def joined(batches: Sequence[Batch]) -> Batch:
    """One batch of images of several tasks."""
    return {"images": torch.cat([batch["images"] for batch in batches])}


def lists_of_blocks(module: nn.Module) -> dict[str, nn.Module]:
    """By name, the parts of a model that list two or more modules of one class, as its blocks are."""
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, torch.nn.ModuleList | torch.nn.Sequential)
        and len(part) > 1
        and len({type(child) for child in part}) == 1
    }


def block_name(listed_in: str, key: str) -> str:
    """The name of a module by its place in a list of `lists_of_blocks`."""
    return f"{listed_in}.{key}".lstrip(".")
