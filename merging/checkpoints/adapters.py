"""Adapters as experts: the base with a LoRA, rsLoRA or DoRA update, computed block by block as it is read.

What PEFT writes, or bare factors: a file of nothing but pairs `NAME.lora_A` (R, N) and `NAME.lora_B` (M, R), whose
product is added to the tensor NAME; these also without a base, for methods that merge what is added.

Shape suffixes: M rows and N columns (all dimensions but the first) of the base's tensor, R the adapter's rank.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterable, Mapping

from mergeline.merging.checkpoints.checkpoint import Checkpoint, TensorInfo
from mergeline.merging.checkpoints.companions import hub_id, source_of
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.files import read_object
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# A regular expression that repeats a group, or repeats more often, may take exponential time to match.
_REPEATS, _REPEATED, _MOST_REPEATS = re.compile(r"[*+{]"), re.compile(r"\)[*+{]"), 3
_LARGEST = 3e38  # of float32
PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(?:\.default)?(?:\.weight)?")
_BARE = re.compile(r".+\.lora_[AB]")
_BLOCK = 1 << 16  # elements of a block of rows, at least
# Initialisations that change the base itself: what the adapter adds to is not the published base.
_RESIDUAL_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdaptedTensor(TensorInfo):
    """A tensor of the base with `scaling * up @ down` added, in float32 (float64 if the base's is).

    transposed: the base's tensor is (in, out), as of an embedding or GPT-2's Conv1D. magnitude: DoRA's norm of each
    row. Rows are computed in blocks that depend on the shapes alone, so that their bits do not depend on what is read.
    """

    base: TensorInfo | None  # None: what is added alone
    down: TensorInfo  # (R, N), or (R, M) if transposed
    up: TensorInfo  # (M, R), or (N, R) if transposed
    scaling: float
    transposed: bool = False
    magnitude: TensorInfo | None = None
    _last: threading.local = field(default_factory=threading.local, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """What is read for it."""
        return self.bytes_in(lambda file: True)

    def bytes_in(self, counts: Callable[[Path], bool]) -> int:
        parts = (self.base, self.down, self.up, self.magnitude)
        return sum(part.bytes_in(counts) for part in parts if part)

    def read(self, elements: Callable[[TensorInfo, int, int], Tensor], start: int, stop: int) -> Tensor:
        rank, width = self.down.shape[0], prod(self.shape[1:])
        step = (
            max(rank, -(-_BLOCK // max(width, 1))) * width
        )  # as many rows as it takes to read `down` once for them
        parts = []
        for first in range(start // step * step, stop, step) if step else ():
            block = getattr(self._last, "block", None)
            if block is None or block[0] != first:
                last = min(first + step, prod(self.shape))
                block = (first, self._rows(elements, first // width, last // width))
            self._last.block = block if first + step < prod(self.shape) else None
            parts.append(block[1][max(start - first, 0) : stop - first])
        if not parts:
            return elements(self.base or self.up, 0, 0)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def factors(self, elements: Callable[[TensorInfo, int, int], Tensor]) -> tuple[Tensor, Tensor] | None:
        """(M, R) and (R, N) in float64, whose product is what is added to the base; None if that is no product."""
        down, up = (
            elements(part, 0, prod(part.shape)).double().reshape(part.shape[0], -1)
            for part in (self.down, self.up)
        )
        if self.magnitude:
            return None
        left_MR, right_RN = (down.T, up.T) if self.transposed else (up, down)
        return left_MR * self.scaling, right_RN

    @property
    def rank(self) -> int | None:
        """Of the factors; None if what is added is no product."""
        return None if self.magnitude else self.down.shape[0]

    @property
    def is_embedding(self) -> bool:
        """Whether PEFT has it as an embedding, not a linear layer."""
        return ".lora_embedding_" in self.down.name

    @property
    def module(self) -> str | None:
        """PEFT's name of the module; None of bare factors."""
        found = _FACTOR.fullmatch(self.down.name.removeprefix(PREFIX))
        return found[1] if found and not _BARE.fullmatch(self.down.name) else None

    def _rows(self, elements: Callable[[TensorInfo, int, int], Tensor], first: int, last: int) -> Tensor:
        rank, width = self.down.shape[0], prod(self.shape[1:])
        if self.transposed:
            rows = self.shape[0]
            left = [elements(self.down, r * rows + first, r * rows + last) for r in range(rank)]
            left_MR = torch.stack(left, dim=1)
            right_RN = elements(self.up, 0, prod(self.up.shape)).reshape(width, rank).T
        else:
            left_MR = elements(self.up, first * rank, last * rank).reshape(last - first, rank)
            right_RN = elements(self.down, 0, prod(self.down.shape)).reshape(rank, width)
        adapted_MN = (left_MR.double() @ right_RN.double()).mul_(self.scaling)
        if self.base:
            base = elements(self.base, first * width, last * width)
            adapted_MN += base.double().reshape(adapted_MN.shape)
        if self.magnitude:
            length_M = elements(self.magnitude, first, last).double()
            adapted_MN *= (length_M / adapted_MN.norm(dim=1))[:, None]
        return adapted_MN.to(torch.float64 if self.dtype == "F64" else torch.float32).reshape(-1)


def added_rank(info: TensorInfo, base: TensorInfo | None) -> int | None:
    """The rank of what an adapter adds to a tensor of the base, 0 if it leaves it; None if it is no product."""
    if info is base:
        return 0
    return info.rank if isinstance(info, AdaptedTensor) else None


def is_adapter(checkpoint: Checkpoint) -> bool:
    """Whether it is what PEFT's `save_pretrained` writes."""
    files = {info.file.name for info in checkpoint.tensors.values()}
    return files == {ADAPTER_WEIGHTS} and (checkpoint.folder / ADAPTER_CONFIG).is_file()


def adapt(base: Checkpoint, adapter: Checkpoint) -> Checkpoint:
    """The checkpoint that an adapter makes of its base; reads `adapter_config.json`, but no tensor data.

    Follows PEFT's `LoraLayer.get_delta_weight` and its DoRA layers, of version 0.21.

    Raises:
        UserError: an adapter of another kind than LoRA, one that is not for this base, or a part of it is missing.
    """
    path = adapter.folder / ADAPTER_CONFIG
    config = _read_config(path)
    _refuse_another_base(base, path, config)
    factors, whole = _parts(adapter)
    names = _named(base, [*(f"{module}.weight" for module in factors), *whole], path, config)
    tensors = dict(base.tensors)
    for key, info in whole.items():  # first, for factors may be added to what was saved whole
        like = base.tensors[names[key]]
        if info.shape != like.shape:
            raise UserError(
                _misfit(path, config, f"'{key}' has shape {list(info.shape)}, there {list(like.shape)}")
            )
        tensors[like.name] = info
    for module, parts in factors.items():
        name = names[f"{module}.weight"]
        tensors[name] = _adapted(tensors[name], module, parts, config, path)
    return adapter.view(tensors)


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
        dtype = "F64" if "F64" in {part.dtype for part in parts} else "F32"
        tensors[name] = AdaptedTensor(name, dtype, shape, up.file, up.start, up.stop, like, down, up, 1.0)
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


def _read_config(path: Path) -> dict[str, Any]:
    config = read_object(path)
    if not isinstance(config.get("peft_type"), str):
        raise UserError(f"{path}: does not say the peft_type of the adapter; download it again")
    if config["peft_type"] != "LORA":
        raise UserError(
            f"{path}: the adapter is of type {config['peft_type']}; LORA alone (with rsLoRA and DoRA) can be merged"
        )
    for key in ("layer_replication", "lora_bias"):
        if config.get(key):
            raise UserError(
                f"{path}: '{key}' is not supported; merge the adapter into its base with PEFT first"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_RESIDUAL_BASES):
        raise UserError(
            f"{path}: init_lora_weights '{start}' changed the base that it adds to; "
            "save it with PEFT's path_initial_model_for_weight_conversion"
        )
    if not _is_number(config.get("lora_alpha")):
        raise UserError(f"{path}: does not say lora_alpha; download it again")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(map(_is_number, patterns.values())):
        raise UserError(f"{path}: alpha_pattern holds no numbers by pattern; download it again")
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= _LARGEST


def _parts(adapter: Checkpoint) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo]]:
    """The factors of each module, and the tensors that are there whole (`modules_to_save`, biases)."""
    factors: dict[str, dict[str, TensorInfo]] = {}
    whole: dict[str, TensorInfo] = {}
    for key, info in adapter.tensors.items():
        plain = key.removeprefix(PREFIX)
        found = _FACTOR.fullmatch(plain)
        if found:
            factors.setdefault(found[1], {})[found[2]] = info
        else:
            plain = re.sub(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)", "", plain)
            whole[plain] = info
    return factors, whole


