"""The plan of a merge, from headers alone: what will be read, computed and written, and every problem at once."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Iterator, Mapping

from merging.adapters import adapt, compose, is_adapter, is_bare
from merging.checkpoint import DTYPES, Checkpoint, TensorInfo, open_checkpoint
from merging.companions import read_config
from merging.errors import UserError, did_you_mean
from merging.methods import Bound, Method, get_method
from merging.recipe import Recipe, canonical_json
from merging.rules import block_counts, is_merged, parameters_for, values_of
from merging.slots import MASK_BYTES, Unit, block_elements, statistic_shape
from merging.stack import Stack, stack
from merging.tied import without_tied_head
from merging.vocabulary import Alignment, align
from merging.writer import TensorSpec

_TORCH_TO_SAFETENSORS = {torch_name: name for name, (torch_name, _) in DTYPES.items()}
_BLOCK_BUFFERS = 12  # float64 intermediates of the size of a block of all experts
_TENSOR_BUFFERS = 6  # float64 intermediates of the size of a tensor, whatever the number of experts
_SQUARE_BUFFERS = 4  # float64 matrices as large as the smaller side squared
_KEPT_BYTES = 1 << 26  # freed memory that the C library keeps for a worker (engine.keep_freed_memory)
_BYTES_PER_SECOND = 1e9  # a reading: bring, hash, convert and combine on one core
_FLOPS_PER_SECOND = 5e10  # float64 on one core
PARTIAL_STATISTICS = ("gram", "masks")  # tensors without any are merged in a simpler way
# What quantised checkpoints hold beside, or instead of, their weights (GPTQ, AWQ, bitsandbytes, compressed-tensors).
_QUANTISED = (".qweight", ".qzeros", ".absmax", ".quant_map", ".SCB", ".weight_packed", ".weight_scale")


@dataclass(frozen=True)
class Entry:
    """One output tensor: `merge` it from all experts, or `copy` it from its source."""

    action: str
    spec: TensorSpec
    sources: dict[str, TensorInfo]  # expert name -> tensor; empty where only the base's is used
    base: TensorInfo | None
    bound: Bound | None = None  # the method and parameters it is merged with

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def inputs(self) -> list[TensorInfo]:
        return [*self.sources.values(), *([self.base] if self.base else [])]

    @property
    def dtypes(self) -> set[str]:
        """The dtypes of what it is made from."""
        return {info.dtype for info in self.inputs}

    @property
    def unit(self) -> Unit | None:
        """The blocks it is merged in; None if it is copied."""
        return self.bound.unit(self.name, self.spec.shape) if self.bound else None

    @property
    def peak_bytes(self) -> int:
        """Memory that merging it takes, without the imports."""
        count, elements = len(self.sources), prod(self.spec.shape)
        if self.bound is None:
            return 4 * block_elements(1) * 8
        if self.unit != "tensor":
            width = self.spec.shape[-1] if self.unit == "row" and self.spec.shape else 1
            masks = min(elements * count // 8, MASK_BYTES) if self.bound.method.measure else 0
            return min(max(block_elements(count), width), elements) * (count + 1) * 8 * _BLOCK_BUFFERS + masks
        square = min(self.spec.shape) ** 2 if len(self.spec.shape) == 2 else 0
        if "gram" in self.bound.statistics:
            square = max(square, prod(statistic_shape("gram", self.spec.shape)))
        held = count + 2 if self.bound.changes else 0  # experts and bases that wrappers changed
        beside = self.bound.beside(self.spec.shape, count)
        used = 8 * ((_TENSOR_BUFFERS + held) * elements + _SQUARE_BUFFERS * square + beside)
        return with_kept(used)


@dataclass
class Plan:
    """A recipe resolved against real headers. `problems` stop the merge; `warnings` do not."""

    recipe: Recipe
    method: Method | None = None
    params: dict[str, Any] = field(default_factory=dict)
    base: Checkpoint | None = None
    experts: dict[str, Checkpoint] = field(default_factory=dict)
    statistics: dict[str, list[Checkpoint]] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    donor: Path | None = None  # the folder whose configuration and tokenizer are carried over
    alignment: Alignment | None = None  # of vocabularies that differ
    stack: Stack | None = None  # of ranges of layers
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def bound(self) -> Bound:
        """The method with the parameters of the recipe, before any rule."""
        return self.method.bind(self.params)

    @property
    def is_spectral(self) -> bool:
        """Whether matrices are decomposed."""
        return bool(self.method) and self.bound.is_spectral

    def statistics_of(self, kind: str, key: str) -> tuple[Checkpoint, str]:
        """The file of a statistics tensor, and its name there: one file for all experts has keys `INDEX/TENSOR`."""
        files = self.statistics[kind]
        expert, _, name = key.partition("/")
        if len(files) > 1 or len(self.experts) == 1 and expert == "0" and key not in files[0].tensors:
            return files[int(expert)], name
        return files[0], key

    def statistic(self, kind: str, key: str) -> TensorInfo:
        """Where a tensor of the statistics lies (raises UserError if it is missing)."""
        checkpoint, name = self.statistics_of(kind, key)
        if name not in checkpoint.tensors:
            raise UserError(f"{checkpoint.path}: statistics '{kind}': tensor '{name}' is missing")
        return checkpoint.tensors[name]

    def check(self) -> None:
        """Raises UserError with the first problem, if there is one."""
        if self.problems:
            more = len(self.problems) - 1
            raise UserError(self.problems[0] + (f" (and {more} more: see `mergeline plan`)" if more else ""))

    @property
    def bytes_read(self) -> int:
        return sum(t.nbytes for e in self.entries for t in e.inputs)

    @property
    def bytes_written(self) -> int:
        return sum(e.spec.nbytes for e in self.entries)

    @property
    def peak_bytes(self) -> int:
        """Memory of one worker at the tensor that takes most, without the imports."""
        return max((entry.peak_bytes for entry in self.entries), default=0)

    @property
    def seconds(self) -> float:
        """A rough estimate for one core."""
        bytes_read = flops = 0.0
        for entry in self.entries:
            readings = 1 + (bool(entry.bound.method.measure) + 3 * entry.bound.has_prepass if entry.bound else 0)
            bytes_read += readings * sum(info.nbytes for info in entry.inputs)
            if entry.bound and entry.bound.is_spectral and len(entry.spec.shape) == 2:
                small, large = sorted(entry.spec.shape)
                flops += len(self.experts) * (2.0 * large * small**2 + 6.0 * small**3)
        return bytes_read / _BYTES_PER_SECOND + flops / _FLOPS_PER_SECOND

    def table(self) -> Iterator[dict[str, Any]]:
        """What becomes of every tensor: its action, method and parameters."""
        for entry in self.entries:
            row = {"tensor": entry.name, "shape": list(entry.spec.shape), "action": entry.action}
            if entry.bound:
                row |= {"method": entry.bound.method.id, "params": entry.bound.flat}
            yield row

    def summary(self) -> dict[str, Any]:
        """What `mergeline plan` prints."""
        return {
            "method": self.recipe.method,
            "params": self.params,
            "tensors": {a: sum(e.action == a for e in self.entries) for a in ("merge", "copy")},
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "peak_bytes": self.peak_bytes,
            "seconds": round(self.seconds, 1),
            "problems": self.problems,
            "warnings": self.warnings,
        }


def with_kept(used: int) -> int:
    """So many bytes that a worker uses, and what of them the C library keeps when they are freed."""
    return used + min(used, _KEPT_BYTES)


def make_plan(recipe: Recipe | Mapping[str, Any]) -> Plan:
    """Resolve a recipe against the headers of its checkpoints; reads no tensor data and never raises for them.

    Raises:
        UserError: the recipe itself has unknown keys or values of the wrong type.
    """
    recipe = Recipe.of(recipe)
    plan = Plan(recipe)
    _resolve_method(plan)
    _open(plan)
    if not plan.problems:
        _find_donor(plan)
    if not plan.problems:
        _stack_layers(plan) if recipe.stack else _match_tensors(plan)
    return plan


def _resolve_method(plan: Plan) -> None:
    count = 1 if plan.recipe.stack else len(plan.recipe.experts)  # of each tensor
    try:
        plan.method = get_method(plan.recipe.method)
        plan.params = plan.method.resolve(plan.recipe.params)
    except UserError as error:
        plan.problems.append(str(error))
        return
    plan.problems += plan.method.misuses(
        plan.params, count, plan.recipe.base is not None, plan.recipe.statistics
    )
    plan.warnings += plan.method.warnings(plan.params, count)


def _open(plan: Plan) -> None:
    if "base" in plan.recipe.experts:
        plan.problems.append("an expert has the name 'base', which is the base checkpoint's; give it another")
        return
    seen: dict[Any, str] = {}
    for name, path in {
        **plan.recipe.experts,
        **({"base": plan.recipe.base} if plan.recipe.base else {}),
    }.items():
        try:
            checkpoint = without_tied_head(open_checkpoint(path))
            plan.problems += _quantised(name, checkpoint)
        except UserError as error:
            plan.problems.append(f"{name}: {error}")
            continue
        real = path.resolve()
        if real in seen:
            plan.problems.append(
                f"'{name}' and '{seen[real]}' are the same checkpoint, {path}; give each its own"
            )
        seen[real] = name
        if path is plan.recipe.base:
            plan.base = checkpoint
        else:
            plan.experts[name] = checkpoint
    _adapt(plan)
    for kind, paths in plan.recipe.statistics.items():
        try:
            plan.statistics[kind] = [
                open_checkpoint(p) for p in (paths if isinstance(paths, list) else [paths])
            ]
        except UserError as error:
            plan.problems.append(f"statistics '{kind}': {error}")


def _adapt(plan: Plan) -> None:
    """Let experts that are adapters stand for the base as they change it."""
    adapters = {name: c for name, c in plan.experts.items() if is_adapter(c)}
    delta = plan.method is not None and plan.method.delta
    if adapters and not plan.recipe.base and delta:
        plan.problems.append(f"'{next(iter(adapters))}' is a PEFT adapter: name the base that it adds to")
    elif adapters and not plan.recipe.base:
        plan.warnings.append(
            f"'{next(iter(adapters))}' is an adapter: without a base its factors are merged as they are; name the base"
        )
    for name, adapter in adapters.items() if plan.base else ():
        try:
            plan.experts[name] = adapt(plan.base, adapter)
        except UserError as error:
            plan.problems.append(f"{name}: {error}")
    for name, factors in plan.experts.items():
        if is_bare(factors.tensors) and (plan.base or delta):
            try:
                plan.experts[name] = compose(plan.base, factors)
            except UserError as error:
                plan.problems.append(f"{name}: {error}")


def _find_donor(plan: Plan) -> None:
    """The named donor; or else the base, or the first expert where there is no base, if it is a folder."""
    known = {**({"base": plan.base} if plan.base else {}), **plan.experts}
    name = plan.recipe.donor
    if name is not None and name not in known:
        plan.problems.append(f"donor '{name}' is neither the base nor an expert{did_you_mean(name, known)}")
        return
    path = known[name or next(iter(known))].path
    if path.is_dir():
        plan.donor = path
    elif name is not None:
        plan.problems.append(
            f"donor '{name}': {path} is one file, with no configuration of its own; name a folder"
        )
    try:
        plan.problems += _other_architectures(known)
        read_config(path)
    except UserError as error:
        plan.problems.append(f"{name or next(iter(known))}: {error}")
        return
    _align(plan, known, name or next(iter(known)))


def _other_architectures(checkpoints: Mapping[str, Checkpoint]) -> Iterator[str]:
    """A sentence for each checkpoint whose configuration names another kind of model than the first's."""
    kinds: dict[str, str] = {}
    for name, checkpoint in checkpoints.items():
        kind = read_config(checkpoint.folder).get("model_type") if checkpoint.path.is_dir() else None
        if isinstance(kind, str):
            kinds[name] = kind
    first = next(iter(kinds), "")
    for name, kind in kinds.items():
        if kind != kinds[first]:
            yield f"'{name}' is a {kind} model, '{first}' a {kinds[first]}: only one architecture can be merged"


