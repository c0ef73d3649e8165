"""Adapters of every kind, of tiny real models: what is read, and what is refused by its name."""

from __future__ import annotations

from typing import Any, Callable

import model_zoo
import torch
from peft_adapters import gpt2, llama, mixtral

LINEAR = ["q_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def zoo(name: str) -> Any:
    torch.manual_seed(0)
    return model_zoo.build(name)


# Model, kind of the adapter, its configuration
KINDS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "LoRA": (
        llama, "Lora",
        {
            "r": 3, "lora_alpha": 5, "target_modules": [*LINEAR, "embed_tokens"], "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 9},
        },
    ),
    "rsLoRA": (llama, "Lora", {"r": 3, "target_modules": LINEAR, "use_rslora": True}),
    "DoRA": (llama, "Lora", {"r": 3, "target_modules": LINEAR, "use_dora": True}),
    "LoRA with modules kept whole": (llama, "Lora", {"target_modules": LINEAR, "modules_to_save": ["lm_head"]}),
    "LoRA with lora_bias, GPT-2": (gpt2, "Lora", {"r": 3, "lora_bias": True, "target_modules": ["c_attn"]}),
    "LoRA with biases": (
        "bert", "Lora",
        {"r": 3, "lora_bias": True, "bias": "all", "target_modules": ["query"], "task_type": "SEQ_CLS"},
    ),
    "LoRA of convolutions": ("resnet_hf", "Lora", {"r": 3, "target_modules": ["convolution"]}),
    "DoRA of convolutions": ("resnet_hf", "Lora", {"r": 3, "target_modules": ["convolution"], "use_dora": True}),
    "DoRA, GPT-2": (gpt2, "Lora", {"r": 3, "target_modules": ["c_attn", "c_fc"], "use_dora": True}),
    "DoRA of an embedding": (llama, "Lora", {"r": 3, "target_modules": ["embed_tokens"], "use_dora": True}),
    "LoRA and tokens": (llama, "Lora", {"target_modules": LINEAR, "trainable_token_indices": [1, 39, 5]}),
    "LoRA and tokens by module": (
        llama, "Lora",
        {"target_modules": LINEAR, "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [0]}},
    ),
    "tokens": (llama, "TrainableTokens", {"token_indices": [1, 39, 5], "target_modules": ["embed_tokens"]}),
    "LoHa": (
        llama, "LoHa",
        {"r": 3, "alpha": 5, "target_modules": LINEAR, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 9}},
    ),
    "LoHa of convolutions": ("resnet_hf", "LoHa", {"r": 3, "target_modules": ["convolution"]}),
    "LoHa of convolutions, CP": (
        "resnet_hf", "LoHa", {"r": 3, "target_modules": ["convolution"], "use_effective_conv2d": True},
    ),
    "LoKr": (llama, "LoKr", {"r": 2, "alpha": 5, "target_modules": LINEAR}),
    "LoKr of four factors": (llama, "LoKr", {"r": 1, "alpha": 5, "target_modules": LINEAR, "decompose_both": True}),
    "LoKr, large inner factor": (llama, "LoKr", {"r": 8, "target_modules": LINEAR, "decompose_factor": 4}),
    "LoKr of convolutions": ("resnet_hf", "LoKr", {"r": 2, "target_modules": ["convolution"]}),
    "LoKr of convolutions, CP": (
        "resnet_hf", "LoKr", {"r": 1, "target_modules": ["convolution"], "use_effective_conv2d": True},
    ),
    "IA3": (llama, "IA3", {"target_modules": LINEAR, "feedforward_modules": ["down_proj"]}),
    "IA3, GPT-2": (
        gpt2, "IA3", {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]},
    ),
    "OFT": (llama, "OFT", {"target_modules": LINEAR, "oft_block_size": 4}),
    "OFT, an inverse": (llama, "OFT", {"target_modules": LINEAR, "oft_block_size": 8, "use_cayley_neumann": False}),
    "OFT, two terms": (llama, "OFT", {"target_modules": LINEAR, "oft_block_size": 8, "num_cayley_neumann_terms": 2}),
    "OFT, three terms": (llama, "OFT", {"target_modules": LINEAR, "oft_block_size": 8, "num_cayley_neumann_terms": 3}),
    "OFT, seven terms": (llama, "OFT", {"target_modules": LINEAR, "oft_block_size": 8, "num_cayley_neumann_terms": 7}),
    "OFT, constrained and shared": (
        llama, "OFT",
        {"target_modules": LINEAR, "r": 2, "oft_block_size": 0, "coft": True, "eps": 0.1, "block_share": True},
    ),
    "OFT of an embedding": (llama, "OFT", {"target_modules": ["embed_tokens"], "oft_block_size": 4}),
    "OFT of convolutions": ("resnet_hf", "OFT", {"target_modules": ["convolution"], "oft_block_size": 3}),
    "VeRA": (llama, "Vera", {"target_modules": LINEAR, "r": 5}),
    "VeRA, GPT-2": (gpt2, "Vera", {"target_modules": ["c_attn"], "r": 5}),
    "HRA": (llama, "HRA", {"target_modules": LINEAR, "r": 4}),
    "HRA, Gram and Schmidt": (llama, "HRA", {"target_modules": LINEAR, "r": 4, "apply_GS": True}),
    "HRA of convolutions": ("resnet_hf", "HRA", {"target_modules": ["convolution"], "r": 4}),
    "packed experts, one by one on disk": (
        mixtral, "Lora", {"r": 3, "target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
    "one parameter of packed experts": (
        mixtral, "Lora",
        {
            "r": 3, "target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"], "use_rslora": True,
            "alpha_pattern": {"experts.down_proj": 7},
        },
    ),
    "all linear layers of a mixture": (mixtral, "Lora", {"r": 3, "target_modules": "all-linear"}),
    "packed experts, inputs first": (
        "gpt_oss", "Lora", {"r": 3, "target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
    "packed experts, outputs first": (
        "granitemoe", "Lora",
        {"r": 3, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "packed experts of Qwen3": (
        "qwen3_moe", "Lora", {"r": 3, "target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
    "packed experts of Llama 4": (
        "llama4", "Lora", {"r": 3, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]},
    ),
    "other names on disk, ViT": (
        "vit", "Lora", {"r": 3, "target_modules": ["q_proj", "fc1"], "modules_to_save": ["classifier"]},
    ),
    "other names on disk, LLaVA": ("llava", "Lora", {"r": 3, "target_modules": ["q_proj", "fc1"]}),
}  # fmt: skip


REFUSED: dict[str, tuple[Any, str, dict[str, Any], str]] = {
    "IA3 of convolutions": (
        "resnet_hf", "IA3", {"target_modules": ["convolution"], "feedforward_modules": []}, "IA3 on the convolution",
    ),
    "VeRA without its projections": (
        llama, "Vera", {"target_modules": LINEAR, "r": 5, "save_projection": False}, "save_projection=True",
    ),
    "an embedding of several modules": (
        "t5", "Lora", {"target_modules": ["q"], "modules_to_save": ["shared"]}, "several modules of the base share",
    ),
}  # fmt: skip


def maker(model: Any) -> Callable[[], Any]:
    """What makes a model of a case."""
    return model if callable(model) else lambda: zoo(model)
