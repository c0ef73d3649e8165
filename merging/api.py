"""Merge checkpoints: file to file, tensor by tensor, or state dicts in memory; the same kernels serve both."""

from __future__ import annotations

import os
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping, Sequence

from mergeline.merging.algebra.slots import FactorStore, Runner
from mergeline.merging.architecture import RUNNING_STATISTICS, Role
from mergeline.merging.compress import compress
from mergeline.merging.engine.blocks import look_at_model, merged_blocks
from mergeline.merging.engine.machine import check_device, one_thread
from mergeline.merging.engine.manifest import Manifest
from mergeline.merging.engine.opening import Headers
from mergeline.merging.engine.output import opened, publish_all
from mergeline.merging.engine.plan import Plan
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.engine.sources import MemoryInputs, State, refuse_nonfinite
from mergeline.merging.engine.work import MergeJob, Progress, requantised, run
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch
from mergeline.merging.methods.bound import bind
from mergeline.merging.methods.contract import get_method
from mergeline.merging.recipes.recipe import Recipe, unfolded

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


def merge(
    recipe: Recipe | Mapping[str, Any] | Plan,
    out: str | os.PathLike,
    *,
    device: str = "cpu",
    memory: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    factors: str | os.PathLike | None = None,
    executor: Executor | None = None,
    force: bool = False,
) -> Manifest:
    """Merge checkpoints on disk into `out`: a `*.safetensors` file, or a folder with manifest, card and configs.

    recipe: what to merge, or the plan that was made of it (`merging.engine.planning.make_plan`), which is believed.
    One with a router makes a compressed store (`merging.compress`).

    The bytes written do not depend on `workers`, `memory` (an upper bound in bytes, the imports not counted),
    `factors` (a folder that keeps spectral decompositions for the next merge) or `executor` (runs units of work
    elsewhere: any concurrent.futures.Executor whose processes see the same files, such as a Dask client's).
    A merge that was killed goes on where it was when it is started again. `progress(done, all)` is called after each
    tensor. `force` replaces what is no earlier merge, but no input, link or repository, nor a folder that holds the
    current one. Returns the manifest.

    Raises:
        UserError: anything `plan` reports, an expert that is locked against merging (see `merging.engine.mergelock`),
            NaN or Inf in an input, one that changes while it is read, an overflow of the output dtype, a full or
            failing disk, another process writing `out`, `memory` below what one tensor needs, an `out` that holds
            anything but an earlier merge.
    """
    plan = recipe if isinstance(recipe, Plan) else make_plan(recipe)
    if plan.recipe.router:
        return compress(
            plan, out, device=device, memory=memory, workers=workers, progress=progress, factors=factors, force=force
        )  # fmt: skip
    return merge_points(
        [(plan, out)],
        device=device,
        memory=memory,
        workers=workers,
        progress=progress,
        factors=factors,
        executor=executor,
        force=force,
    )[0]


def merge_points(
    points: Sequence[tuple[Recipe | Mapping[str, Any] | Plan, str | os.PathLike]],
    *,
    device: str = "cpu",
    memory: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    factors: str | os.PathLike | None = None,
    executor: Executor | None = None,
    force: bool = False,
) -> list[Manifest]:
    """Merge several recipes with the same inputs from one reading of them; see `merge`."""
    headers = Headers()
    plans = [recipe if isinstance(recipe, Plan) else make_plan(recipe, headers) for recipe, _ in points]
    for plan in plans:
        plan.check()
    _check_inputs(plans)
    outs = [Path(out) for _, out in points]
    with opened(
        plans, outs, device=device, memory=memory, workers=workers, factors=factors,
        need=max(plan.peak_bytes for plan in plans), lapack=any(plan.is_spectral for plan in plans),
        force=force, executor=executor,
    ) as (source, outputs, pool):  # fmt: skip
        found = [output.journal.facts for output in outputs]
        job = MergeJob(source, plans, [output.writer for output in outputs], found)
        remembered = run(source, outputs, job.write, pool, progress, executor)
        for output in outputs:
            output.writer.finish()
        each = [requantised(remembered, i) for i in range(len(outputs))]
        return publish_all(outputs, source, device, each=each)


