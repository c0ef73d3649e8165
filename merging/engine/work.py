"""The one loop that writes: tensor by tensor, by threads of this process or in others, journalled as they finish."""

from __future__ import annotations

from concurrent.futures import Executor, Future, as_completed
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Sequence

from mergeline.merging.checkpoints.writer import CheckpointWriter
from mergeline.merging.engine.blocks import merged_blocks
from mergeline.merging.engine.elsewhere import (
    Address,
    Hashes,
    address_of,
    in_units,
    inputs_at,
    plan_at,
    stopped_together,
)
from mergeline.merging.engine.output import Output, open_writer
from mergeline.merging.engine.plan import Entry, Plan
from mergeline.merging.engine.sinks import sink_of
from mergeline.merging.engine.sources import FileInputs

REQUANTISED = "requantised"  # what is remembered of a tensor, and what a manifest has of all


class Count(int):
    """So many tensors, and the bytes of the inputs that are read for them."""

    bytes: int

    @classmethod
    def of(cls, tensors: int, size: int) -> Count:
        count = cls(tensors)
        count.bytes = size
        return count


class Point(NamedTuple):
    """One output, as other processes are told of it; found: by the look at the model."""

    address: Address
    folder: str
    found: Any


Progress = Callable[[Count, Count], None]  # takes how many tensors are done, and of how many


@dataclass
class Finished:
    """A tensor of the plan that was written.

    hashes: of each output, what was written, by its name in the file. inputs: of what was read, by expert or `base`.
    remembered: what else is to be known of it, JSON values by name.
    """

    name: str
    hashes: list[dict[str, str]]
    inputs: dict[str, str]
    remembered: dict[str, Any] = field(default_factory=dict)


def run(
    source: FileInputs,
    outputs: Sequence[Output],
    write: Callable[[Entry], Finished],
    pool: Executor,
    progress: Progress | None,
    executor: Executor | None = None,
) -> dict[str, dict[str, Any]]:
    """Write what the journals do not have, and journal it as it is finished; returns what is remembered of each tensor.

    Tensors without parts in the files are not in the journal. With an `executor`, merges run in other processes.
    """
    remembered: dict[str, dict[str, Any]] = {}
    entries, left = outputs[0].plan.entries, []
    for entry in entries:
        lines = [output.journal.tensors.get(part) for output in outputs for part in output.parts_of(entry)]
        if not lines or any(line is None for line in lines):
            left.append(entry)
        elif lines[0] is not None:
            source.hashes |= {(origin, entry.name): hash for origin, hash in lines[0]["inputs"].items()}
            remembered[entry.name] = lines[0].get("remembered", {})

    sizes = {entry.name: sum(info.nbytes for info in entry.inputs) for entry in entries}

    def record(tensor: Finished) -> int:
        """Journal it; returns the bytes of its inputs."""
        source.hashes |= {(origin, tensor.name): hash for origin, hash in tensor.inputs.items()}
        remembered[tensor.name] = tensor.remembered
        more = {"remembered": tensor.remembered} if tensor.remembered else {}
        for output, hashes in zip(outputs, tensor.hashes):
            for part, hash in hashes.items():
                output.writer.hashes[part] = hash
                output.journal.add_tensor(part, hash, tensor.inputs, **more)
        return sizes[tensor.name]

    total = Count.of(len(entries), sum(sizes.values()))
    done = Count.of(len(entries) - len(left), total.bytes - sum(sizes[entry.name] for entry in left))
    if executor:
        points = [
            Point(address_of(o.plan, source), str(o.folder.absolute()), o.journal.facts) for o in outputs
        ]
        units = []
        for unit in in_units([sizes[entry.name] for entry in left]):
            names = [left[i].name for i in unit]
            known = {key: hash for key, hash in source.hashes.items() if key[1] in names}
            units.append(executor.submit(merge_unit, points, names, known))
        finished: Iterable[list[int]] = (list(map(record, unit.result())) for unit in as_completed(units))
        _follow(units, finished, done, total, progress)
    else:
        # Who writes a tensor journals it, so that a kill finds no finished ones that wait for this thread.
        futures = [pool.submit(lambda entry: record(write(entry)), entry) for entry in left]
        finished = ([future.result()] for future in as_completed(futures))
        _follow(futures, finished, done, total, progress)
    return remembered


