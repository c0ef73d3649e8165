"""Which tensors of a checkpoint are quantised weights, in which format, and what belongs to each.

The names and dtypes of the tensors say it, and `quantization_config` of config.json, which must say the same.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping

from mergeline.merging.checkpoints.checkpoint import Checkpoint, Files, TensorInfo
from mergeline.merging.checkpoints.companions import CONFIG, read_config
from mergeline.merging.checkpoints.components import by_component, component_folders
from mergeline.merging.checkpoints.quantised.fp4 import GROUP, PACKED, FP4Tensor, PackedExpertsTensor
from mergeline.merging.checkpoints.quantised.ggml import as_transformers_has_it
from mergeline.merging.checkpoints.quantised.integers import WORD, AWQTensor, GPTQTensor, PackedTensor
from mergeline.merging.checkpoints.quantised.normal_floats import Nested, NormalFloatTensor
from mergeline.merging.checkpoints.quantised.scaled import MX_GROUP, ScaledTensor, grid_of
from mergeline.merging.checkpoints.quantised.tensor import QuantisedTensor, bad
from mergeline.merging.errors import UserError
from mergeline.merging.reading import parsed_json

_CUT = "cut off or damaged; download the checkpoint again"
INSTEAD = "merge the float16 or wider model it was made from"
# quant_method of config.json -> the formats that it may mean.
METHODS: dict[str, tuple[str, ...]] = {
    "fp8": ("FP8", "MXFP8", "MXFP4"),
    "fbgemm_fp8": ("FP8",),
    "mxfp8": ("FP8", "MXFP8"),
    "modelopt": ("FP8", "MXFP8", "NVFP4"),
    "compressed-tensors": ("FP8", "INT8", "MXFP8", "MXFP4", "NVFP4", "packed integers"),
    "mxfp4": ("MXFP4",),
    "bitsandbytes": ("NF4", "FP4", "INT8"),
    "gptq": ("GPTQ",),
    "awq": ("AWQ",),
    "auto-round": ("GPTQ", "AWQ"),
}
# What belongs to activations, which are no weights.
_OF_ACTIVATIONS = re.compile(
    r"(.*\.)?([qkv]|(\w+_)?(input|output|activation))_(scale|zero_point|global_scale|scale_ub)"
)
# What only quantised checkpoints hold, and what would be merged as if it were a weight.
_SIGNS = re.compile(
    r".*(\.qweight|\.qzeros|\.SCB|\.absmax|\.quant_map|\.quant_state\..*|_scale_inv|_packed|\.bitmask"
    r"|weight_(scale|scale_2|global_scale|zero_point|shape|g_idx|format))"
)
_ZEROS = ("I8", "F8_E4M3", "F32", "F16", "BF16")
_8_BITS = ("F8_E4M3", "F8_E5M2")
_CODES = ("U8", "I8", "I32")
MOST_READ = 4096  # bytes of a tensor that holds shapes or settings
_NVFP4_GROUP = 16


@dataclass
class _Found:
    """What was recognised: a tensor with the name of its format, and the names of all that it is made of."""

    tensors: dict[str, QuantisedTensor] = field(default_factory=dict)
    formats: Counter[str] = field(default_factory=Counter)
    firsts: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)


@dataclass
class _Reader:
    """The headers of one checkpoint, and the configuration that says how it was quantised."""

    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    path: Path
    found: _Found = field(default_factory=_Found)

    @property
    def method(self) -> str | None:
        """`quant_method`, in the words of transformers; None where there is no configuration."""
        if not self.config:
            return None
        named = self.config.get("quant_method")
        if named is None and self.config.get("load_in_4bit", self.config.get("load_in_8bit")) is not None:
            return "bitsandbytes"
        return str(named)

    def refuse(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what}; {INSTEAD}")

    def add(self, tensor: QuantisedTensor, kind: str, *more: TensorInfo | None) -> None:
        """Take up a weight, and what was used for it."""
        if tensor.name in self.found.tensors or (
            tensor.name in self.tensors and tensor.name != tensor.parts[0].name
        ):
            raise bad(tensor.parts[0], f"'{tensor.name}' is there a second time; keep one of them")
        self.found.tensors[tensor.name] = tensor
        self.found.formats[kind] += 1
        self.found.firsts.setdefault(kind, tensor.name)
        self.found.used |= {part.name for part in (*tensor.parts, *more) if part}
        if self.method is None:
            return
        if self.method not in METHODS:
            raise self.refuse(f"is quantised ({self.method} in {CONFIG}), which cannot be read")
        if kind.partition(" in ")[0] not in METHODS[self.method]:
            raise UserError(
                f"{self.path}: {CONFIG} says that it is quantised by {self.method}, "
                f"but '{tensor.parts[0].name}' is {kind}; take the {CONFIG} that belongs to the weights"
            )

    def needed(self, info: TensorInfo, *names: str) -> TensorInfo:
        """What must be there beside a tensor, by any of the names (raises UserError)."""
        for name in names:
            if name in self.tensors:
                return self.tensors[name]
        raise bad(info, f"is quantised, and '{names[0]}' is not there; download the checkpoint again")

    def integers(self, info: TensorInfo) -> list[int]:
        """The few integers that a tensor holds."""
        size = {"I64": 8, "I32": 4, "U8": 1, "I8": 1}.get(info.dtype)
        if size is None:
            raise bad(info, f"holds no integers but {info.dtype}; download the checkpoint again")
        raw = stored_bytes(info)
        return [int.from_bytes(raw[i : i + size], "little", signed=True) for i in range(0, len(raw), size)]


def dequantised(checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """A view in which quantised weights are the floats that they stand for, and sentences on what they are.

    Their names and shapes are those of the checkpoint before it was quantised; what belongs to activations is left
    out. Reads headers, `config.json`, and tensors of a few bytes that hold shapes and settings.

    Raises:
        UserError: a format that is not supported, parts that are missing or do not fit together, a configuration that
            says something else than the tensors.
    """
    if checkpoint.settings is not None:
        return as_transformers_has_it(checkpoint)
    parts = component_folders(checkpoint.path) if checkpoint.path.is_dir() else []
    tensors: dict[str, TensorInfo] = {}
    notes = []
    for prefix, names in by_component(checkpoint.tensors, parts).items():
        config = quantisation(read_config(checkpoint.folder / prefix))
        own, found = _dequantised_part({name: checkpoint.tensors[name] for name in names}, config, checkpoint)
        tensors |= own
        notes += [f"{prefix.rstrip('/')}: {note}" if prefix else note for note in found]
    return (checkpoint.view(tensors) if notes else checkpoint), notes


def _dequantised_part(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], checkpoint: Checkpoint
) -> tuple[Mapping[str, TensorInfo], list[str]]:
    """The same of the tensors of one component, whose configuration says how they were quantised."""
    reader = _Reader(tensors, config, checkpoint.path)
    for recognise in _RECOGNISE:
        for info in tensors.values():
            if info.name not in reader.found.used:
                recognise(reader, info)
    found, left = reader.found, {n: t for n, t in tensors.items() if n not in reader.found.used}
    activations = []
    if found.tensors:
        activations = [name for name in left if _OF_ACTIVATIONS.fullmatch(name)]
        left = {name: info for name, info in left.items() if name not in set(activations)}
    _refuse_unknown(reader, left)
    if not found.tensors:
        return tensors, []
    for name in left.keys() & found.tensors.keys():
        raise bad(left[name], "is there as it is and quantised; keep one of them")
    kinds = ", ".join(f"{count} of {kind}" for kind, count in sorted(found.formats.items()))
    first = found.firsts[min(found.formats)]
    notes = [
        f"{len(found.tensors)} tensors are quantised ({kinds}; '{first}' first): dequantised as they are read"
    ]
    if activations:
        notes.append(
            f"{len(activations)} scales of quantised activations are left out, '{activations[0]}' first"
        )
    return {**left, **found.tensors}, notes


def quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says of how the weights were quantised, wherever it does; empty if it does not."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            for key in ("quantization_config", "compression_config"):
                if isinstance(part.get(key), dict):
                    return part[key]
    return {}


def refuse_unsupported(config: Mapping[str, Any], source: str) -> None:
    """Raises UserError if the configuration of a checkpoint that is not here yet names a method that cannot be read."""
    found = quantisation(config)
    reader = _Reader({}, found, Path(source))
    if found and reader.method not in METHODS:
        raise UserError(
            f"{source}: is quantised ({reader.method} in {CONFIG}), which cannot be read; {INSTEAD}"
        )


def _refuse_unknown(reader: _Reader, left: Mapping[str, TensorInfo]) -> None:
    """Raises UserError for what is quantised in a way that was not recognised."""
    for info in left.values():
        if info.dtype.startswith("F8"):
            raise bad(info, f"is {info.dtype} without scales; {INSTEAD}")
    sign = next((name for name in left if _SIGNS.fullmatch(name)), None)
    if sign is not None:
        raise reader.refuse(f"is quantised (tensor '{sign}') in a way that cannot be read")
    for info in left.values() if reader.method or reader.found.tensors else ():
        if info.dtype in _CODES and info.name.endswith("weight"):
            raise reader.refuse(f"is quantised ('{info.name}' is {info.dtype}) in a way that cannot be read")
    unknown = reader.method is not None and reader.method not in METHODS
    if unknown and not all(info.is_float for info in left.values()):
        raise reader.refuse(f"is quantised ({reader.method} in {CONFIG}), which cannot be read")
    sparse = reader.config.get("sparsity_config")
    if isinstance(sparse, dict) and sparse.get("format", "dense") != "dense" and reader.found.tensors:
        raise reader.refuse(f"is sparse ({sparse.get('format')!r} in {CONFIG}), which cannot be read")


# --------------------------------------------------------------------------------------- format by format


def _scaled(reader: _Reader, info: TensorInfo) -> None:
    """FP8 and INT8 with scales beside the weight."""
    name, tensors = info.name, reader.tensors
    of_blocks = name.removesuffix("weight") + "scale" if name.endswith(".weight") else ""
    scale = next(
        (tensors[n] for n in (f"{name}_scale_inv", f"{name}_scale", of_blocks) if n in tensors), None
    )
    if info.dtype == "I8" and scale is not None and scale.dtype not in ("F8_E8M0", "U8"):
        _add_scaled(reader, info, scale, "INT8")
    elif info.dtype in _8_BITS and scale is not None:
        _add_scaled(reader, info, scale, "FP8")


def _add_scaled(reader: _Reader, info: TensorInfo, scale: TensorInfo, kind: str) -> None:
    block, zero = _block(reader), reader.tensors.get(f"{info.name}_zero_point")
    grid = grid_of(info, scale, info.shape, block)
    if zero is not None and (zero.dtype not in _ZEROS or zero.shape != scale.shape):
        raise bad(zero, f"is {zero.dtype} of shape {list(zero.shape)}, the scales have {list(scale.shape)}")
    if scale.dtype in ("U8", "F8_E8M0") and grid.block == (1, MX_GROUP):
        kind = "MXFP8"
    elif block:
        kind = f"{kind} in blocks of {block[0]} x {block[1]}"
    parts = (info, scale, *([zero] if zero else []))
    reader.add(
        ScaledTensor(info.name, "BF16", info.shape, info.file, info.start, info.stop, parts, grid, zero=zero),
        kind,
    )  # fmt: skip


def _block(reader: _Reader) -> list[int] | None:
    """The rows and columns of a block, where the configuration names them for all weights."""
    block = reader.config.get("weight_block_size")
    for group in _groups(reader.config):
        block = block or group.get("block_structure")
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise UserError(
            f"{reader.path}: weight_block_size {block!r} of {CONFIG} is no pair of whole numbers; {_CUT}"
        )
    return block


def _groups(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settings of weights in compressed-tensors' groups."""
    groups = config.get("config_groups")
    found = (
        [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    )
    return [weights for weights in found if isinstance(weights, dict)]


def _bitsandbytes_8(reader: _Reader, info: TensorInfo) -> None:
    """LLM.int8() of bitsandbytes, which has the scale of a row as its largest magnitude, 127 in codes."""
    stem = info.name.removesuffix("weight")
    scale = reader.tensors.get(f"{stem}SCB")
    if info.dtype != "I8" or scale is None or stem == info.name:
        return
    layout = reader.tensors.get(f"{stem}weight_format")
    if layout is not None and any(reader.integers(layout)):
        raise bad(layout, "says that the weight lies in tiles, which cannot be read; save it again")
    if len(info.shape) != 2 or scale.shape != info.shape[:1] or not scale.is_float:
        raise bad(scale, f"its shape {list(scale.shape)} does not fit the weight's, {list(info.shape)}")
    grid = grid_of(info, scale, info.shape, None)
    tensor = ScaledTensor(
        info.name, "BF16", info.shape, info.file, info.start, info.stop, (info, scale), grid, 1 / 127
    )
    reader.add(tensor, "INT8", layout)


def _bitsandbytes_4(reader: _Reader, info: TensorInfo) -> None:
    """NF4 and FP4 of bitsandbytes."""
    name, tensors = info.name, reader.tensors
    states = [n for kind in ("nf4", "fp4") if (n := f"{name}.quant_state.bitsandbytes__{kind}") in tensors]
    if not states:
        return
    state = tensors[states[0]]
    settings = _settings(state)
    shape, block = settings.get("shape"), settings.get("blocksize")
    whole = isinstance(shape, list) and all(type(n) is int and 0 <= n < 1 << 40 for n in shape)
    if not whole or type(block) is not int or not 2 <= block <= 1 << 20 or block % 2:
        raise bad(state, f"names the shape {shape!r} in blocks of {block!r}; {_CUT}")
    assert isinstance(shape, list)
    count, blocks = prod(shape), -(-prod(shape) // block)
    largest, table = (reader.needed(info, f"{name}.{part}") for part in ("absmax", "quant_map"))
    fits = (
        info.dtype in ("U8", "I8")
        and prod(info.shape) == -(-count // 2)
        and prod(largest.shape) == blocks
        and table.shape == (16,)
        and table.is_float
    )
    if not fits:
        raise bad(info, f"its codes, magnitudes and table do not make a tensor of shape {shape}; {_CUT}")
    nested, more = None, []
    if f"{name}.nested_absmax" in tensors:
        inner, outer = (reader.needed(info, f"{name}.nested_{part}") for part in ("quant_map", "absmax"))
        of, offset = settings.get("nested_blocksize"), settings.get("nested_offset")
        if type(of) is not int or not 1 <= of < 1 << 40 or not isinstance(offset, int | float):
            raise bad(state, f"names nested blocks of {of!r}, and {offset!r} as their offset; {_CUT}")
        fits = (
            largest.dtype in ("U8", "I8") and inner.shape == (256,) and prod(outer.shape) == -(-blocks // of)
        )
        if not fits or not (inner.is_float and outer.is_float):
            raise bad(outer, f"does not fit {blocks} magnitudes in blocks of {of}; {_CUT}")
        nested, more = Nested(inner, outer, of, float(offset)), [inner, outer]
    elif not largest.is_float:
        raise bad(largest, f"is {largest.dtype}, and its nested_absmax is not there; {_CUT}")
    tensor = NormalFloatTensor(
        name,
        "BF16",
        tuple(shape),
        info.file,
        info.start,
        info.stop,
        (info, largest, table, *more),
        block,
        nested,
    )
    reader.add(tensor, states[0][-3:].upper(), state)


def _settings(state: TensorInfo) -> dict[str, Any]:
    """What bitsandbytes packed into a tensor of bytes: a JSON object."""
    try:
        found = parsed_json(stored_bytes(state).decode())
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
    except (ValueError, RecursionError) as error:
        raise bad(state, f"is no quantisation state ({error}); {_CUT}") from None
    return found


def _packed_experts(reader: _Reader, info: TensorInfo) -> None:
    """MXFP4 of gpt-oss's packed experts."""
    name = info.name.removesuffix("_blocks")
    if name == info.name or info.dtype not in ("U8", "I8") or f"{name}_scales" not in reader.tensors:
        return
    scales = reader.tensors[f"{name}_scales"]
    fits = (
        len(info.shape) == 4
        and info.shape[3] == PACKED
        and scales.shape == info.shape[:3]
        and scales.dtype in ("U8", "I8", "F8_E8M0")
    )
    if not fits:
        raise bad(
            scales, f"its shape {list(scales.shape)} does not fit that of the blocks, {list(info.shape)}"
        )
    experts, outputs, groups, _ = info.shape
    shape = experts, groups * GROUP, outputs
    reader.add(
        PackedExpertsTensor(name, "BF16", shape, info.file, info.start, info.stop, (info, scales)), "MXFP4"
    )


def _fp4(reader: _Reader, info: TensorInfo) -> None:
    """MXFP4 and NVFP4 of weights with scales beside them."""
    tensors, packed = reader.tensors, info.name.endswith("_packed")
    name = info.name.removesuffix("_packed")
    of_blocks = name.removesuffix("weight") + "scale" if name.endswith(".weight") else ""
    names = [f"{name}_scale", *(() if packed else (f"{name}_scale_inv", of_blocks))]
    scale = next((tensors[n] for n in names if n in tensors), None)
    if info.dtype not in ("U8", "I8") or scale is None or not info.shape or 0 in info.shape:
        return
    shape = *info.shape[:-1], 2 * info.shape[-1]
    micro = scale.dtype in ("U8", "F8_E8M0")
    of_all = f"{name}_global_scale" if packed else f"{name}_scale_2"
    whole = None if micro else reader.needed(info, of_all)
    if whole is not None and (prod(whole.shape) != 1 or not whole.is_float):
        raise bad(whole, f"is {whole.dtype} of shape {list(whole.shape)}, not one float")
    group = GROUP if micro else _NVFP4_GROUP
    if not micro and scale.dtype != "F8_E4M3":
        raise bad(scale, f"is {scale.dtype}; 4-bit floats have scales of F8_E4M3 or powers of two")
    if scale.shape != (*shape[:-1], shape[-1] // group) or shape[-1] % group:
        raise bad(scale, f"its shape {list(scale.shape)} is not of one scale for {group} of {list(shape)}")
    grid = grid_of(info, scale, shape, (1, group))
    tensor = FP4Tensor(
        name,
        "BF16",
        shape,
        info.file,
        info.start,
        info.stop,
        (info, scale),
        grid,
        whole=whole,
        divides=packed,
    )
    reader.add(tensor, "MXFP4" if micro else "NVFP4", whole)


def _packed_integers(reader: _Reader, info: TensorInfo) -> None:
    """pack-quantized of compressed-tensors."""
    name, tensors = info.name.removesuffix("_packed"), reader.tensors
    if name == info.name or info.dtype != "I32" or f"{name}_scale" not in tensors:
        return
    scale, told = tensors[f"{name}_scale"], reader.needed(info, f"{name}_shape")
    index, zero = tensors.get(f"{name}_g_idx"), tensors.get(f"{name}_zero_point")
    shape = tuple(reader.integers(told))
    named = [group.get("num_bits") for group in _groups(reader.config)]
    fits = [b for b in (2, 4, 8) if b in named and len(shape) == 2]
    bits = next((b for b in fits if info.shape == (shape[0], -(-shape[1] * b // WORD))), None)
    if bits is None:
        raise bad(
            info,
            f"words {list(info.shape)} for a weight {list(shape)}: {CONFIG} names no num_bits of 2, 4 or 8 that fit; "
            + INSTEAD,
        )
    groups = _groups_of(info, scale, shape[0], scale.shape[-1] if scale.shape else 1, across=False)
    _check_index(index, shape[1])
    if zero is not None and (zero.dtype != "I32" or zero.shape != (-(-shape[0] * bits // WORD), groups)):
        raise bad(zero, f"its shape {list(zero.shape)} does not fit {shape[0]} rows of {groups} groups")
    group = _group_size(reader, info, shape[1], groups, index)
    parts = (info, scale, *([zero] if zero else []), *([index] if index else []))
    tensor = PackedTensor(
        name, "BF16", shape, info.file, info.start, info.stop, parts, bits, group, index, zero
    )
    reader.add(tensor, "packed integers", told)


def _words(reader: _Reader, info: TensorInfo) -> None:
    """GPTQ and AWQ, told apart by which side of the matrix is packed."""
    stem = info.name.removesuffix("qweight")
    if stem == info.name or not stem.endswith(".") or info.dtype != "I32":
        return
    zeros, scales = (reader.needed(info, f"{stem}{part}") for part in ("qzeros", "scales"))
    index, config = reader.tensors.get(f"{stem}g_idx"), reader.config
    if not all(len(part.shape) == 2 for part in (info, zeros, scales)) or zeros.dtype != "I32":
        raise bad(info, "its words, zeros and scales are no matrices; download the checkpoint again")
    if not config:
        raise bad(
            info, f"is packed, and there is no quantization_config in {CONFIG} that says how; put it there"
        )
    bits = config.get("bits", config.get("w_bit"))
    if type(bits) is not int or bits not in (2, 4, 8):
        raise bad(info, f"{CONFIG} names {bits!r} bits; 2, 4 and 8 can be read; {INSTEAD}")
    per, outputs = WORD // bits, scales.shape[1]
    gptq = info.shape[1] == outputs
    inputs = info.shape[0] * per if gptq else info.shape[0]
    if not gptq and (bits != 4 or info.shape[1] * per != outputs):
        raise bad(info, f"words {list(info.shape)} do not fit scales {list(scales.shape)} in {bits} bits")
    written = _layout(reader, gptq)
    if not gptq and written not in ("gemm", "auto_round:auto_awq", "auto_round:awq"):
        raise bad(info, f"is AWQ in the version {written!r}; 'gemm' can be read; {INSTEAD}")
    groups = _groups_of(info, scales, outputs, scales.shape[0], across=True)
    if zeros.shape != (groups, -(-outputs * bits // WORD)):
        raise bad(zeros, f"its shape {list(zeros.shape)} does not fit {groups} groups of {outputs} outputs")
    _check_index(index, inputs)
    group = _group_size(reader, info, inputs, groups, index)
    parts = (info, zeros, scales, *([index] if index else []))
    place = (
        f"{stem}weight",
        "BF16",
        (outputs, inputs),
        info.file,
        info.start,
        info.stop,
        parts,
        bits,
        group,
        index,
    )
    if not gptq:
        reader.add(AWQTensor(*place), "AWQ")
        return
    if written not in ("gptq", "gptq_v2", "auto_round:auto_gptq", "auto_round:gptq"):
        raise bad(info, f"is GPTQ in the format {written!r}; 'gptq' and 'gptq_v2' can be read; {INSTEAD}")
    reader.add(GPTQTensor(*place, off=0 if written == "gptq_v2" else 1), "GPTQ")


def _layout(reader: _Reader, gptq: bool) -> str:
    """How words are laid out, in the words of the configuration."""
    if reader.method == "auto-round":
        return str(reader.config.get("packing_format")).lower()
    keys, usual = (("checkpoint_format", "format"), "gptq") if gptq else (("version", "format"), "gemm")
    return str(next((found for key in keys if (found := reader.config.get(key))), usual)).lower()


def _groups_of(info: TensorInfo, scale: TensorInfo, outputs: int, groups: int, across: bool) -> int:
    """The groups of inputs that have scales (raises UserError if these are no floats of that shape)."""
    expected = (groups, outputs) if across else (outputs, groups)
    if scale.shape != expected or scale.dtype not in ("F32", "F16", "BF16") or not groups or not outputs:
        raise bad(
            scale, f"is {scale.dtype} {list(scale.shape)}, which does not fit the words {list(info.shape)}"
        )
    return groups


def _check_index(index: TensorInfo | None, inputs: int) -> None:
    if index is not None and (index.shape != (inputs,) or index.dtype not in ("I32", "I64")):
        raise bad(index, f"is {index.dtype} {list(index.shape)}, not the group of each of {inputs} inputs")


def _group_size(reader: _Reader, info: TensorInfo, inputs: int, groups: int, index: TensorInfo | None) -> int:
    """How many inputs have one scale: as the shapes say, and the configuration must."""
    told = [reader.config.get(key) for key in ("group_size", "q_group_size")]
    told += [group.get("group_size") for group in _groups(reader.config)]
    sizes = {
        inputs if size == -1 else size for size in told if type(size) is int and (size > 0 or size == -1)
    }
    if groups == 1:
        sizes.add(inputs)
    fitting = [size for size in sizes if -(-inputs // size) == groups]
    if not fitting:
        raise bad(info, f"{groups} groups of {inputs} inputs, but {CONFIG} names groups of {sorted(sizes)}")
    return fitting[0]


def stored_bytes(info: TensorInfo) -> bytes:
    """All bytes of a tensor of a few of them (raises UserError)."""
    if info.nbytes > MOST_READ:
        raise bad(info, f"has {info.nbytes} bytes, where a few numbers belong; {_CUT}")
    found = bytearray(info.nbytes)
    with Files() as files:
        files.fill_view(memoryview(found), info, 0)
    return bytes(found)


_RECOGNISE: Iterable[Callable[[_Reader, TensorInfo], None]] = (
    _packed_experts, _bitsandbytes_4, _bitsandbytes_8, _words, _packed_integers, _scaled, _fp4,
)  # fmt: skip