def merge_state_dicts(
    method: str,
    experts: Mapping[str, State | Module] | Sequence[State | Module],
    base: State | Module | None = None,
    *,
    params: Mapping[str, Any] | None = None,
    statistics: Mapping[str, Any] | None = None,
    seed: int = 0,
    factors: FactorStore | None = None,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Merge state dicts in memory; inputs are not modified, each output tensor has the dtype of its input.

    method: an id, or a chain of wrappers such as `lines(dare(ties))`.
    experts: a state dict, or a module of torch, by name; or a list of them. base: the same of one.
    statistics: name -> one state dict an expert (a list), or one for all. Tensors that only `base` has are returned
    as they are; integer and bool tensors must agree, but for the counters of BatchNorm, of which the largest is taken,
    and whose running means and variances are averaged. device: where it is computed; what is returned is on the CPU.

    Raises:
        UserError: unknown method or parameter, missing base, what is no state dict, tensors that do not match, NaN or
            Inf, a device that is not here.
    """
    return merge_state_dicts_points(
        method, experts, base, points=[params or {}], statistics=statistics, seed=seed, factors=factors,
        device=device,
    )[0]  # fmt: skip


def merge_state_dicts_points(
    method: str,
    experts: Mapping[str, State | Module] | Sequence[State | Module],
    base: State | Module | None = None,
    *,
    points: Sequence[Mapping[str, Any]],
    statistics: Mapping[str, Any] | None = None,
    seed: int = 0,
    factors: FactorStore | None = None,
    device: str = "cpu",
) -> list[dict[str, Tensor]]:
    """Merge state dicts with several `params` in one pass, which shares what they have in common."""
    check_device(device)
    states, origin = _named_states(experts), None if base is None else _state("the base", base)
    bounds = []
    for params in points:
        try:
            id, params = unfolded(method, params)
        except ValueError as error:
            raise UserError(str(error)) from None
        entry = get_method(id)
        resolved = entry.resolve(params)
        for misuse in entry.misuses(resolved, len(states), origin is not None, statistics):
            raise UserError(misuse)
        bounds.append(bind(entry, resolved))
    source = MemoryInputs(states, origin, statistics or {}, seed, factors, entry.delta, device)
    merged: list[dict[str, Tensor]] = [{} for _ in points]
    averages = [bind(get_method("average"), {})] * len(points), [None] * len(points)
    roles = {name: source.model.tensors[name].role for name in source.names}
    with one_thread(any(bound.is_spectral for bound in bounds)):
        known: dict[Any, Any] = {}
        floats = [name for name in source.names if source.first[name].is_floating_point()]
        views = [source.view(name) for name in floats if roles[name] not in RUNNING_STATISTICS]
        found = [look_at_model(bound, views, Runner(), known) for bound in bounds]
        for name in source.names:
            like = source.first[name]
            parts: list[list[Tensor]] = [[] for _ in points]
            if like.is_floating_point():
                own = averages if roles[name] in RUNNING_STATISTICS else (bounds, found)
                for i, block in merged_blocks(source.view(name), *own):
                    parts[i].append(block.reshape(-1).to(like.dtype).cpu())
            else:
                origins = [*(["base"] if origin is not None else []), *states]
                for block in source.copied(origins, name, roles[name] is Role.COUNTER):
                    for blocks in parts:
                        blocks.append(block.clone())
            for state, blocks in zip(merged, parts):
                state[name] = torch.cat(blocks).reshape(like.shape) if blocks else like.clone()
    only_base = {name: tensor for name, tensor in (origin or {}).items() if name not in source.first}
    for name, tensor in only_base.items():
        refuse_nonfinite("base", name, tensor)
    return [{**only_base, **state} for state in merged]


def _named_states(experts: Any) -> dict[str, State]:
    """State dicts by name, of a mapping or a list of them or of modules (raises UserError for anything else)."""
    if isinstance(experts, list | tuple):
        experts = {str(i): expert for i, expert in enumerate(experts)}
    if not isinstance(experts, Mapping):
        raise UserError(
            f"experts are a {type(experts).__name__}; give state dicts by name, such as {{'a': a.state_dict(), ...}}"
        )
    return {str(name): _state(f"'{name}'", expert) for name, expert in experts.items()}


def _state(what: str, given: Any) -> State:
    """A state dict, or that of a module (raises UserError for anything else)."""
    if isinstance(given, torch.nn.Module):
        return given.state_dict()
    if not isinstance(given, Mapping):
        raise UserError(f"{what} is a {type(given).__name__}; give a state dict, names to tensors")
    for name, value in given.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            inside = f"; give its ['{name}']" if name == "state_dict" and isinstance(value, Mapping) else ""
            raise UserError(
                f"{what} is no state dict: its {name!r} is a {type(value).__name__}, no tensor{inside}"
            )
    return given


def _check_inputs(plans: Sequence[Plan]) -> None:
    """Raises UserError unless all recipes read the same tensors in the same way."""
    first, *others = (plan.recipe for plan in plans)
    for field in ("base", "experts", "statistics", "include", "exclude", "excluded", "keep", "seed"):
        if any(str(getattr(other, field)) != str(getattr(first, field)) for other in others):
            raise UserError(f"recipes that are merged together need the same {field}; merge them one by one")