def _align(plan: Plan, checkpoints: dict[str, Checkpoint], donor: str) -> None:
    """Give embeddings of different vocabularies the same rows."""
    try:
        plan.alignment = align(checkpoints, donor, plan.recipe.vocabulary == "union")
    except UserError as error:
        plan.problems.append(str(error))
    if plan.alignment:
        plan.base = plan.alignment.checkpoints.get("base")
        plan.experts = {name: plan.alignment.checkpoints[name] for name in plan.experts}
        plan.warnings += plan.alignment.notes


def _quantised(name: str, checkpoint: Checkpoint) -> Iterator[str]:
    """A sentence if the checkpoint holds fp8 or packed integer weights, which cannot be merged as they are."""
    for info in checkpoint.tensors.values():
        if info.dtype.startswith("F8"):
            yield f"{name}: tensor '{info.name}' is {info.dtype}; merge a float16 or wider copy"
            return
        if info.name.endswith(_QUANTISED):
            yield f"{name}: is quantised (tensor '{info.name}'); merge the float16 or wider model it was made from"
            return
    config = read_config(checkpoint.path).get("quantization_config") if checkpoint.path.is_dir() else None
    if isinstance(config, dict) and not all(info.is_float for info in checkpoint.tensors.values()):
        kind = config.get("quant_method") or "quantization_config"
        yield f"{name}: is quantised ({kind} in config.json); merge the float16 or wider model it was made from"


