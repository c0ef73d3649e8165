"""LoRA of packed experts (`target_parameters`): what it adds to each expert, packed on disk or one by one.

PEFT's `ParamWrapper` has factors for all E experts in two matrices: `lora_A` (E * R, inputs), expert by expert, and
`lora_B` (outputs, R * E), whose columns PEFT orders by rank first, then by expert; Unsloth by expert first. Files do
not say which of the two wrote them.
"""

from __future__ import annotations

from typing import Literal, Mapping

from mergeline.merging.checkpoints.adapters.config import AdapterConfig
from mergeline.merging.checkpoints.adapters.names import BaseNames
from mergeline.merging.checkpoints.adapters.tensor import adapted
from mergeline.merging.checkpoints.adapters.updates import Added, Factor, Packed
from mergeline.merging.checkpoints.checkpoint import TensorInfo
from mergeline.merging.errors import UserError

Packing = Literal["peft", "unsloth"]


def adapt_experts(
    tensors: Mapping[str, TensorInfo],
    names: BaseNames,
    module: str,
    parts: Mapping[str, TensorInfo],
    config: AdapterConfig,
    packing: Packing,
    notes: list[str],
) -> dict[str, TensorInfo]:
    """What the factors of a module make of the parameter of it that they fit.

    Raises:
        UserError: they fit none, or more than one.
    """
    down, up = parts.get("A"), parts.get("B")
    if set(parts) != {"A", "B"} or down is None or up is None or len(down.shape) != 2 or len(up.shape) != 2:
        raise UserError(
            f"{config.path}: module '{module}' lacks one of its factors; download the adapter again"
        )
    plain = module.replace(".base_layer", "")
    targets = config.values.get("target_parameters")
    wanted = [t for t in targets if isinstance(t, str)] if isinstance(targets, list) else []
    found = []
    for parameter, disk in names.parameters(plain):
        if any(f".{plain}.{parameter}".endswith(f".{target}") for target in wanted):
            stacked = _Stacked.of({name: tensors[name] for name in disk}, names, down, up)
            if stacked:
                found.append((parameter, stacked))
    if len(found) != 1:
        fits = f"{len(found)} parameters" if found else "no parameter"
        raise config.misfit(
            f"factors {list(down.shape)} and {list(up.shape)} of '{module}' fit {fits} of target_parameters"
        )
    [(parameter, stacked)] = found
    note = (
        f"LoRA of packed experts is read as {'PEFT' if packing == 'peft' else 'Unsloth'} packs it, which its file does "
        f"not say: set `packing: {'unsloth' if packing == 'peft' else 'peft'}` if the other wrote it"
    )
    if stacked.rank > 1 and note not in notes:
        notes.append(note)
    return stacked.adapted(config, plain, parameter, packing)


class _Stacked:
    """The experts of a parameter as they lie on disk, (E, outputs, inputs) or one by one, and the factors of all."""

    def __init__(
        self,
        infos: Mapping[str, TensorInfo],
        experts: int,
        heights: list[int],
        swapped: bool,
        down: TensorInfo,
        up: TensorInfo,
    ):
        """heights: outputs of each part of an expert, where they lie one by one. swapped: (E, inputs, outputs)."""
        self.infos, self.experts, self.heights, self.swapped = infos, experts, heights, swapped
        self.down, self.up, self.rank = down, up, down.shape[0] // experts

    @classmethod
    def of(
        cls, infos: Mapping[str, TensorInfo], names: BaseNames, down: TensorInfo, up: TensorInfo
    ) -> _Stacked | None:
        """None if the factors do not fit."""
        first, one = next(iter(infos.items()))
        if not all(info.is_float for info in (*infos.values(), down, up)):
            return None
        swapped, heights = False, list[int]()
        if len(infos) == 1 and len(one.shape) in (2, 3):
            experts, *sides = one.shape if len(one.shape) == 3 else (1, *one.shape)
            if up.shape[0] == down.shape[1] == sides[0] == sides[1] and experts > 1:
                packed = names.role(first).packed
                if packed is None:
                    return None
                swapped = packed.transposed
            elif (up.shape[0], down.shape[1]) != tuple(sides):
                swapped = True
                if (down.shape[1], up.shape[0]) != tuple(sides) or experts == 1:
                    return None
        else:
            parts = names.parts_of_expert(first)
            experts = len(infos) // parts
            heights = [info.shape[0] if len(info.shape) == 2 else 0 for info in list(infos.values())[:parts]]
            shapes = [(height, down.shape[1]) for height in heights] * experts
            if [info.shape for info in infos.values()] != shapes or sum(heights) != up.shape[0]:
                return None
        if not experts or not down.shape[0] or down.shape[0] % experts or up.shape[1] != down.shape[0]:
            return None
        return cls(infos, experts, heights, swapped, down, up)

    def adapted(
        self, config: AdapterConfig, module: str, parameter: str, packing: Packing
    ) -> dict[str, TensorInfo]:
        """The tensors on disk with what is added to them."""
        scaling = config.lora_scaling(f"{module}.{parameter}", self.rank)
        if not self.heights:
            [(name, info)] = self.infos.items()
            rows = range(self.up.shape[0])
            updates = tuple(self._update(e, rows, scaling, packing) for e in range(self.experts))
            whole = updates[0] if self.experts == 1 else Packed(updates, info.shape[1])
            return {name: adapted(name, info, info.shape, whole, f"{module}.{parameter}")}
        found: dict[str, TensorInfo] = {}
        for i, (name, info) in enumerate(self.infos.items()):
            expert, part = divmod(i, len(self.heights))
            start = sum(self.heights[:part])
            update = self._update(expert, range(start, start + self.heights[part]), scaling, packing)
            found[name] = adapted(name, info, info.shape, update, name.removesuffix(".weight"))
        return found

    def _update(self, expert: int, rows: range, scaling: float, packing: Packing) -> Added:
        """What is added to one expert: these rows of its outputs."""
        first, count = expert * self.rank, self.experts * self.rank
        columns = range(expert, count, self.experts) if packing == "peft" else range(first, first + self.rank)
        left = Factor(self.up, rows, columns)
        right = Factor(self.down, range(first, first + self.rank), range(self.down.shape[1]))
        if not self.swapped:
            return Added(left, right, scaling)
        return Added(
            Factor(right.info, right.of_rows, right.of_columns, transposed=True),
            Factor(left.info, left.of_rows, left.of_columns, transposed=True),
            scaling,
        )
