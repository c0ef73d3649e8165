"""Repositories of many gigabytes of which the headers alone are held, for a loopback hub."""

from __future__ import annotations

import json
import struct
from math import prod
from typing import Mapping

from hub_server import Sparse

_BYTES = {"BF16": 2, "F8_E4M3": 1, "F32": 4}  # of an element


def header(tensors: dict[str, tuple[int, ...]], dtypes: Mapping[str, str] = {}) -> Sparse:
    """A file of tensors of these shapes, bf16 but for those in `dtypes`, of which the header alone is held."""
    entries, end = {}, 0
    for name, shape in tensors.items():
        dtype = dtypes.get(name, "BF16")
        start, end = end, end + _BYTES[dtype] * prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return Sparse(struct.pack("<Q", len(text)) + text, 8 + len(text) + end)


def fp8_llama(layers: int = 32) -> dict[str, bytes | Sparse]:
    """A repository of the shape of Llama-3-8B in one file: its linear layers are FP8 in blocks of 128 x 128."""
    width, inner = 4096, 14336
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (128256, width),
        "model.norm.weight": (width,),
    }
    dtypes: dict[str, str] = {}
    matrices = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (1024, width), "self_attn.v_proj": (1024, width),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }  # fmt: skip
    for layer in range(layers):
        for module, (rows, columns) in matrices.items():
            name = f"model.layers.{layer}.{module}.weight"
            tensors |= {name: (rows, columns), f"{name}_scale_inv": (rows // 128, columns // 128)}
            dtypes |= {name: "F8_E4M3", f"{name}_scale_inv": "F32"}
    config = {
        "model_type": "llama",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    return {"model.safetensors": header(tensors, dtypes), "config.json": json.dumps(config).encode()}


def llama_70b(shards: int = 30) -> dict[str, bytes | Sparse]:
    """A repository of the shape of Llama-3-70B: 80 layers in 30 shards, 141 GB."""
    width, inner, keys, tokens = 8192, 28672, 1024, 128256
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (tokens, width)}
    for layer in range(80):
        own = f"model.layers.{layer}."
        tensors |= {
            f"{own}self_attn.q_proj.weight": (width, width),
            f"{own}self_attn.k_proj.weight": (keys, width),
            f"{own}self_attn.v_proj.weight": (keys, width),
            f"{own}self_attn.o_proj.weight": (width, width),
            f"{own}mlp.gate_proj.weight": (inner, width),
            f"{own}mlp.up_proj.weight": (inner, width),
            f"{own}mlp.down_proj.weight": (width, inner),
            f"{own}input_layernorm.weight": (width,),
            f"{own}post_attention_layernorm.weight": (width,),
        }
    tensors |= {"model.norm.weight": (width,), "lm_head.weight": (tokens, width)}
    names, each = list(tensors), -(-len(tensors) // shards)
    parts = [names[i : i + each] for i in range(0, len(names), each)]
    files: dict[str, bytes | Sparse] = {"config.json": b'{"model_type": "llama"}'}
    weight_map = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05}-of-{len(parts):05}.safetensors"
        files[file] = header({name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    return files
