"""One merged checkpoint in the making: its staging folder, its files and its journal; and the checks before them."""

from __future__ import annotations

import os
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Protocol, Sequence

from mergeline.merging.algebra.slots import Runner
from mergeline.merging.canonical import text_digest
from mergeline.merging.checkpoints.writer import CheckpointWriter, TensorSpec
from mergeline.merging.engine.blocks import look_at_model
from mergeline.merging.engine.cache import store_at
from mergeline.merging.engine.elsewhere import Elsewhere, address_of
from mergeline.merging.engine.inputs import refuse_changed
from mergeline.merging.engine.journal import Journal
from mergeline.merging.engine.machine import (
    check_device,
    keep_freed_memory,
    one_thread,
    own_stream,
    worker_count,
)
from mergeline.merging.engine.manifest import (
    Manifest,
    checkpoint_metadata,
    identity,
    is_single,
    make_manifest,
    publish_files,
    write_companions,
)
from mergeline.merging.engine.mergelock import refuse_locked
from mergeline.merging.engine.places import Kind, refuse_place
from mergeline.merging.engine.plan import Entry, Plan
from mergeline.merging.engine.sources import FileInputs
from mergeline.merging.errors import UserError
from mergeline.merging.files import JOURNAL, empty, resumable


@contextmanager
def opened(
    plans: Sequence[Plan],
    outs: Sequence[Path],
    *,
    device: str,
    memory: int | None,
    workers: int | None,
    factors: str | os.PathLike | None,
    need: int,
    lapack: bool,
    layout: Callable[[FileInputs], Layout] | None = None,
    kind: Kind = "merge",
    force: bool = False,
    executor: Executor | None = None,
) -> Iterator[tuple[FileInputs, list[Output], Executor]]:
    """What writes files begins so: checks, then inputs, locked outputs with what looks at the model found, and a pool.

    need: bytes that a worker takes at most; lapack: whether matrices are decomposed; layout: of all outputs. kind: what
    they are. force: they may replace what is no earlier output. executor: who looks at the model, instead of the pool.

    Raises:
        UserError: a device that is not here, a locked expert, inputs that changed since they were planned with, outputs
            that may not be replaced, too little memory.
    """
    check_device(device)
    refuse_locked(plans[0])
    store = store_at(factors)
    for plan, out in zip(plans, outs):
        _refuse_companions(plan, out, kind)
        refuse_place(out, [*read_by(plan), *([Path(factors)] if factors else [])], kind, force)
        refuse_changed(plan.stamps)
    workers = worker_count(need, workers, memory)
    keep_freed_memory()
    with ExitStack() as stack:
        stack.enter_context(one_thread(lapack))
        folders = [stack.enter_context(resumable(out)) for out in outs]
        source = stack.enter_context(FileInputs(plans[0], device, store))
        made = layout(source) if layout else None
        outputs = [
            stack.enter_context(Output(p, o, f, device, made)) for p, o, f in zip(plans, outs, folders)
        ]
        pool = stack.enter_context(ThreadPoolExecutor(workers, initializer=own_stream, initargs=(device,)))
        found: dict[Any, Any] = {}
        for output in outputs:
            if executor is None:
                output.look(source, Runner(pool.map), found)
            else:
                address = address_of(output.plan, source)
                output.look(source, Elsewhere(executor, address, source.hashes), found)
        yield source, outputs, pool


def _refuse_companions(plan: Plan, out: Path, kind: Kind) -> None:
    """Raises UserError where adapters of tasks, or a router, would lie beside what they are not for."""
    if plan.adapters and kind != "merge":
        raise UserError(f"the recipe's adapters correct a merge, and {out} becomes none; leave them out")
    if plan.router and kind != "store":
        raise UserError(
            "the recipe's router is for a compressed store: merge it alone, into a place of its own"
        )
    if plan.recipe.requantise and kind != "merge":
        raise UserError(f"requantise is for a merge, and {out} becomes none; leave it out")
    if plan.keeps_adapters and kind != "merge":
        raise UserError(
            f"{out}: soft prompts and singular values of adapters are merged as they lie, by `mergeline merge`, and "
            "become nothing else"
        )
    if plan.adapter_only and kind != "adapter":
        raise UserError(
            f"{out}: adapters without a base become one adapter, by `mergeline extract-lora`; or name the base"
        )
    if plan.heads and kind != "merge":
        raise UserError(
            f"the recipe's heads lie beside a merge, and {out} becomes none; use `exclude` instead"
        )
    if is_single(out) and (plan.adapters or plan.router or plan.heads):
        raise UserError(
            f"{out}: adapters, routers and heads lie beside weights in a folder; leave out .safetensors"
        )