class MergeJob:
    """Tensors of one or several recipes with the same inputs, read once and merged into all outputs.

    found: what each recipe's look at the model found.
    """

    def __init__(
        self, source: FileInputs, plans: Sequence[Plan], writers: Sequence[CheckpointWriter], found: list[Any]
    ):
        self.source, self.writers, self.found = source, writers, found
        self.entries = [{entry.name: entry for entry in plan.entries} for plan in plans]

    def write(self, entry: Entry) -> Finished:
        """Merge, or copy, one tensor."""
        entries = [entries[entry.name] for entries in self.entries]
        sinks = [sink_of(writer, entry) for writer, entry in zip(self.writers, entries)]
        if entry.action == "merge":
            found = [found_for(entry, found) for entry, found in zip(entries, self.found)]
            bounds = [entry.bound for entry in entries if entry.bound]
            for i, block in merged_blocks(self.source.view(entry), bounds, found):
                sinks[i].append(block)
        else:
            for block in self.source.copied(list(entry.origins), entry.name, entry.action == "largest"):
                for sink in sinks:
                    sink.append(block)
        hashes = [sink.close() for sink in sinks]
        errors = [sink.error for sink in sinks]
        remembered = {REQUANTISED: errors} if any(errors) else {}
        return Finished(entry.name, hashes, hashes_read(self.source, entry), remembered)


def requantised(remembered: Mapping[str, Mapping[str, Any]], output: int) -> dict[str, Any]:
    """What requantising changed in one of the outputs: relative Frobenius errors; empty if nothing was."""
    errors = {}
    for name, of in remembered.items():
        if found := of.get(REQUANTISED, {}) and of[REQUANTISED][output]:
            errors[name] = (found[0] / found[1]) ** 0.5 if found[1] else 0.0
    if not errors:
        return {}
    worst = max(sorted(errors), key=errors.__getitem__)
    mean = sum(errors[name] for name in sorted(errors)) / len(errors)
    return {
        REQUANTISED: {"tensors": len(errors), "mean": mean, "worst": errors[worst], "worst_tensor": worst}
    }


def found_for(entry: Entry, found: Any) -> Any:
    """What the look at the model found, of a tensor that the recipe's own method merges; others are averaged."""
    return found if entry.bound and (entry.bound.looks_at_model or entry.bound.inner) else None


def hashes_read(source: FileInputs, entry: Entry) -> dict[str, str]:
    """Of each checkpoint that a tensor was read from, the hash."""
    return {o: source.hashes[o, entry.name] for o in entry.origins if (o, entry.name) in source.hashes}


def merge_unit(points: Sequence[Point], names: Sequence[str], hashes: Hashes) -> list[Finished]:
    """Merge some tensors in a process that knows nothing yet but paths; the staging folders are another's."""
    plans = [plan_at(point.address) for point in points]
    with ExitStack() as stack:
        source = stack.enter_context(inputs_at(points[0].address, plans[0], hashes))
        writers = [
            stack.enter_context(closing(open_writer(plan, Path(point.folder), join=True)))
            for plan, point in zip(plans, points)
        ]
        job = MergeJob(source, plans, writers, [point.found for point in points])
        entries = {entry.name: entry for entry in plans[0].entries}
        return [job.write(entries[name]) for name in names]


def _follow(
    futures: Sequence[Future],
    finished: Iterable[list[int]],
    done: Count,
    total: Count,
    progress: Progress | None,
) -> None:
    """Wait for units of work, each of which finishes tensors of so many bytes; if one fails, none is left running."""
    with stopped_together(futures):
        for sizes in finished:
            for size in sizes:
                done = Count.of(done + 1, done.bytes + size)
                if progress:
                    progress(done, total)
