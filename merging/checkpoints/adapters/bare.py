"""Bare factors: files of nothing but pairs `NAME.lora_A` (R, N) and `NAME.lora_B` (M, R).

Their product is added to the tensor NAME. Methods that merge what is added read these without a base, too.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Iterable, Mapping

from mergeline.merging.checkpoints.adapters.tensor import adapted
from mergeline.merging.checkpoints.adapters.updates import Added, Factor
from mergeline.merging.checkpoints.checkpoint import Checkpoint
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_BARE = re.compile(r".+\.lora_[AB]")


def is_bare(names: Iterable[str]) -> bool:
    """Whether these tensors are bare factors, in pairs."""
    names = set(names)
    partner = {"A": "B", "B": "A"}
    return bool(names) and all(_BARE.fullmatch(n) and n[:-1] + partner[n[-1]] in names for n in names)


def compose(base: Checkpoint | None, factors: Checkpoint) -> Checkpoint:
    """The checkpoint that bare factors make of their base, or without one what they add (raises UserError)."""
    tensors = dict(base.tensors) if base else {}
    for key, down in factors.tensors.items():
        name, up = key.removesuffix(".lora_A"), factors.tensors.get(key[:-1] + "B")
        if name == key:
            continue
        assert up is not None, "bare factors come in pairs"
        if base and name not in base.tensors:
            raise UserError(
                f"{factors.path}: the base has no '{name}'{did_you_mean(name, base.tensors)}; "
                "name the base that the factors were trained on"
            )
        like = tensors[name] if base else None
        shape = like.shape if like else (*up.shape[:1], *down.shape[1:])
        parts = [part for part in (like, down, up) if part]
        if not (
            all(part.is_float and len(part.shape) == 2 for part in parts)
            and down.shape[0] == up.shape[1]
            and shape == (up.shape[0], down.shape[1])
        ):
            raise UserError(
                f"{factors.path}: factors {list(down.shape)} and {list(up.shape)} do not make '{name}' "
                f"of shape {list(shape)}; name the base that they were trained on"
            )
        update = Added(Factor.of(up), Factor.of(down), 1.0)
        whole = adapted(name, like, shape, update)
        wide = "F64" in {part.dtype for part in parts}
        tensors[name] = replace(whole, dtype="F64") if wide else whole
    return factors.view(tensors)


def composed(
    state: Mapping[str, Tensor], base: Mapping[str, Tensor] | None
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """The same in memory: the state dict, and the factors (M, R) and (R, N) in float64 of what is added."""
    whole, factors = dict(base or {}), {}
    for key, down_RN in state.items():
        if key.endswith(".lora_A"):
            name, up_MR = key.removesuffix(".lora_A"), state[key[:-1] + "B"]
            factors[name] = up_MR.double(), down_RN.double()
            product_MN = factors[name][0] @ factors[name][1]
            start = base[name].double() if base and name in base else 0.0
            whole[name] = (start + product_MN).to(torch.promote_types(up_MR.dtype, torch.float32))
    return whole, factors
