"""The plan of a merge, from headers alone: what will be read, computed and written, and every problem at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any, Mapping

from merging.checkpoint import DTYPES, Checkpoint, TensorInfo, open_checkpoint
from merging.errors import UserError, did_you_mean
from merging.methods import Method, get_method
from merging.recipe import Recipe
from merging.writer import TensorSpec

_TORCH_TO_SAFETENSORS = {torch_name: name for name, (torch_name, _) in DTYPES.items()}
_MERGED_BUFFERS = 4  # float64 intermediates a method may hold beside its float32 inputs
_BYTES_PER_SECOND = 1e9  # read, convert and combine on one core
_FLOPS_PER_SECOND = 2e10  # float64 on one core


@dataclass(frozen=True)
class Entry:
    """One output tensor: `merge` it from all experts, or `copy` it from its source."""

    action: str
    spec: TensorSpec
    sources: dict[str, TensorInfo]  # expert name -> tensor; empty where only the base has it
    base: TensorInfo | None

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass
class Plan:
    """A recipe resolved against real headers. `problems` stop the merge; `warnings` do not."""

    recipe: Recipe
    method: Method | None = None
    params: dict[str, Any] = field(default_factory=dict)
    base: Checkpoint | None = None
    experts: dict[str, Checkpoint] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raises UserError with the first problem, if there is one."""
        if self.problems:
            more = len(self.problems) - 1
            raise UserError(self.problems[0] + (f" (and {more} more: see `mergeline plan`)" if more else ""))

    @property
    def bytes_read(self) -> int:
        return sum(t.nbytes for e in self.entries for t in (*e.sources.values(), e.base) if t)

    @property
    def bytes_written(self) -> int:
        return sum(e.spec.nbytes for e in self.entries)

    @property
    def peak_bytes(self) -> int:
        """Memory of one worker at its largest tensor, without the imports."""
        merged = [e for e in self.entries if e.action == "merge"]
        largest = max((prod(e.spec.shape) for e in merged), default=0)
        return largest * (4 * (len(self.experts) + 1) + 8 * _MERGED_BUFFERS)

    @property
    def seconds(self) -> float:
        """A rough estimate for one core."""
        flops = 0.0
        if self.method and self.method.spectral:
            for entry in self.entries:
                if entry.action == "merge" and len(entry.spec.shape) == 2:
                    small, large = sorted(entry.spec.shape)
                    flops += len(self.experts) * (6.0 * large * small**2 + 9.0 * small**3)
        return self.bytes_read / _BYTES_PER_SECOND + flops / _FLOPS_PER_SECOND

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
        _match_tensors(plan)
    return plan


def _resolve_method(plan: Plan) -> None:
    count = len(plan.recipe.experts)
    try:
        plan.method = get_method(plan.recipe.method)
        plan.params = plan.method.resolve(plan.recipe.params)
    except UserError as error:
        plan.problems.append(str(error))
        return
    plan.problems += plan.method.misuses(plan.params, count, plan.recipe.base is not None)
    warning = plan.method.warn and plan.method.warn(count, plan.params)
    if warning:
        plan.warnings.append(warning)


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
            checkpoint = open_checkpoint(path)
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
        for info in checkpoint.tensors.values():
            if info.dtype.startswith("F8"):
                plan.problems.append(
                    f"{name}: tensor '{info.name}' is {info.dtype}; merge a float16 or wider copy"
                )
                break


def _match_tensors(plan: Plan) -> None:
    base = plan.base.tensors if plan.base else {}
    in_experts = sorted({name for c in plan.experts.values() for name in c.tensors})
    plan.problems += _missing(plan, in_experts, base)
    if plan.problems:
        return
    for name in in_experts:
        sources = {e: c.tensors[name] for e, c in plan.experts.items()}
        problem = _mismatch(name, sources, base)
        if problem:
            plan.problems.append(problem)
            continue
        action = "merge" if next(iter(sources.values())).is_float else "copy"
        plan.entries.append(_entry(plan, action, name, sources, base.get(name)))
    carried = sorted(set(base) - set(in_experts))
    for name in carried:
        plan.entries.append(_entry(plan, "copy", name, {}, base[name]))
    if carried:
        plan.warnings.append(
            f"{len(carried)} tensors that only the base has are copied from it, {carried[0]!r} first"
        )
    plan.entries.sort(key=lambda e: e.name)


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
    plan: Plan, action: str, name: str, sources: dict[str, TensorInfo], base: TensorInfo | None
) -> Entry:
    origin = base or next(iter(sources.values()))
    dtype = origin.dtype
    if plan.recipe.dtype and origin.is_float:
        dtype = _TORCH_TO_SAFETENSORS[plan.recipe.dtype]
    spec = TensorSpec(name, dtype, origin.shape, prod(origin.shape) * DTYPES[dtype][1])
    return Entry(action, spec, sources, base)