def _named(base: Checkpoint, wanted: Iterable[str], path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The base's name of each tensor that the adapter changes: its own, or that of the bare model inside of it."""
    wanted = list(wanted)
    if not wanted:
        raise UserError(f"{path}: the adapter holds no LoRA factors; download it again")
    names = {}
    for name in wanted:
        inner = name.partition(".")[2]
        found = next((n for n in (name, inner) if n in base.tensors), None)
        if found is None:
            raise UserError(_misfit(path, config, f"'{name}' is not there{did_you_mean(name, base.tensors)}"))
        names[name] = found
    return names


def _refuse_another_base(base: Checkpoint, path: Path, config: Mapping[str, Any]) -> None:
    """Shapes do not tell a base from its other versions: names on the hub do, where both are known."""
    wanted, known = config.get("base_model_name_or_path"), hub_id(source_of(base.folder))
    if not known or not isinstance(wanted, str):
        return
    named = hub_id(f"hf://{wanted}") == wanted and not wanted.startswith(".")
    if named and wanted.lower() != known.lower():
        raise UserError(
            f"{path}: the adapter was trained on '{wanted}', the base is '{known}'; name that base, or, if it is a "
            "copy of this one, write this one's name into base_model_name_or_path"
        )


def _misfit(path: Path, config: Mapping[str, Any], what: str) -> str:
    of = config.get("base_model_name_or_path")
    return f"{path}: the adapter does not fit the base: {what}; " + (
        f"name the base that it was trained on, {of!r}" if of else "name the base that it was trained on"
    )


def _adapted(
    info: TensorInfo, module: str, parts: Mapping[str, TensorInfo], config: Mapping[str, Any], path: Path
) -> AdaptedTensor:
    embedding = "embedding_A" in parts
    down, up = (parts.get(f"embedding_{side}" if embedding else side) for side in "AB")
    if down is None or up is None or len(parts) != 2 + ("magnitude_vector" in parts):
        raise UserError(f"{path}: module '{module}' lacks one of its factors; download the adapter again")
    magnitude = parts.get("magnitude_vector")
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    if magnitude and transposed:
        raise UserError(
            f"{path}: DoRA on '{module}', whose weight is transposed, is not supported; merge it with PEFT first"
        )
    rank, rows, columns = down.shape[0] if down.shape else 0, info.shape[0], prod(info.shape[1:])
    expected = (columns, rows) if transposed else (rows, columns)
    fits = (
        len(info.shape) > 1
        and rank > 0
        and (prod(up.shape), prod(down.shape)) == (expected[0] * rank, rank * expected[1])
        and up.shape[0] == expected[0]
        and (magnitude is None or prod(magnitude.shape) == rows)
        and all(part.is_float for part in (info, *parts.values()))
    )
    if not fits:
        shapes = (
            f"factors {list(down.shape)} and {list(up.shape)} for '{info.name}' of shape {list(info.shape)}"
        )
        raise UserError(_misfit(path, config, shapes))
    alpha = _of_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"], path)
    scaling = alpha / (sqrt(rank) if config.get("use_rslora") else rank)
    dtype = "F64" if info.dtype == "F64" else "F32"
    return AdaptedTensor(
        info.name, dtype, info.shape, up.file, up.start, up.stop, info, down, up, scaling, transposed, magnitude
    )  # fmt: skip


def _of_pattern(patterns: Mapping[str, float], module: str, otherwise: float, path: Path) -> float:
    """The value of the first pattern that the end of the module's name matches (PEFT's `get_pattern_key`)."""
    for pattern, value in patterns.items():
        if _REPEATED.search(pattern) or len(_REPEATS.findall(pattern)) > _MOST_REPEATS:
            raise UserError(
                f"{path}: alpha_pattern {pattern!r} repeats so much that trying it may take for ever; name the modules"
            )
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise UserError(f"{path}: alpha_pattern {pattern!r} is no regular expression ({error})") from None
    return otherwise
