"""An entry of a plan: what is written for one tensor, and in which dtype."""

from __future__ import annotations

from math import prod
from typing import Sequence

from mergeline.merging.checkpoints.adapters import AdaptedTensor
from mergeline.merging.checkpoints.checkpoint import DTYPES, TensorInfo, common_dtype
from mergeline.merging.checkpoints.writer import TensorSpec
from mergeline.merging.engine.plan import Action, Entry, Plan
from mergeline.merging.methods.bound import Bound

_TORCH_TO_SAFETENSORS = {torch_name: name for name, (torch_name, _) in DTYPES.items()}


def _widest(infos: Sequence[TensorInfo]) -> str:
    """The dtype that holds all of these; an adapted tensor counts as what it adds to."""
    return common_dtype(
        (info.base or info).dtype if isinstance(info, AdaptedTensor) else info.dtype for info in infos
    )


def make_entry(
    plan: Plan,
    action: Action,
    name: str,
    sources: dict[str, TensorInfo],
    base: TensorInfo | None,
    bound: Bound | None = None,
) -> Entry:
    """The entry of a tensor: `sources` by expert, and what the base has; in the dtype that the recipe says."""
    origin = base or next(iter(sources.values()), None) or next(iter(plan.experts.values())).tensors[name]
    dtype = origin.dtype
    if plan.recipe.dtype == "widest" and origin.is_float:
        dtype = _widest([*sources.values(), *([base] if base else [])] or [origin])
    elif plan.recipe.dtype and origin.is_float:
        dtype = _TORCH_TO_SAFETENSORS[plan.recipe.dtype]
    spec = TensorSpec(name, dtype, origin.shape, prod(origin.shape) * DTYPES[dtype][1])
    return Entry(action, spec, sources, base, bound, plan.model)
