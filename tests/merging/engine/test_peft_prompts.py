"""Soft prompts of PEFT are merged with one another, without a model, and PEFT opens what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import State, refused
from peft_adapters import llama, peft, save_any
from safetensors.torch import load_file

from mergeline.merging import merge
from mergeline.merging.compress import compress
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.extract_lora import extract_lora
from mergeline.merging.verify import verify

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "PROMPT_TUNING": ("PromptTuningConfig", {}),
    "P_TUNING": ("PromptEncoderConfig", {"encoder_hidden_size": 8}),
    "PREFIX_TUNING": ("PrefixTuningConfig", {}),
}


def saved(folder: Path, kind: str, seed: int) -> State:
    name, config = KINDS[kind]
    made = getattr(peft, name)(task_type="CAUSAL_LM", num_virtual_tokens=3, **config)
    save_any(llama(), folder, made, seed)
    return load_file(folder / "adapter_model.safetensors")


def recipe_of(folder: Path, **more: Any) -> dict[str, Any]:
    return {"method": "average", "experts": {name: folder / name for name in "ab"}, **more}


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_become_an_adapter_that_peft_opens(kind, tmp_path):
    a, b = (saved(tmp_path / name, kind, seed) for seed, name in enumerate("ab"))
    assert (
        "soft prompts are merged by position, and stay an adapter" in make_plan(recipe_of(tmp_path)).warnings
    )
    merge(recipe_of(tmp_path), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    assert "bit-identical" in verify(tmp_path / "out")
    expected = (a["prompt_embeddings"] + b["prompt_embeddings"]) / 2
    opened = peft.PeftModel.from_pretrained(llama(), tmp_path / "out").eval()
    assert torch.equal(opened.prompt_encoder["default"].embedding.weight, expected)
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert not torch.equal(opened(input_ids=tokens).logits, llama().eval()(input_ids=tokens).logits)


def test_what_training_began_with_may_be_the_base(tmp_path):
    a, b, base = (saved(tmp_path / name, "PROMPT_TUNING", i) for i, name in enumerate(["a", "b", "base"]))
    with refused("task_arithmetic measures from the base checkpoint"):
        merge(recipe_of(tmp_path, method="task_arithmetic"), tmp_path / "out")
    recipe = recipe_of(tmp_path, method="task_arithmetic", base=tmp_path / "base", params={"scale": 0.5})
    merge(recipe, tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")["prompt_embeddings"]
    a, b, start = (state["prompt_embeddings"] for state in (a, b, base))
    assert torch.allclose(found, start + 0.5 * (a - start + b - start), atol=1e-6)


def test_prompts_that_do_not_belong_together_are_refused_or_named(tmp_path):
    saved(tmp_path / "a", "PROMPT_TUNING", 0)
    saved(tmp_path / "b", "P_TUNING", 1)
    with refused("'b' is an adapter of type P_TUNING, 'a' of PROMPT_TUNING: merge those of one type"):
        merge(recipe_of(tmp_path), tmp_path / "out")
    save_any(llama(), tmp_path / "lora", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    mixed = {"method": "average", "experts": {"a": tmp_path / "a", "lora": tmp_path / "lora"}}
    with refused("PROMPT_TUNING, which adds inputs to the model", "merge it with others of its type"):
        merge(mixed, tmp_path / "out")
    llama().save_pretrained(tmp_path / "base")
    with refused("PROMPT_TUNING, which adds inputs to the model", "merge it with others of its type"):
        merge(
            {"method": "average", "base": tmp_path / "base", "experts": {"a": tmp_path / "a"}},
            tmp_path / "out",
        )
    saved(tmp_path / "b", "PROMPT_TUNING", 1)
    path = tmp_path / "b" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "org/other"}))
    said = "'b' is for 'org/other', 'a' for None: an adapter is of use to one model alone"
    assert said in make_plan(recipe_of(tmp_path)).warnings
    with refused("an adapter adds to a base: name it"):
        extract_lora(recipe_of(tmp_path), tmp_path / "out")
    start = {"method": "tall_mask", "base": tmp_path / "b", "experts": {"a": tmp_path / "a"}}
    with refused("are merged as they lie, by `mergeline merge`, and become nothing else"):
        compress(start, tmp_path / "out")
    path.write_text("{")
    with refused("adapter_config.json"):
        merge(recipe_of(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
