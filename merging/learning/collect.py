"""`collect`: what one expert shows on a few examples of its tasks, in a file that methods read beside it."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping

from mergeline.merging.algebra.slots import all_finite
from mergeline.merging.canonical import canonical_json
from mergeline.merging.checkpoints.adapters import open_adapted
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.checkpoints.writer import CheckpointWriter, TensorSpec
from mergeline.merging.engine.inputs import refuse_changed
from mergeline.merging.engine.machine import one_thread
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.engine.sources import FileInputs
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.files import publish, remove_leftovers, staged
from mergeline.merging.lazy import torch
from mergeline.merging.learning.gathering import (
    PLAIN,
    SETTINGS,
    Gathering,
    Kind,
    Subject,
    generator,
)
from mergeline.merging.learning.network import Batch, Examples, Network, batch_size, take_over, taken
from mergeline.merging.reading import sha256_of

if TYPE_CHECKING:
    from torch import Tensor

    from mergeline.merging.engine.plan import Plan

_PROVENANCE = "mergeline.statistics"  # of the file's metadata: what it was made from, and of how many rows


def collect(
    kind: Kind,
    checkpoint: str | os.PathLike,
    network: Network,
    examples: Examples,
    out: str | os.PathLike,
    *,
    gathering: Gathering = PLAIN,
    expert: str | None = None,
    base: str | os.PathLike | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the statistics of one expert on examples of its own tasks to the safetensors file `out`; returns it.

    gram: of every linear map, X^T X over the number of rows of its inputs X, float64 sums of products of up to 4096
    rows in float32 (float64 where the model is), by the names of matrices: of a weight (M, N) that is applied as
    `x W^T`, of a convolution (M, N = I * prod(kernel)), of transformers' Conv1D and `x @ W` (N, M), of each matrix in
    packed experts; (N, N). fisher: the diagonal Fisher information, the mean over examples of squared gradients of
    log-probabilities, each example by itself, in the shape of the tensor; 0 for what the network does not run. usage:
    how often each row of an embedding was looked up, (V,). experts: of each mixture of experts, how often each of them
    is chosen, and how alike they are (`merging.learning.expert_statistics`).

    All are float32. The network is left with the expert's weights. The metadata say what the statistics were made from;
    where a file says that it was made from the very same, nothing is done. The file appears whole or not at all.

    checkpoint: the expert's, or an adapter of `base`. expert: its name among the owners of tasks, by default that of
    its file. base: has the tensors that the expert lacks. progress: is told how many examples of how many are done; a
    further pass over them adds to both.

    Raises:
        UserError: an unknown kind, no examples or labels, a task without an owner of this name, a tensor that neither
            expert nor base has, NaN or Inf in weights, examples or statistics.
    """
    from mergeline.merging.learning.expert_statistics import expert_statistics
    from mergeline.merging.learning.fisher import fisher
    from mergeline.merging.learning.gram import gram, usage

    collectors = {"gram": gram, "fisher": fisher, "usage": usage, "experts": expert_statistics}
    if kind not in collectors:
        raise UserError(
            f"statistics '{kind}' are not collected from examples{did_you_mean(kind, collectors)}"
        )
    checkpoint, out = Path(checkpoint), Path(out)
    name = expert or checkpoint.stem
    tasks = _tasks(name, examples)
    experts = {name: checkpoint}
    held = open_adapted(checkpoint, Path(base) if base else None).tensors
    recipe: dict[str, Any] = {
        "method": "average",
        "base": Path(base) if base else None,
        "experts": experts,
        "heads": sorted(head for head in network.apart if head in held),
    }
    # Files may have a tensor for each expert, where the model has them packed.
    if kind == "experts" and not held.keys() & {n for n in network.tensors() if ".experts." in n}:
        recipe["layout"] = "packed"
    plan = make_plan(recipe)
    plan.check()
    chosen = {task: _chosen(examples.count(task), gathering.examples, seed, task) for task in tasks}
    facts = _facts(kind, name, plan, gathering, examples, chosen, seed)
    if out.is_file() and provenance(out).get("made_from") == facts:
        remove_leftovers(out)
        return out
    network.module.eval()
    done, total = 0, sum(map(len, chosen.values()))

    def step(examples: int) -> None:
        nonlocal done
        done += examples
        if progress:
            progress(done, -(-done // total) * total)

    with one_thread():
        batches = {task: _Chosen(examples, task, chosen[task]) for task in tasks}
        own = _load(plan, network)
        subject = Subject(name, plan, network, own, batches, seed, step)
        found = collectors[kind](subject, gathering)
        if not found.shapes:
            raise UserError(f"'{name}' has nothing that statistics '{kind}' are of; leave them out")
        metadata = {"format": "pt", _PROVENANCE: canonical_json({"made_from": facts, **found.told})}
        specs = [
            TensorSpec(key, "F32", shape, 4 * torch.Size(shape).numel())
            for key, shape in found.shapes.items()
        ]
        with staged(out) as place:
            writer = CheckpointWriter(place, specs, metadata, None, file=out.name)
            try:
                for key, tensor in found.tensors:
                    if not all_finite(tensor):
                        raise UserError(
                            f"'{name}': the statistics of '{key}' are not finite; look for NaN and Inf in the examples"
                        )
                    writer.write(key, tensor.float())
                writer.finish()
            finally:
                writer.close()
            refuse_changed(plan.stamps)
            publish(place / out.name, out)
    return out


def provenance(file: Path) -> dict[str, Any]:
    """What the statistics of a file were made from, as `collect` writes it; {} of other files."""
    import json

    try:
        return json.loads(open_checkpoint(file).metadata.get(_PROVENANCE, "{}"))
    except ValueError:
        return {}


def _tasks(expert: str, examples: Examples) -> list[str]:
    tasks = examples.tasks_of(expert)
    if not tasks:
        owners = dict.fromkeys(examples.owners.values())
        raise UserError(
            f"'{expert}' has no task of its own, on whose examples its statistics are collected"
            f"{did_you_mean(expert, owners)}"
        )
    for task in tasks:
        if not examples.count(task):
            raise UserError(f"'{task}' has no examples to collect statistics of '{expert}' on; bring some")
    return tasks


def _chosen(count: int, wanted: int | None, seed: int, task: str) -> list[int]:
    """Which of so many examples are taken: drawn from all of them, which may be sorted by class; in their order."""
    if wanted is None or wanted >= count:
        return list(range(count))
    if wanted < 1:
        raise UserError("statistics are collected on 1 example a task, or more")
    return sorted(torch.randperm(count, generator=generator(seed, task))[:wanted].tolist())


class _Chosen:
    """Batches of the chosen examples of a task."""

    def __init__(self, examples: Examples, task: str, chosen: list[int]):
        self._examples, self._task, self._chosen = examples, task, chosen

    def __call__(self) -> Iterator[tuple[Batch, list[int]]]:
        start, wanted = 0, set(self._chosen)
        for batch in self._examples.of(self._task):
            size = batch_size(batch)
            here = [i for i in range(size) if start + i in wanted]
            if here:
                part = batch if len(here) == size else taken(batch, torch.tensor(here))
                yield from _unpadded(part, [start + i for i in here])
            start += size


def _unpadded(batch: Batch, numbers: list[int]) -> Iterator[tuple[Batch, list[int]]]:
    """The batch, or, where some of its tokens are padding, its examples one by one without that: it is no input."""
    mask = batch.get("attention_mask")
    if mask is None or bool(mask.bool().all()):
        yield batch, numbers
        return
    for i, number in enumerate(numbers):
        kept = mask[i].bool()
        if not bool(kept.any()):
            raise UserError(f"example {number} of '{batch.get('task')}' is nothing but padding; leave it out")
        yield (
            {
                key: (
                    value[i : i + 1, kept]
                    if isinstance(value, torch.Tensor) and value.shape[:2] == mask.shape
                    else value[i : i + 1]
                    if isinstance(value, torch.Tensor)
                    else value
                )
                for key, value in batch.items()
            },
            [number],
        )


def _load(plan: Plan, network: Network) -> dict[str, Tensor]:
    """Give the network the expert's weights, what it lacks from the base; returns those that are the expert's own.

    All of the network's parameters are set: none is left of an expert that it had before.
    """
    own: dict[str, Tensor] = {}
    [expert] = plan.experts
    parameters = {network.stored(name) for name, _ in network.module.named_parameters()}
    checkpoints = {expert: plan.experts[expert], **({"base": plan.base} if plan.base else {})}
    shapes = {entry.name: entry.spec.shape for entry in plan.entries}
    with FileInputs(plan) as source:
        for name, tensor in network.tensors().items():
            origin = next((origin for origin, c in checkpoints.items() if name in c.tensors), None)
            if origin is None:
                if name in parameters:
                    raise UserError(
                        f"'{expert}' lacks the tensor '{name}' that the model runs; name the base that has it, or see "
                        "whether the checkpoint is of this architecture"
                    )
                continue
            shape = shapes.get(name, checkpoints[origin].tensors[name].shape)
            elements = torch.Size(shape).numel()
            read = source.read if tensor.is_floating_point() else source.raw
            take_over(tensor, name, read(origin, name, 0, elements).reshape(shape))
            if origin == expert:
                own[name] = tensor
    return own


def _facts(
    kind: Kind,
    expert: str,
    plan: Plan,
    gathering: Gathering,
    examples: Examples,
    chosen: Mapping[str, list[int]],
    seed: int,
) -> dict[str, Any]:
    """What decides the statistics."""
    settings = {k: v for k, v in asdict(gathering).items() if k in SETTINGS[kind] and k != "memory"}
    return {
        "version": 2,
        "kind": kind,
        "expert": expert,
        "model": sorted([file.name, sha256_of(file)] for file in plan.stamps),
        "settings": settings,
        "seed": seed,
        "split": examples.split,
        "examples": {task: len(numbers) for task, numbers in chosen.items()},
        "data": {task: examples.digests[task] for task in chosen},
    }
