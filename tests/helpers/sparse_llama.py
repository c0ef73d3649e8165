"""A repository of 141 GB of which the headers alone are held, for a loopback hub."""

from __future__ import annotations

import json
import struct
from math import prod

from hub_server import Sparse


def header(tensors: dict[str, tuple[int, ...]]) -> Sparse:
    """A file of bf16 tensors of these shapes, of which the header alone is held."""
    entries, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return Sparse(struct.pack("<Q", len(text)) + text, 8 + len(text) + end)


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
