"""What statistics are collected of whom, and how: what every kind of them is given and gives."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Callable, Iterator, Literal, Mapping, NamedTuple, get_args

from mergeline.merging.canonical import canonical_json
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch
from mergeline.merging.learning.network import Batch, Network

if TYPE_CHECKING:
    from torch import Tensor

    from mergeline.merging.engine.plan import Plan

Kind = Literal["gram", "fisher", "usage", "experts"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# What can be set of each kind, beside the examples.
SETTINGS: Mapping[Kind, tuple[str, ...]] = {
    "gram": ("memory",),
    "fisher": ("labels", "draws", "normalise"),
    "usage": (),
    "experts": ("outputs",),
}


@dataclass(frozen=True)
class Gathering:
    """How statistics are collected.

    examples: how many of each task, drawn by the seed; None, or more than there are, for all. memory: of `gram`, how
    much is summed up in one pass over the examples: every matrix (None), those of one layer (`layer`), or as many as
    take so many bytes. labels: of `fisher`, whether gradients are of all classes, weighted by their probabilities
    (`true`), of classes drawn from them (`sampled`, `draws` times), or of the examples' own labels (`empirical`).
    normalise: of `fisher`, divide it by its L2 norm over the model (`global`) or by its sum (`trace`). outputs: of
    `experts`, run all of them on every token, and compare what they make of it.
    """

    examples: int | None = None
    memory: int | Literal["layer"] | None = None
    labels: Literal["true", "sampled", "empirical"] = "true"
    draws: int = 1
    normalise: Literal["none", "global", "trace"] = "none"
    outputs: bool = False


PLAIN = Gathering()


class Subject(NamedTuple):
    """One expert, whose weights the network has, and the examples that it is shown.

    expert: its name. plan: how its tensors lie in its files. network: with its weights. tensors: those of the network
    that are its own, by the checkpoint's names. batches: task -> gives its batches, with the numbers of their examples
    among all of the task; without padding.
    """

    expert: str
    plan: Plan
    network: Network
    tensors: Mapping[str, Tensor]
    batches: Mapping[str, Callable[[], Iterator[tuple[Batch, list[int]]]]]
    seed: int
    step: Callable[[int], None]


class Collected(NamedTuple):
    """What was collected: the shapes of float32 tensors by name, the tensors, and what is to be told of them (JSON)."""

    shapes: Mapping[str, tuple[int, ...]]
    tensors: Iterator[tuple[str, Tensor]]
    told: Mapping[str, Any]


def generator(seed: int, *what: Any) -> torch.Generator:
    """Random numbers of a seed for one thing."""
    digest = sha256(canonical_json([seed, *what]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def refuse_nonfinite(subject: Subject, task: str, found: Tensor, what: str) -> None:
    """Raises UserError for NaN or Inf in what an expert makes of examples of a task."""
    if not bool(torch.isfinite(found).all()):
        raise UserError(
            f"'{subject.expert}' has {what} that are not finite on examples of '{task}'; "
            "look for NaN and Inf in the examples"
        )