class Output:
    """One merged checkpoint (or what has a layout of its own, as a store) in the making: plan, files, journal."""

    def __init__(self, plan: Plan, out: Path, folder: Path, device: str, layout: Layout | None = None):
        self.plan, self.out, self.folder, self.layout = plan, out, folder, layout
        self.journal = Journal(
            folder, identity(plan, device) + (text_digest(layout.metadata) if layout else "")
        )
        if not self.journal.resumes:
            empty(folder, keep={JOURNAL})
        try:
            self.writer = open_writer(plan, folder, layout=layout)
        except BaseException:
            self.journal.close()
            raise
        if is_single(out) and len(self.writer.files) > 1:
            self.__exit__()
            why = "a model of several components" if plan.components else "--shard-size"
            raise UserError(f"{out}: {why} makes several files; name a folder instead")
        empty(self.writer.folder, keep={*self.writer.files, *self.writer.indexes})
        self.journal.keep_verified(self.writer)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: Any) -> None:
        self.writer.close()
        self.journal.close()

    def parts_of(self, entry: Entry) -> Iterable[str]:
        """What is written of a tensor, by its names in the file."""
        return self.layout.parts[entry.name] if self.layout else entry.parts

    def look(self, source: FileInputs, runner: Runner, found: dict[Any, Any]) -> None:
        """Look at the model as the method wants, unless the journal knows what was found, or another point does."""
        if not self.journal.has_facts:
            views = [source.view(entry) for entry in self.plan.merged]
            self.journal.add_facts(look_at_model(self.plan.bound, views, runner, found))


def publish_all(
    outputs: Sequence[Output],
    source: FileInputs,
    device: str,
    more: dict[str, Any] | None = None,
    each: Sequence[dict[str, Any]] | None = None,
) -> list[Manifest]:
    """Give finished outputs their final names, with manifest, card and configurations beside the weights.

    more: what the manifest says of a compressed `store`, or of an `adapter`, which has a configuration of its own.
    each: what the manifests of the outputs say besides.

    Raises:
        UserError: an input changed since its header was read; nothing is published then.
    """
    manifests = [make_manifest(o.plan, source, o.writer, o.out, device) | (more or {}) for o in outputs]
    for manifest, own in zip(manifests, each or ()):
        manifest |= own
    for output, manifest in zip(outputs, manifests):
        if not is_single(output.out):
            write_companions(output.plan, source, manifest, output.writer.folder)
    for output in outputs:
        refuse_changed(output.plan.stamps)
    for output, manifest in zip(outputs, manifests):
        publish_files(manifest, output.writer, output.out)
    return manifests


def read_by(plan: Plan) -> list[Path]:
    """The checkpoints and files that a plan reads."""
    statistics = [checkpoint.path for files in plan.statistics.values() for checkpoint in files]
    checkpoints = [*plan.recipe.experts.values(), plan.recipe.base, *plan.recipe.onto.values(), *statistics]
    return [*filter(None, checkpoints), *plan.stamps, *plan.recipe.methods]


class Layout(Protocol):
    """What is written instead of the merged tensors.

    parts: of each tensor of the plan, by the names in the file; specs: these, and what belongs to no tensor. metadata,
    file: of the file or files, and the name of a single one.
    """

    parts: dict[str, dict[str, TensorSpec]]
    specs: list[TensorSpec]
    file: str

    @property
    def metadata(self) -> dict[str, str]: ...


def open_writer(
    plan: Plan, folder: Path, join: bool = False, layout: Layout | None = None
) -> CheckpointWriter:
    """The files in a staging folder; `join` only opens what another process made."""
    specs = layout.specs if layout else [part for entry in plan.entries for part in entry.parts.values()]
    metadata = layout.metadata if layout else checkpoint_metadata(plan)
    more: dict[str, Any] = {"file": layout.file} if layout else {"stems": plan.stems}
    return CheckpointWriter(
        folder / "out", specs, metadata, plan.recipe.shard_size, resume=True, join=join, **more
    )
