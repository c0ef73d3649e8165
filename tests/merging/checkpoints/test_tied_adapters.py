"""Adapters of a base whose output matrix is its embedding: the merge computes what PEFT's model does, as adapted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_adapters import LLAMA, gpt2, peft, save_any, transformers

from mergeline.merging import merge
from mergeline.merging.engine.planning import make_plan


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, "tie_word_embeddings": True}))


LAYERS = {llama: ("q_proj", "embed_tokens"), gpt2: ("c_attn", "wte")}
# Configuration with E for the embedding, and whether the two become different
CASES = [
    ({"modules_to_save": ["E"]}, True),
    ({"modules_to_save": ["lm_head"]}, True),
    ({"modules_to_save": ["E", "lm_head"]}, True),
    ({"also": ["E"]}, True),
    ({"also": ["lm_head"]}, True),
    ({"also": ["E", "lm_head"]}, True),
    ({"trainable_token_indices": {"E": [1, 3]}}, False),
    ({"trainable_token_indices": {"E": [1, 3], "lm_head": [2, 3]}}, True),
    ({}, False),
]
INPUTS = torch.tensor([[1, 3, 2, 9, 12, 15, 18, 21]])


def lora(model: Any, change: dict[str, Any]) -> Any:
    layer, embedding = LAYERS[model]
    named = json.loads(json.dumps(change).replace('"E"', f'"{embedding}"'))
    targets = [layer, *named.pop("also", [])]
    return peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM", **named)


def same(folder: Path, adapted: Any) -> None:
    found = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected, logits = adapted(INPUTS).logits, found(INPUTS).logits
    assert torch.allclose(logits, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(("change", "unties"), CASES)
@pytest.mark.parametrize("model", [llama, gpt2])
def test_the_merge_computes_what_the_adapted_model_does(model, change, unties, tmp_path):
    model().save_pretrained(tmp_path / "base")
    adapted = save_any(model(), tmp_path / "lora", lora(model, change))
    recipe = {"method": "average", "base": tmp_path / "base", "experts": {"a": tmp_path / "lora"}}
    said = [w for w in make_plan(recipe).warnings if "tie_word_embeddings: false" in w]
    assert bool(said) == unties
    merge(recipe, tmp_path / "out")
    same(tmp_path / "out", adapted)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config.get("tie_word_embeddings") is False) == unties


@pytest.mark.parametrize("change", [{"modules_to_save": ["E"]}, {"also": ["E"]}])
@pytest.mark.parametrize("model", [llama, gpt2])
def test_what_peft_keeps_tied_stays_tied(model, change, tmp_path):
    """PEFT saves the embedding and the output matrix where it has tied them, and one of them where it has not."""
    model().save_pretrained(tmp_path / "base")
    config = lora(model, change)
    config.ensure_weight_tying = True
    adapted = save_any(model(), tmp_path / "lora", config)
    merge(
        {"method": "average", "base": tmp_path / "base", "experts": {"a": tmp_path / "lora"}},
        tmp_path / "out",
    )
    same(tmp_path / "out", adapted)


def test_a_tied_expert_beside_one_that_is_not_keeps_its_embedding_as_output_matrix(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    for seed, change in enumerate([{"modules_to_save": ["E"]}, {"trainable_token_indices": {"E": [1, 3]}}]):
        save_any(llama(), tmp_path / f"lora{seed}", lora(llama, change), seed)
    full = llama()
    with torch.no_grad():
        full.model.embed_tokens.weight.add_(0.1)
    full.save_pretrained(tmp_path / "full")
    experts = {name: tmp_path / name for name in ("lora0", "lora1", "full")}
    recipe = {"method": "average", "base": tmp_path / "base", "experts": experts}
    merge({**recipe, "experts": {"a": tmp_path / "lora1"}}, tmp_path / "one")
    merge(recipe, tmp_path / "out")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    one = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    base = llama().lm_head.weight
    expected = (base + one.lm_head.weight + (base + 0.1)) / 3
    assert torch.allclose(found.lm_head.weight, expected, atol=1e-6)
    assert not torch.allclose(found.lm_head.weight, found.model.embed_tokens.weight, atol=1e-3)
