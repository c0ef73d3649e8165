"""Anything in the JSON that lies beside weights: read, or refused in one line, soon."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import refused
from junk import junked
from safetensors.torch import save_file
from soon import soon

from mergeline.merging import merge
from mergeline.merging.errors import UserError

WIDTH, ROWS = 8, 12
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": ROWS, "tie_word_embeddings": False,
    "torch_dtype": "float32", "layer_types": ["full", "full"], "num_local_experts": 2, "quantization_config": None,
    "text_config": {"dtype": "float32", "num_hidden_layers": 2},
}  # fmt: skip
ADAPTER = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "org/base", "alpha_pattern": {"q_proj": 3},
    "use_rslora": False, "fan_in_fan_out": False, "init_lora_weights": True, "target_modules": ["q_proj"],
    "modules_to_save": None, "layer_replication": None,
}  # fmt: skip
PROVENANCE = {"source": "hf://org/base@1", "revision": None}


def tokenizer(*added: str) -> dict[str, Any]:
    entries = [{"content": token, "id": 8 + i} for i, token in enumerate(added)]
    return {"model": {"vocab": {f"t{i}": i for i in range(8)}}, "added_tokens": entries}


NUMBERED = {**tokenizer("<base>"), "added_tokens": [{"content": 7, "id": 8}]}


def layers(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (ROWS, WIDTH),
        "lm_head.weight": (ROWS, WIDTH),
    }
    for i in range(2):
        shapes[f"model.layers.{i}.self_attn.q_proj.weight"] = (WIDTH, WIDTH)
        shapes[f"model.layers.{i}.mlp.experts.gate_up_proj"] = (2, WIDTH, 2 * WIDTH)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """base, a and b, with other tokens each, and an adapter of the base."""
    for seed, name in enumerate(("base", "a", "b")):
        folder = tmp_path / name
        folder.mkdir()
        save_file(layers(seed), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer(f"<{name}>", "<s>")))
        (folder / "provenance.json").write_text(json.dumps(PROVENANCE))
    (tmp_path / "lora").mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{name}.lora_A.weight": torch.ones(2, WIDTH), f"{name}.lora_B.weight": torch.ones(WIDTH, 2)}
    save_file(factors, tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(ADAPTER))
    return tmp_path


def merged(family: Path, adapter: bool) -> None:
    experts = ("lora",) if adapter else ("a", "b")
    method = {"method": "average"} if adapter else {"method": "cart", "vocabulary": "union"}
    recipe = {**method, "base": family / "base", "experts": {name: family / name for name in experts}}
    merge(recipe, family / "out", workers=1)


FILES = {
    "base/config.json": CONFIG,
    "a/config.json": CONFIG,
    "base/tokenizer.json": tokenizer("<base>", "<s>"),
    "a/tokenizer.json": tokenizer("<a>", "<s>"),
    "base/provenance.json": PROVENANCE,
    "lora/adapter_config.json": ADAPTER,
}


def check(file: str, family: Path, most: int | None) -> None:
    cases = list(junked(FILES[file]))
    for way, junk, changed in cases if most is None else random.Random(0).sample(cases, most):
        (family / file).write_text(json.dumps(changed))
        try:
            with soon():
                merged(family, file.startswith("lora"))
        except UserError as error:
            assert "\n" not in str(error), (way, junk)


@pytest.mark.parametrize("file", FILES)
def test_some_values_may_be_anything(file, family):
    check(file, family, 2)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_any_value_may_be_anything(file, family):
    check(file, family, None)


@pytest.mark.parametrize(
    ("file", "changed", "parts"),
    [
        ("base/tokenizer.json", NUMBERED, ["tokens must be text"]),
        ("lora/adapter_config.json", {**ADAPTER, "alpha_pattern": {"q_proj": None}}, ["alpha_pattern", "no numbers"]),
        ("lora/adapter_config.json", {**ADAPTER, "alpha_pattern": 1}, ["alpha_pattern", "no numbers"]),
    ],
)  # fmt: skip
def test_what_is_no_such_file_is_refused(file, changed, parts, family):
    (family / file).write_text(json.dumps(changed))
    with refused(file, *parts):
        merged(family, file.startswith("lora"))


@pytest.mark.parametrize("named", [1, True, "LlamaForCausalLM", {"x": 1}, [None]])
def test_a_configuration_may_name_its_architectures_badly(named, family):
    (family / "base" / "config.json").write_text(json.dumps({**CONFIG, "architectures": named}))
    merged(family, False)
