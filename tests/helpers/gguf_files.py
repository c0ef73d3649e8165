"""Small GGUF files of tiny models, as llama.cpp's convert_hf_to_gguf.py writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator

import pytest

gguf = pytest.importorskip("gguf")

LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp", "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps", "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}  # fmt: skip
KINDS = {"mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}  # others are called alike
NORMS = {
    "llama": {"post_attention_layernorm": "ffn_norm"},
    "qwen2": {"post_attention_layernorm": "ffn_norm"},
    "qwen3": {"post_attention_layernorm": "ffn_norm"},
    "gemma2": {
        "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}  # fmt: skip


def own_name(name: str, kind: str) -> str:
    """llama.cpp's name of a parameter of transformers."""
    *module, end = name.removeprefix("model.").split(".")
    if module[0] != "layers":
        return (
            f"{ {'embed_tokens': 'token_embd', 'norm': 'output_norm', 'lm_head': 'output'}[module[0]] }.{end}"
        )
    table = LAYER | NORMS.get(kind, NORMS["llama"])
    return f"blk.{module[1]}.{table['.'.join(module[2:])]}.{end}"


def parameters(model: Any) -> Iterator[tuple[str, Any]]:
    """Those of a model, gate and up projections of packed experts apart, each (experts, outputs, inputs)."""
    for name, weight in model.state_dict().items():
        value = weight.float().numpy()
        if name.endswith("experts.gate_up_proj"):
            half = value.shape[1] // 2
            yield name.replace("gate_up_proj", "gate_proj.weight"), value[:, :half]
            yield name.replace("gate_up_proj", "up_proj.weight"), value[:, half:]
        elif name.endswith("experts.down_proj"):
            yield f"{name}.weight", value
        elif name.endswith("shared_expert_gate.weight"):
            yield name, value[0]
        else:
            yield name, value


def write(path: Path, model: Any, type: str = "F32", **settings: Any) -> None:
    """A model of transformers as GGUF, its matrices in blocks of a type."""
    config = model.config
    kind = KINDS.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, kind)
    heads = {"head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads}
    for key, value in {
        "block_count": config.num_hidden_layers, "context_length": 64, "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size, "vocab_size": config.vocab_size,
        **{f"attention.{key}": value for key, value in heads.items()}, **settings,
    }.items():  # fmt: skip
        writer.add_uint32(f"{kind}.{key}", value)
    writer.add_float32(f"{kind}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    quantised = gguf.GGMLQuantizationType[type]
    for name, value in parameters(model):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            count = heads["head_count" if "q_proj" in name else "head_count_kv"]
            value = value.reshape(count, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        if value.ndim > 1:
            writer.add_tensor(
                own_name(name, kind), gguf.quants.quantize(value, quantised), raw_dtype=quantised
            )
        else:
            writer.add_tensor(own_name(name, kind), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