def _stack_layers(plan: Plan) -> None:
    try:
        plan.stack = stack(plan.experts, plan.recipe.stack)
    except UserError as error:
        plan.problems.append(str(error))
        return
    plan.experts = plan.stack.checkpoints
    for name, expert in sorted(plan.stack.origin.items()):
        plan.entries.append(_entry(plan, "copy", name, {expert: plan.experts[expert].tensors[name]}, None))


def _match_tensors(plan: Plan) -> None:
    base = plan.base.tensors if plan.base else {}
    in_experts = sorted({name for c in plan.experts.values() for name in c.tensors})
    plan.problems += _missing(plan, in_experts, base)
    if plan.problems:
        return
    bounds = _Bounds(plan, in_experts)
    for name in in_experts:
        sources = {e: c.tensors[name] for e, c in plan.experts.items()}
        problem = _mismatch(name, sources, base)
        if problem:
            plan.problems.append(problem)
            continue
        if not next(iter(sources.values())).is_float:
            plan.entries.append(_entry(plan, "copy", name, sources, base.get(name)))
        elif not is_merged(plan.recipe, name) and plan.recipe.excluded == "base":
            plan.entries.append(_entry(plan, "copy", name, {}, base.get(name)))
        else:
            plan.entries.append(_entry(plan, "merge", name, sources, base.get(name), bounds.of(name)))
    carried = sorted(set(base) - set(in_experts))
    for name in carried:
        plan.entries.append(_entry(plan, "copy", name, {}, base[name]))
    if carried:
        plan.warnings.append(
            f"{len(carried)} tensors that only the base has are copied from it, {carried[0]!r} first"
        )
    plan.entries.sort(key=lambda e: e.name)
    plan.problems += _statistics_mismatches(plan)


