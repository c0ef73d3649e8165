"""A model cut at its blocks, so that examples pass through one stage of it after the other, and only what lies between
two stages is kept.

The stages are what comes before the first block, each block, and what comes after the last. Blocks are found by the
numbers in tensors' names and the order in which they are called; a model whose blocks do not hand one tensor from each
to the next has but one stage, itself.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Iterator, Sequence

from mergeline.merging.architecture import layer_of
from mergeline.merging.lazy import torch
from mergeline.merging.learning.network import Batch, Network

if TYPE_CHECKING:
    from torch import Tensor, nn


class _Reached(Exception):
    """What was to be computed is."""


@dataclass
class Stream:
    """A batch on its way through a model.

    hidden: what goes into the next stage, (B, tokens, d) or as the model has it; None before the first. calls: what
    each block is given beside, such as masks, which depends on no weight.
    """

    batch: Batch
    hidden: Tensor | None = None
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]] = ()

    def moved(self, hidden: Tensor) -> Stream:
        """The same batch further on."""
        return Stream(self.batch, hidden, self.calls)


@dataclass(frozen=True)
class Stage:
    """A part of a model. tensors: names of its parameters and buffers. run: a stream through it."""

    name: str
    tensors: list[str]
    run: Callable[[Stream], Stream]


def stages_of(network: Network, batch: Batch) -> list[Stage]:
    """The stages of a network, in order; a batch, and the weights that are loaded, tell how its blocks are called."""
    found = _blocks(network, batch)
    names = [name for name, tensor in network.tensors().items() if tensor.is_floating_point()]
    if not found:
        return [Stage("model", names, lambda stream: stream.moved(network.features(stream.batch)))]
    blocks = [block for _, block in found]
    tuples = [isinstance(out, tuple) for out in _outputs(network, blocks, batch)]
    inside = {name: [n for n in names if network.inside(n).startswith(f"{name}.")] for name, _ in found}
    taken = {name for own in inside.values() for name in own}
    rest = [name for name in names if name not in taken]

    def enter(stream: Stream) -> Stream:
        first: list[Tensor] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def called(k: int, *args: Any, **kwargs: Any) -> Any:
            first.append(args[0])
            # A cache of keys would grow with every pass.
            calls.append((args[1:], {key: None if "past_key" in key else v for key, v in kwargs.items()}))
            if k == len(blocks) - 1:
                raise _Reached
            return (args[0],) if tuples[k] else args[0]

        with _replaced(blocks, called):
            try:
                network.features(stream.batch)
            except _Reached:
                pass
        return Stream(stream.batch, first[0], calls)

    def through(k: int, stream: Stream) -> Stream:
        args, kwargs = stream.calls[k]
        out = blocks[k](stream.hidden, *args, **kwargs)
        return stream.moved(out[0] if tuples[k] else out)

    def leave(stream: Stream) -> Stream:
        def called(k: int, *_: Any, **__: Any) -> Any:
            return (stream.hidden,) if tuples[k] else stream.hidden

        with _replaced(blocks, called):
            return stream.moved(network.features(stream.batch))

    middle = [
        Stage(name, inside[name], lambda stream, k=k: through(k, stream))  # type: ignore[misc]
        for k, (name, _) in enumerate(found)
    ]
    return [Stage("before", rest, enter), *middle, Stage("after", rest, leave)]


def _blocks(network: Network, batch: Batch) -> list[tuple[str, nn.Module]]:
    """Names and modules of the blocks in the order of their calls; none where they are no chain."""
    places = {layer_of(network.inside(name)) for name in network.tensors()}
    names = [f"{tower}{layer}" for tower, layer in places if tower is not None]
    modules = dict(network.module.named_modules())
    inside = {name: modules[name] for name in names if name in modules}
    order: list[str] = []
    passed: list[tuple[Any, Any]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(_: Any, args: Any, out: Any) -> None:
            order.append(name)
            passed.append((args[0] if args else None, out[0] if isinstance(out, tuple) else out))

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in inside.items()]
    try:
        network.features(batch)
    finally:
        for handle in handles:
            handle.remove()
    chained = all(before[1] is after[0] for before, after in zip(passed, passed[1:]))
    whole = bool(passed) and isinstance(passed[0][0], torch.Tensor) and len(set(order)) == len(order)
    return [(name, inside[name]) for name in order] if chained and whole else []


def _outputs(network: Network, blocks: Sequence[nn.Module], batch: Batch) -> list[Any]:
    found: list[Any] = []
    handles = [block.register_forward_hook(lambda _, __, out: found.append(out)) for block in blocks]
    try:
        network.features(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def _replaced(blocks: Sequence[nn.Module], called: Callable[..., Any]) -> Iterator[None]:
    """In this block, `called(k, ...)` stands for the k-th block."""
    before = [vars(block).get("forward") for block in blocks]
    try:
        for k, block in enumerate(blocks):
            block.forward = lambda *args, k=k, **kwargs: called(k, *args, **kwargs)
        yield
    finally:
        for block, own in zip(blocks, before):
            if own is None:
                vars(block).pop("forward", None)
            else:
                block.forward = own
