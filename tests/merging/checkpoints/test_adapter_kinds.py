"""Adapters of every kind that is read: what PEFT's merge_and_unload makes of tiny real models, to 1e-6."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import model_zoo
import pytest
import torch
from checkpoints import refused
from peft_adapters import gpt2, llama, mixtral, peft, save_any
from safetensors.torch import load_file, save_file

from mergeline.merging import merge
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.engine.sources import FileInputs

LINEAR = ["q_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def zoo(name: str) -> Any:
    torch.manual_seed(0)
    return model_zoo.build(name)


# Model, kind of the adapter, its configuration
KINDS: dict[str, tuple[Any, str, dict[str, Any]]] = {
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


@pytest.mark.parametrize("case", KINDS)
def test_an_adapter_of_any_kind_is_what_peft_merges(case, tmp_path):
    model, kind, config = KINDS[case]
    make = model if callable(model) else lambda: zoo(model)
    make().save_pretrained(tmp_path / "base")
    adapted = save_any(make(), tmp_path / "lora", getattr(peft, f"{kind}Config")(**config))
    adapted.merge_and_unload().save_pretrained(tmp_path / "peft")
    recipe = {"method": "average", "base": tmp_path / "base", "experts": {"a": tmp_path / "lora"}}
    merge(recipe, tmp_path / "out")
    found, expected, before = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "peft", "base"))
    assert found.keys() == expected.keys()
    changed = [name for name in found if not torch.equal(found[name], before[name])]
    assert changed and max((found[n] - before[n]).abs().max() for n in changed) > 1e-3
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("case", KINDS)
def test_any_pieces_of_any_kind_give_the_same_bits(case, tmp_path, monkeypatch):
    monkeypatch.setattr("mergeline.merging.checkpoints.adapters.tensor._BLOCK", 64)
    model, kind, config = KINDS[case]
    make = model if callable(model) else lambda: zoo(model)
    make().save_pretrained(tmp_path / "base")
    save_any(make(), tmp_path / "lora", getattr(peft, f"{kind}Config")(**config))
    plan = make_plan({"method": "average", "base": tmp_path / "base", "experts": {"a": tmp_path / "lora"}})
    plan.check()
    entry = max((e for e in plan.entries if e.sources["a"] is not e.base), key=lambda e: e.spec.nbytes)
    with FileInputs(plan) as source:
        length = source.length("a", entry.name)
        whole = source.stored("a", entry.name, 0, length)
        for step in (97, length // 3 + 1):
            pieces = [
                source.stored("a", entry.name, i, min(i + step, length)) for i in range(0, length, step)
            ]
            assert torch.equal(torch.cat(pieces), whole)


def test_factors_of_packed_experts_lie_as_is_said(tmp_path):
    """The same product from columns by expert, as Unsloth packs them."""
    mixtral().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, target_modules=[], target_parameters=EXPERTS)
    save_any(mixtral(), tmp_path / "lora", config)
    recipe = {"method": "average", "base": tmp_path / "base", "experts": {"a": tmp_path / "lora"}}
    assert any("packing: unsloth" in warning for warning in make_plan(recipe).warnings)
    merge(recipe, tmp_path / "one")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    parts = load_file(file)
    for name, value in parts.items():
        if "lora_B" in name:
            parts[name] = value.reshape(len(value), 3, 4).transpose(1, 2).reshape(len(value), -1).contiguous()
    save_file(parts, file)
    merge({**recipe, "packing": "unsloth"}, tmp_path / "two")
    one, two = (load_file(tmp_path / f / "model.safetensors") for f in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


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


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_by_its_name(case, tmp_path):
    model, kind, config, line = REFUSED[case]
    make = model if callable(model) else lambda: zoo(model)
    make().save_pretrained(tmp_path / "base")
    save_any(make(), tmp_path / "lora", getattr(peft, f"{kind}Config")(**config))
    with refused("a: ", line):
        merge(
            {"method": "average", "base": tmp_path / "base", "experts": {"a": tmp_path / "lora"}},
            tmp_path / "out",
        )
    assert not Path(tmp_path / "out").exists()