def _statistics_mismatches(plan: Plan) -> Iterator[str]:
    """A sentence for each kind of statistics with too few or many files, or with a tensor of another shape or none."""
    shapes = {entry.name: entry.spec.shape for entry in plan.entries}
    merged = [e.name for e in plan.entries if e.bound and e.bound.method is plan.method and prod(e.spec.shape)]
    for kind, files in plan.statistics.items():
        if len(files) not in (1, len(plan.experts)):
            yield f"statistics '{kind}': {len(files)} files for {len(plan.experts)} experts; one an expert, in order"
        for file in files:
            for key, info in file.tensors.items():
                shape = shapes.get(key, shapes.get(key.partition("/")[2]))
                shape = info.shape if shape is None else statistic_shape(kind, shape)
                if info.shape != shape:
                    yield (
                        f"statistics '{kind}': '{key}' of {file.path} has shape {list(info.shape)}, "
                        f"the tensor {list(shape)}"
                    )
                    break
        if len(files) in (1, len(plan.experts)) and kind not in PARTIAL_STATISTICS:
            yield from _missing_statistics(plan, kind, merged)


def _missing_statistics(plan: Plan, kind: str, names: list[str]) -> Iterator[str]:
    """A sentence if a tensor that is merged has no statistics."""
    for t, expert in enumerate(plan.experts):
        for name in names:
            checkpoint, key = plan.statistics_of(kind, f"{t}/{name}")
            for_all = len(plan.statistics[kind]) == 1 and name in checkpoint.tensors
            if not for_all and key not in checkpoint.tensors:
                yield f"statistics '{kind}' of expert '{expert}' lack the tensor '{name}'"
                return


