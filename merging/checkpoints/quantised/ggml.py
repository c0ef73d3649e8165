"""Tensors of GGUF files under the names, and in the layout, that transformers has: what llama.cpp did is undone.

The `gguf` package has the names of architectures and reads the blocks; what is changed beside the names is what
llama.cpp's convert_hf_to_gguf.py changes: the rows of Llama's queries and keys, and 1 that is added to Gemma's norms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Iterator, Mapping

from mergeline.merging.checkpoints.checkpoint import GGUF_DTYPE, Checkpoint, TensorInfo
from mergeline.merging.checkpoints.computed import Elements
from mergeline.merging.checkpoints.gguf_header import elements_of
from mergeline.merging.checkpoints.quantised.tensor import QuantisedTensor, bad
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

# `general.architecture`, of dense models and of mixtures; Mixtral is a llama with experts.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
MIXTURES = ("llama", "qwen2moe", "qwen3moe")
_PERMUTED, _SHIFTED = ("llama",), ("gemma", "gemma2", "gemma3")
_WHOLE = ("model.embed_tokens", "model.norm", "lm_head")
_OF_LAYERS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm",
    "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
# Of mixtures: what the package's table has of a layer, and what files of transformers call it, experts by their number.
_MIXTRAL = {
    "mlp.gate": "block_sparse_moe.gate", "mlp.experts.gate_proj": "block_sparse_moe.experts.{}.w1",
    "mlp.experts.down_proj": "block_sparse_moe.experts.{}.w2", "mlp.experts.up_proj": "block_sparse_moe.experts.{}.w3",
}  # fmt: skip
_QWEN = {
    "mlp.gate": "mlp.gate", "mlp.experts.gate_proj": "mlp.experts.{}.gate_proj",
    "mlp.experts.up_proj": "mlp.experts.{}.up_proj", "mlp.experts.down_proj": "mlp.experts.{}.down_proj",
}  # fmt: skip
_GATE_OF_SHARED = "mlp.shared_expert_gate"  # (1, N), in GGUF (N,)
_SHARED = (
    "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj", _GATE_OF_SHARED,
)  # fmt: skip
_DERIVED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_MOST_LAYERS, _MOST_HEADS, _MOST_EXPERTS = 1 << 12, 1 << 16, 1 << 12


@dataclass(frozen=True)
class GGMLTensor(QuantisedTensor):
    """Rows of blocks, as the `gguf` package reads them.

    heads: in how many groups of rows those of a half of each head alternate with those of the other, 0 if they do not.
    less: what is subtracted.
    """

    type: str
    heads: int = 0
    less: float = 0.0

    @property
    def width(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def step(self) -> int:
        return self.shape[0] // self.heads if self.heads else 1

    def rows(self, elements: Elements, first: int, last: int) -> Tensor:
        info = self.parts[0]
        if info.dtype.startswith(GGUF_DTYPE):
            from gguf import GGMLQuantizationType, quants

            width = info.shape[-1]
            code = elements(info, first * width, last * width).reshape(-1, width).numpy()
            values = torch.from_numpy(quants.dequantize(code, GGMLQuantizationType[self.type]))
        else:
            values = elements(info, first * self.width, last * self.width).float()
        if self.heads:
            values = values.reshape(-1, self.step // 2, 2, self.width).transpose(1, 2)
        return values.reshape(-1) - self.less if self.less else values.reshape(-1)


def as_transformers_has_it(checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """A view of a GGUF file with the names of transformers, and sentences on what it is.

    Raises:
        UserError: the package `gguf` is missing, an architecture that is not known, tensors that it does not have.
    """
    settings = checkpoint.settings or {}
    kind = settings.get("general.architecture")
    has_experts = bool(settings.get(f"{kind}.expert_count"))
    readable = MIXTURES if has_experts else ARCHITECTURES
    if not isinstance(kind, str) or kind not in readable:
        words = f"{kind!r} with experts" if has_experts else repr(kind)
        raise UserError(
            f"{checkpoint.path}: is a GGUF file of the architecture {words}, which cannot be read; known are "
            f"{', '.join(ARCHITECTURES)}, and with experts {', '.join(MIXTURES)}; merge the original weights"
        )
    experts = 0
    if has_experts:
        experts = _number(checkpoint, settings, f"{kind}.expert_count", _MOST_EXPERTS)
    names = _names(checkpoint, kind, _number(checkpoint, settings, f"{kind}.block_count", _MOST_LAYERS))
    count = f"{kind}.attention.head_count"
    heads = {"q_proj": _number(checkpoint, settings, count, _MOST_HEADS)}
    heads["k_proj"] = _number(
        checkpoint, {f"{count}_kv": heads["q_proj"], **settings}, f"{count}_kv", _MOST_HEADS
    )
    tensors: dict[str, TensorInfo] = {}
    derived, types = [], set()
    for info in checkpoint.tensors.values():
        if info.name in _DERIVED:
            derived.append(info.name)
            continue
        stem, _, end = info.name.rpartition(".")
        if stem not in names or end not in ("weight", "bias"):
            raise bad(info, f"{kind} has no such tensor in transformers; merge the original weights")
        type = info.dtype.removeprefix(GGUF_DTYPE)
        types |= {type}
        for name, part in _named(info, f"{names[stem]}.{end}", experts):
            packed = part.dtype.startswith(GGUF_DTYPE)
            shape = (*part.shape[:-1], elements_of(type, part.shape[-1])) if packed else part.shape
            of = heads.get(name.split(".")[-2], 0) if kind in _PERMUTED else 0
            if of and (of < 0 or not shape or shape[0] % (2 * of)):
                raise bad(info, f"{shape[:1]} rows are not those of {of} heads; download it again")
            less = 1.0 if kind in _SHIFTED and name.endswith("norm.weight") else 0.0
            place = name, "BF16", shape, part.file, part.start, part.stop, (part,), type, of, less
            plain = not packed and not of and not less
            tensors[name] = replace(part, name=name) if plain else GGMLTensor(*place)
    notes = [
        f"is a GGUF file of {kind} ({', '.join(sorted(types))}): its tensors have the names of transformers, and are "
        "dequantised as they are read"
    ]
    if derived:
        notes.append(f"{derived[0]} is left out: transformers computes it from its configuration")
    return checkpoint.view(tensors), notes


def _named(info: TensorInfo, name: str, experts: int) -> Iterator[tuple[str, TensorInfo]]:
    """What a stored tensor is in transformers: itself, or of the experts that lie in it, one after the other, each."""
    if name.endswith(f"{_GATE_OF_SHARED}.weight") and len(info.shape) == 1:
        yield name, replace(info, shape=(1, *info.shape))
        return
    if "{}" not in name:
        yield name, info
        return
    if len(info.shape) != 3 or info.shape[0] != experts:
        raise bad(
            info,
            f"has shape {list(info.shape)}, not one matrix for each of {experts} experts; download it again",
        )
    size = (info.stop - info.start) // experts
    for expert in range(experts):
        start = info.start + expert * size
        yield name.format(expert), replace(info, shape=info.shape[1:], start=start, stop=start + size)


def _number(checkpoint: Checkpoint, settings: Mapping[str, Any], key: str, most: int) -> int:
    value = settings.get(key)
    if type(value) is not int or not 0 < value <= most:
        raise UserError(f"{checkpoint.path}: names {value!r} as {key}; download it again")
    return value


def _names(checkpoint: Checkpoint, kind: str, layers: int) -> dict[str, str]:
    """transformers' name of each module of GGUF, as the package has them of the architecture."""
    try:
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map
    except ModuleNotFoundError:
        raise UserError(f"{checkpoint.path}: gguf is not installed; pip install 'mergeline[gguf]'") from None
    known = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    table = get_tensor_name_map(MODEL_ARCH(known[kind]), layers)
    return {own: name for key, name in _candidates(kind, layers) if (own := table.get_name(key)) is not None}


def _candidates(kind: str, layers: int) -> Iterator[tuple[str, str]]:
    """What the table may have, and what transformers calls it."""
    yield from zip(_WHOLE, _WHOLE)
    of_mixtures = (_MIXTRAL if kind == "llama" else _QWEN) if kind in MIXTURES else {}
    of_layers = {**{name: name for name in (*_OF_LAYERS, *_SHARED)}, **of_mixtures}
    for layer in range(layers):
        yield from (
            (f"model.layers.{layer}.{key}", f"model.layers.{layer}.{n}") for key, n in of_layers.items()
        )
