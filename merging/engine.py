"""Merge checkpoints: file to file, tensor by tensor, or state dicts in memory; the same kernels serve both."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, Mapping, Protocol, Sequence

from merging.checkpoint import DTYPES, WEIGHTS
from merging.errors import UserError
from merging.factors import FactorStore, store_at
from merging.files import empty, resumable, user_errors
from merging.inputs import FileInputs, MemoryInputs, State
from merging.journal import Journal
from merging.lazy import torch
from merging.manifest import Manifest, checkpoint_metadata, identity, publish_merge, refuse_to_replace
from merging.mergelock import refuse_locked
from merging.methods import Bound, get_method
from merging.plan import Entry, Plan, make_plan
from merging.recipe import Recipe, text_digest, unfolded
from merging.slots import Inputs, View, all_finite
from merging.writer import CheckpointWriter, TensorSpec, TensorWriter

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int, int], None]
Run = Callable[[Callable, Iterable], Iterable]  # map, or a pool's
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # options of mallopt(3)
_UNIT_BYTES = 1 << 28  # what another process reads for one unit of work


def merge(
    recipe: Recipe | Mapping[str, Any],
    out: str | os.PathLike,
    *,
    device: str = "cpu",
    memory: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    factors: str | os.PathLike | None = None,
    executor: Executor | None = None,
) -> Manifest:
    """Merge checkpoints on disk into `out`: a `*.safetensors` file, or a folder with manifest, card and configs.

    The bytes written do not depend on `workers`, `memory` (an upper bound in bytes, the imports not counted),
    `factors` (a folder that keeps spectral decompositions for the next merge) or `executor` (runs units of work
    elsewhere: any concurrent.futures.Executor whose processes see the same files, such as a Dask client's).
    A merge that was killed goes on where it was when it is started again. `progress(done, all)` is called after each
    tensor. Returns the manifest.

    Raises:
        UserError: anything `plan` reports, an expert that is locked against merging (see `merging.mergelock`),
            NaN or Inf in an input, an overflow of the output dtype, a full disk, another process writing `out`,
            `memory` below what one tensor needs, an `out` that holds anything but an earlier merge.
    """
    return merge_points(
        [(recipe, out)],
        device=device,
        memory=memory,
        workers=workers,
        progress=progress,
        factors=factors,
        executor=executor,
    )[0]


def merge_points(
    points: Sequence[tuple[Recipe | Mapping[str, Any], str | os.PathLike]],
    *,
    device: str = "cpu",
    memory: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    factors: str | os.PathLike | None = None,
    executor: Executor | None = None,
) -> list[Manifest]:
    """Merge several recipes with the same inputs from one reading of them; see `merge`."""
    plans = [make_plan(recipe) for recipe, _ in points]
    for plan in plans:
        plan.check()
    _check_inputs(plans)
    outs = [Path(out) for _, out in points]
    with opened(
        plans, outs, device=device, memory=memory, workers=workers, factors=factors,
        need=max(plan.peak_bytes for plan in plans), lapack=any(plan.is_spectral for plan in plans),
    ) as (source, outputs, pool):  # fmt: skip
        _run(source, outputs, pool, executor, progress)
        for output in outputs:
            output.writer.finish()
        return [publish_merge(o.plan, source, o.writer, o.out, o.folder, device) for o in outputs]


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
) -> Iterator[tuple[FileInputs, list[Output], Executor]]:
    """What writes files begins so: checks, then inputs, locked outputs with the facts of their pre-pass, and a pool.

    need: bytes that a worker takes at most; lapack: whether matrices are decomposed; layout: of all outputs.

    Raises:
        UserError: a device that is not here, a locked expert, outputs that may not be replaced, too little memory.
    """
    check_device(device)
    refuse_locked(plans[0])
    store = store_at(factors)
    for plan, out in zip(plans, outs):
        with user_errors(out):
            refuse_to_replace(plan, out)
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
            output.find_facts(source, pool.map, found)
        yield source, outputs, pool


def merge_state_dicts(
    method: str,
    experts: Mapping[str, State],
    base: State | None = None,
    *,
    params: Mapping[str, Any] | None = None,
    statistics: Mapping[str, Any] | None = None,
    seed: int = 0,
    factors: FactorStore | None = None,
) -> dict[str, Tensor]:
    """Merge state dicts in memory; inputs are not modified, each output tensor has the dtype of its input.

    method: an id, or a chain of wrappers such as `lines(dare(ties))`.
    statistics: name -> one state dict an expert (a list), or one for all. Tensors that only `base` has are returned
    as they are; integer and bool tensors must agree.

    Raises:
        UserError: unknown method or parameter, missing base, tensors that do not match, NaN or Inf.
    """
    return merge_state_dicts_points(
        method, experts, base, points=[params or {}], statistics=statistics, seed=seed, factors=factors
    )[0]


def merge_state_dicts_points(
    method: str,
    experts: Mapping[str, State],
    base: State | None = None,
    *,
    points: Sequence[Mapping[str, Any]],
    statistics: Mapping[str, Any] | None = None,
    seed: int = 0,
    factors: FactorStore | None = None,
) -> list[dict[str, Tensor]]:
    """Merge state dicts with several `params` in one pass, which shares what they have in common."""
    bounds = []
    for params in points:
        try:
            id, params = unfolded(method, params)
        except ValueError as error:
            raise UserError(str(error)) from None
        entry = get_method(id)
        resolved = entry.resolve(params)
        for misuse in entry.misuses(resolved, len(experts), base is not None, statistics):
            raise UserError(misuse)
        bounds.append(entry.bind(resolved))
    source = MemoryInputs(experts, base, statistics or {}, seed, factors, entry.delta)
    merged: list[dict[str, Tensor]] = [{} for _ in points]
    with one_thread(any(bound.is_spectral for bound in bounds)):
        found: dict[Any, Any] = {}
        facts = [_facts(bound, source.views, map, found) for bound in bounds]
        for name in source.names:
            like = source.first[name]
            parts: list[list[Tensor]] = [[] for _ in points]
            if like.is_floating_point():
                for i, block in merged_blocks(View(source, name, like.shape), bounds, facts):
                    parts[i].append(block.reshape(-1).to(like.dtype))
            else:
                origins = [*(["base"] if base is not None else []), *experts]
                for block in source.agreed(origins, name):
                    for own in parts:
                        own.append(block.clone())
            for state, own in zip(merged, parts):
                state[name] = torch.cat(own).reshape(like.shape) if own else like.clone()
    return [{**{k: v for k, v in (base or {}).items() if k not in state}, **state} for state in merged]


def _facts(bound: Bound, views: Sequence[View], run: Run, found: dict[Any, Any]) -> Any:
    """What the pre-pass finds, or has found for another point of the same setting: `found` keeps it."""
    setting = bound.prepass_setting, *(view.name for view in views)
    if setting not in found:
        found[setting] = bound.prepass(Inputs(views, run))
    return found[setting]


def merged_blocks(view: View, bounds: Sequence[Bound], facts: Sequence[Any]) -> Iterator[tuple[int, Tensor]]:
    """All blocks of a tensor as each point merges them, with the point's index; points of one unit share slots."""
    view.shared = len(bounds) > 1
    units = [bound.unit(view.name, view.shape) for bound in bounds]
    for unit in sorted(set(units)):
        measured = {i: b.measure(view, facts[i]) for i, b in enumerate(bounds) if units[i] == unit}
        for x in view.blocks(unit):
            for i, found in measured.items():
                yield i, bounds[i](x, facts[i], found)


@contextmanager
def one_thread(lapack: bool = False) -> Iterator[None]:
    """One BLAS thread: results that do not depend on the machine's load, and no spinning; `lapack`: SciPy's too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _one_scipy_thread() if lapack else nullcontext():
            yield
    finally:
        torch.set_num_threads(before)


@cache
def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next block, instead of faulting every block in anew."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not the GNU C library
        return
    for option, value in ((_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 64 << 20)):
        mallopt(option, value)


def own_stream(device: str) -> None:
    """A stream for each worker: one worker's copies overlap another's computation."""
    if device != "cpu":
        torch.cuda.set_stream(torch.cuda.Stream(device))


def _one_scipy_thread() -> Any:
    import scipy.linalg.blas  # noqa: F401  only what is loaded can be limited
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)


# ---------------------------------------------------------------------------------------------- files


class Output:
    """One merged checkpoint (or what has a layout of its own, as a store) in the making: plan, files, journal."""

    def __init__(self, plan: Plan, out: Path, folder: Path, device: str, layout: Layout | None = None):
        self.plan, self.out, self.folder, self.layout = plan, out, folder, layout
        self.journal = Journal(folder, identity(plan, device) + (text_digest(layout.metadata) if layout else ""))
        if not self.journal.resumes:
            empty(folder, keep=self.journal.path)
        try:
            self.writer = _writer(plan, folder, layout=layout)
        except BaseException:
            self.journal.close()
            raise
        if out.suffix == ".safetensors" and len(self.writer.files) > 1:
            self.__exit__()
            raise UserError(f"{out}: --shard-size makes several files; name a folder instead")
        self.journal.keep_verified(self.writer)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: Any) -> None:
        self.writer.close()
        self.journal.close()

    def find_facts(self, source: FileInputs, run: Run, found: dict[Any, Any]) -> None:
        """Run the method's pre-pass, unless the journal knows what it found, or another point has."""
        if not self.journal.has_facts:
            views = [
                source.view(e) for e in self.plan.entries if e.bound and e.bound.method is self.plan.method
            ]
            self.journal.add_facts(_facts(self.plan.bound, views, run, found))


class Layout(Protocol):
    """What is written instead of the merged tensors.

    parts: of each tensor of the plan, by the names in the file; specs: these, and what belongs to no tensor. metadata,
    file: of the file or files, and the name of a single one.
    """

    parts: dict[str, dict[str, TensorSpec]]
    specs: list[TensorSpec]
    metadata: dict[str, str]
    file: str


def _writer(plan: Plan, folder: Path, join: bool = False, layout: Layout | None = None) -> CheckpointWriter:
    """The files in a staging folder; `join` only opens what another process made."""
    specs = layout.specs if layout else [entry.spec for entry in plan.entries]
    metadata = layout.metadata if layout else checkpoint_metadata(plan)
    file, limit = layout.file if layout else WEIGHTS, plan.recipe.shard_size
    return CheckpointWriter(folder / "out", specs, metadata, limit, resume=True, join=join, file=file)


@dataclass
class Finished:
    """A tensor that was written: the hash of what was written in each output, and of what was read."""

    name: str
    hashes: list[str]
    inputs: dict[str, str]


class Job:
    """Tensors of one or several recipes with the same inputs, read once."""

    def __init__(
        self, source: FileInputs, plans: Sequence[Plan], writers: Sequence[CheckpointWriter], facts: list
    ):
        self.source, self.writers, self.facts = source, writers, facts
        self.entries = [{entry.name: entry for entry in plan.entries} for plan in plans]

    def merge(self, names: Sequence[str]) -> list[Finished]:
        """Merge some tensors into all outputs."""
        return [self._merge(name) for name in names]

    def _merge(self, name: str) -> Finished:
        entries = [entries[name] for entries in self.entries]
        sinks = [writer.open(name) for writer in self.writers]
        if entries[0].action == "copy":
            self._copy(entries, sinks)
        else:
            facts = [self.facts_for(entry, facts) for entry, facts in zip(entries, self.facts)]
            view, bounds = self.source.view(entries[0]), [entry.bound for entry in entries]
            for i, block in merged_blocks(view, bounds, facts):
                sinks[i].append(rounded(block, entries[i].spec))
        return Finished(name, [sink.close() for sink in sinks], _hashes_read(self.source, entries[0]))

    @staticmethod
    def facts_for(entry: Entry, facts: Any) -> Any:
        """Excluded tensors are averaged, which knows nothing of the recipe's method."""
        return facts if entry.bound.method.prepass or entry.bound.inner else None

    def _copy(self, entries: Sequence[Entry], sinks: Sequence[TensorWriter]) -> None:
        first = entries[0]
        origins = [*(["base"] if first.base else []), *first.sources]
        for block in self.source.agreed(origins, first.name):
            for entry, sink in zip(entries, sinks):
                sink.append(block if block.dtype == torch_dtype(entry.spec) else rounded(block, entry.spec))


def _hashes_read(source: FileInputs, entry: Entry) -> dict[str, str]:
    """Of each checkpoint that a tensor was read from, the hash."""
    origins = [*entry.sources, *(["base"] if entry.base else [])]
    return {o: source.hashes[o, entry.name] for o in origins if (o, entry.name) in source.hashes}


def rounded(value: Tensor, spec: TensorSpec) -> Tensor:
    """The one rounding, to the dtype that is written (raises UserError if it overflows)."""
    result = value.to(torch_dtype(spec))
    if not all_finite(result):
        raise UserError(
            f"tensor '{spec.name}' overflows {result.dtype}; choose a wider dtype or a smaller scale"
        )
    return result


def torch_dtype(spec: TensorSpec) -> torch.dtype:
    return getattr(torch, DTYPES[spec.dtype][0])


# ---------------------------------------------------------------------------------------------- workers

# What a unit of work is sent as: recipes, staging folders and facts, then the device.
Address = tuple[list[tuple[dict[str, Any], str, Any]], str]


def merge_unit(address: Address, names: list[str]) -> list[Finished]:
    """Merge some tensors in a process that knows nothing yet but paths; the staging folders are another's."""
    points, device = address
    plans = [make_plan(recipe) for recipe, _, _ in points]
    keep_freed_memory()
    with ExitStack() as stack:
        stack.enter_context(one_thread(any(plan.is_spectral for plan in plans)))
        source = stack.enter_context(FileInputs(plans[0], device))
        writers = [
            stack.enter_context(closing(_writer(p, Path(f), join=True)))
            for p, (_, f, _) in zip(plans, points)
        ]
        return Job(source, plans, writers, [facts for _, _, facts in points]).merge(names)


def _run(
    source: FileInputs,
    outputs: Sequence[Output],
    pool: Executor,
    executor: Executor | None,
    progress: Progress | None,
) -> None:
    """Merge what the journals do not have, in units, and journal them as they are finished."""
    for output in outputs:
        for line in output.journal.tensors.values():
            source.hashes |= {(origin, line["tensor"]): hash for origin, hash in line["inputs"].items()}
    entries = outputs[0].plan.entries
    left = [e for e in entries if not all(e.name in o.journal.tensors for o in outputs)]

    def record(finished: list[Finished]) -> int:
        for tensor in finished:
            source.hashes |= {(origin, tensor.name): hash for origin, hash in tensor.inputs.items()}
            for output, hash in zip(outputs, tensor.hashes):
                output.writer.hashes[tensor.name] = hash
                output.journal.add_tensor(tensor.name, hash, tensor.inputs)
        return len(finished)

    if executor:
        address = (
            [(o.plan.recipe.model_dump(mode="json"), str(o.folder), o.journal.facts) for o in outputs],
            source.device,
        )
        futures = [executor.submit(merge_unit, address, names) for names in _units(left)]
        counts = (record(future.result()) for future in as_completed(futures))
    else:
        job = Job(
            source, [o.plan for o in outputs], [o.writer for o in outputs], [o.journal.facts for o in outputs]
        )
        # Who merged a tensor journals it, so that a kill finds no finished ones that wait for this thread.
        futures = [pool.submit(lambda name: record(job.merge([name])), entry.name) for entry in left]
        counts = (future.result() for future in as_completed(futures))
    follow(futures, counts, len(entries) - len(left), len(entries), progress)


def run_parts(
    output: Output,
    source: FileInputs,
    pool: Executor,
    write: Callable[[Entry], tuple[dict[str, str], dict[str, Any]]],
    progress: Progress | None,
) -> dict[str, dict[str, Any]]:
    """Write the parts of every tensor that the journal does not have, and journal them as they are finished.

    write(entry): writes them; their hashes, and what is to be remembered of the tensor, JSON values by name. Returns
    what is remembered of every tensor. Tensors without parts are not in the journal.
    """
    journal, entries, left = output.journal, output.plan.entries, []
    remembered: dict[str, dict[str, Any]] = {}
    for entry in entries:
        lines = [journal.tensors.get(name) for name in output.layout.parts[entry.name]]
        if not lines or None in lines:
            left.append(entry)
        else:
            source.hashes |= {(origin, entry.name): hash for origin, hash in lines[0]["inputs"].items()}
            remembered[entry.name] = lines[0].get("remembered", {})

    def finish(entry: Entry) -> int:
        hashes, found = write(entry)
        inputs = _hashes_read(source, entry)
        for name, hash in hashes.items():
            journal.add_tensor(name, hash, inputs, **({"remembered": found} if found else {}))
        remembered[entry.name] = found
        return 1

    futures = [pool.submit(finish, entry) for entry in left]
    counts = (future.result() for future in futures)
    follow(futures, counts, len(entries) - len(left), len(entries), progress)
    return remembered


def follow(
    futures: Sequence[Future], counts: Iterable[int], done: int, total: int, progress: Progress | None
) -> None:
    """Wait for units of work, which finish so many tensors each; if one fails, none is left running."""
    try:
        for count in counts:
            for _ in range(count):
                done += 1
                if progress:
                    progress(done, total)
    except BaseException:
        for future in futures:
            future.cancel()
        wait(futures)  # nothing may write into a folder that is about to be left or removed
        raise


def _units(entries: Sequence[Entry]) -> Iterator[list[str]]:
    """Tensors in their order, in sets of about the same number of bytes."""
    size, names = 0, []
    for entry in entries:
        names.append(entry.name)
        size += sum(info.nbytes for info in entry.inputs)
        if size >= _UNIT_BYTES:
            yield names
            size, names = 0, []
    if names:
        yield names


def _check_inputs(plans: Sequence[Plan]) -> None:
    """Raises UserError unless all recipes read the same tensors in the same way."""
    first, *others = (plan.recipe for plan in plans)
    for field in ("base", "experts", "statistics", "include", "exclude", "excluded", "seed"):
        if any(str(getattr(other, field)) != str(getattr(first, field)) for other in others):
            raise UserError(f"recipes that are merged together need the same {field}; merge them one by one")


def check_device(device: str) -> None:
    """Raises UserError unless it is `cpu`, or a `cuda` or `cuda:N` of this machine."""
    kind, _, index = device.partition(":")
    if device == "cpu":
        return
    if kind != "cuda" or not (index or "0").isdecimal():
        raise UserError(f"device '{device}' is not known; choose cpu, cuda or cuda:N")
    if int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"device '{device}' is not in this machine; choose cpu")


def worker_count(need: int, workers: int | None, memory: int | None) -> int:
    """How many workers: as many as asked for (None: one a core), but no more than fit, at `need` bytes each."""
    workers = workers if workers is not None else os.cpu_count() or 1
    if workers < 1:
        raise UserError(f"{workers} workers: give one or more")
    if memory is None:
        return workers
    if need > memory:
        raise UserError(f"the largest tensor needs {need} bytes of memory, allowed are {memory}; allow more")
    return max(1, min(workers, memory // max(need, 1)))
