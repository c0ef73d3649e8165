"""Tiny language models, and adapters of them as PEFT saves them; tests that import it are skipped without PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

LLAMA = dict(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    tie_word_embeddings=False,
)  # fmt: skip
LORA = dict(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


def mixtral() -> Any:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**LLAMA, num_key_value_heads=2, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def save_any(model: Any, folder: Path, config: Any, seed: int = 1) -> Any:
    """Give a model an adapter of any kind with random weights and save it; the model that PEFT wrapped."""
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter).mul_(0.2))
    adapted.save_pretrained(folder)
    return adapted


def save_adapter(model: Any, folder: Path, seed: int = 1, **config: Any) -> dict[str, torch.Tensor]:
    """Give a model a random adapter and save it; what PEFT makes of the two."""
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{**LORA, **config}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save.default" in name:
                parameter.copy_(torch.randn_like(parameter).mul_(0.3).add_("magnitude" in name))
    adapted.save_pretrained(folder)
    return {k: v.clone() for k, v in adapted.merge_and_unload().state_dict().items()}