class _Bounds:
    """The method of each tensor with the parameters that the rules give it; mistakes in them become problems, once."""

    def __init__(self, plan: Plan, names: list[str]):
        self.plan = plan
        self.counts = block_counts(names)
        self._known: dict[str, Bound] = {}
        recipe = plan.recipe
        if recipe.excluded == "base" and recipe.base is None and not all(is_merged(recipe, n) for n in names):
            plan.problems.append(
                "excluded tensors become the base's: name a base, or set `excluded: average`"
            )
        for rule in recipe.rules:
            if not any(values_of(rule, name, self.counts) for name in names if is_merged(recipe, name)):
                plan.warnings.append(
                    f"a rule changes nothing: match {json.dumps(rule.match)}, layers {rule.layers}"
                )

    def of(self, name: str) -> Bound:
        if not is_merged(self.plan.recipe, name):
            return get_method("average").bind({})
        params = parameters_for(self.plan.recipe, name, self.counts)
        key = canonical_json(params)
        if key not in self._known:
            self._known[key] = self._bind(name, params)
        return self._known[key]

    def _bind(self, name: str, params: dict[str, Any]) -> Bound:
        plan, method = self.plan, self.plan.method
        try:
            resolved = method.resolve(params)
        except UserError as error:
            plan.problems.append(f"tensor '{name}': {error}")
            return plan.bound
        if resolved == plan.params:
            return plan.bound
        misuses = method.misuses(resolved, len(plan.experts), plan.base is not None, plan.recipe.statistics)
        plan.problems += [f"tensor '{name}': {problem}" for problem in misuses]
        bound = method.bind(resolved)
        for key in sorted(_global_parameters(plan.bound) | _global_parameters(bound)):
            if resolved.get(key) != plan.params.get(key):
                plan.problems.append(
                    f"tensor '{name}': {method.id} measures the whole model with '{key}', which a rule cannot change"
                )
        return bound


def _global_parameters(bound: Bound) -> set[str]:
    """Parameters that a pre-pass over the whole model depends on."""
    names: set[str] = set()
    for level in reversed(list(bound.chain)):
        if names:  # of a method inside, which sees what these make of the experts
            names.update(level.names.values(), level.origin.names.values() if level.origin else ())
        for part in filter(None, (level, level.origin)):
            if part.own_prepass:
                signature = inspect.signature(part.method.prepass).parameters.values()
                names.update(part.names[p.name] for p in signature if p.kind is p.KEYWORD_ONLY)
    return names


def _missing(plan: Plan, names: list[str], base: dict[str, TensorInfo]) -> list[str]:
    problems = []
    expected = [name for name in names if not base or name in base]
    for expert, checkpoint in plan.experts.items():
        lacking = [name for name in expected if name not in checkpoint.tensors]
        if lacking:
            near = did_you_mean(lacking[0], sorted(set(checkpoint.tensors) - set(base))) if base else ""
            problems.append(
                f"expert '{expert}' lacks {len(lacking)} tensor(s) that others have, first '{lacking[0]}'{near}"
            )
        extra = [name for name in checkpoint.tensors if base and name not in base]
        if extra:
            problems.append(
                f"the base lacks {len(extra)} tensor(s) of '{expert}', first '{extra[0]}': is it its base?"
            )
    return problems


def _mismatch(name: str, sources: dict[str, TensorInfo], base: dict[str, TensorInfo]) -> str | None:
    reference_name, reference = ("base", base[name]) if base else next(iter(sources.items()))
    for expert, info in sources.items():
        if info.shape != reference.shape:
            return (
                f"tensor '{name}': shape {list(info.shape)} in expert '{expert}', "
                f"{list(reference.shape)} in '{reference_name}'"
            )
        if info.is_float != reference.is_float or (not info.is_float and info.dtype != reference.dtype):
            return (
                f"tensor '{name}': {info.dtype} in expert '{expert}', {reference.dtype} in '{reference_name}'"
            )
    return None


def _entry(
    plan: Plan,
    action: str,
    name: str,
    sources: dict[str, TensorInfo],
    base: TensorInfo | None,
    bound: Bound | None = None,
) -> Entry:
    origin = base or next(iter(sources.values()), None) or next(iter(plan.experts.values())).tensors[name]
    dtype = origin.dtype
    if plan.recipe.dtype and origin.is_float:
        dtype = _TORCH_TO_SAFETENSORS[plan.recipe.dtype]
    spec = TensorSpec(name, dtype, origin.shape, prod(origin.shape) * DTYPES[dtype][1])
    return Entry(action, spec, sources, base, bound)
