"""Adapters that are made open in PEFT, whatever architecture their inputs are of, and are what they are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import model_zoo
import pytest
import torch
from checkpoints import refused
from peft_adapters import gpt2, llama, peft, save_any
from safetensors.torch import load_file

from mergeline.merging import merge
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.extract_lora import extract_lora
from mergeline.merging.verify import verify

AVERAGE: dict[str, Any] = {"method": "average"}


def zoo(name: str) -> Any:
    torch.manual_seed(0)
    return model_zoo.build(name)


def tuned(name: str) -> Any:
    model = zoo(name)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


FEW = (
    "llama",
    "gpt2",
    "t5",
    "vit",
    "llava",
    "mixtral",
    "resnet_hf",
)  # of different kinds; the others are slower
ZOO = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in model_zoo.TRANSFORMERS]


@pytest.mark.parametrize("name", ZOO)
def test_an_adapter_of_a_fine_tune_opens_in_peft(name, tmp_path):
    """What is in it is the fine-tune's to the last rounding, both for PEFT and for our own reader."""
    zoo(name).save_pretrained(tmp_path / "base")
    tuned(name).save_pretrained(tmp_path / "tuned")
    recipe = {**AVERAGE, "base": tmp_path / "base", "experts": {"a": tmp_path / "tuned"}}
    made = extract_lora(recipe, tmp_path / "lora", rank=1.0)["adapter"]
    state = (
        peft.PeftModel.from_pretrained(zoo(name), tmp_path / "lora")
        .base_model.merge_and_unload()
        .state_dict()
    )
    expected, before = tuned(name).state_dict(), zoo(name).state_dict()
    changed = [key for key in expected if not torch.equal(state[key], before[key])]
    assert all(torch.allclose(state[key], expected[key], atol=1e-6) for key in changed)
    merge({**recipe, "experts": {"a": tmp_path / "lora"}}, tmp_path / "back")
    back, whole, base = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("back", "tuned", "base")
    )
    held = [key for key in back if not torch.equal(back[key], base[key])]
    assert sorted(held) == sorted(made["matrices"])
    assert all(torch.allclose(back[key], whole[key], atol=1e-6) for key in held)
    # As many numbers are changed in PEFT's model as here, where experts may be packed.
    assert sum(state[key].numel() for key in changed) == sum(back[key].numel() for key in held)


def two(model: Any, folder: Path, **config: Any) -> dict[str, Path]:
    """A base and two adapters of different modules and ranks."""
    model().save_pretrained(folder / "base")
    layers = ["q_proj", "down_proj"] if model is llama else ["c_attn", "c_fc"]
    for i, (name, targets) in enumerate((("a", layers), ("b", layers[:1]))):
        save_any(model(), folder / name, peft.LoraConfig(r=3 + i, target_modules=targets, **config), seed=i)
    return {"a": folder / "a", "b": folder / "b"}


METHODS = [
    ("average", {}),
    ("linear", {"weights": [0.75, 0.25]}),
    ("task_arithmetic", {"scale": 0.5}),
]


@pytest.mark.parametrize(("method", "params"), METHODS)
@pytest.mark.parametrize("model", [llama, gpt2])
def test_adapters_without_a_base_become_one_whose_factors_stand_one_after_the_other(
    model, method, params, tmp_path
):
    """It adds exactly what the merge with the base does, though one adapter lacks modules of the other."""
    experts = two(model, tmp_path)
    recipe = {"method": method, "params": params, "experts": experts}
    merge({**recipe, "base": tmp_path / "base"}, tmp_path / "expected")
    made = extract_lora(recipe, tmp_path / "out")["adapter"]
    assert {matrix["rank"] for matrix in made["matrices"].values()} == {3, 7}
    state = peft.PeftModel.from_pretrained(model(), tmp_path / "out").merge_and_unload().state_dict()
    merge({**AVERAGE, "base": tmp_path / "base", "experts": {"out": tmp_path / "out"}}, tmp_path / "ours")
    found, expected = (load_file(tmp_path / f / "model.safetensors") for f in ("ours", "expected"))
    for key, value in expected.items():
        assert torch.allclose(found[key], value, atol=1e-6), key
        assert torch.allclose(state[key], value, atol=1e-6), key
    assert "bit-identical" in verify(tmp_path / "out")


def test_cat_is_what_peft_concatenates(tmp_path):
    experts = two(llama, tmp_path)
    recipe = {"method": "task_arithmetic", "params": {"scale": 0.5}, "base": tmp_path / "base"}
    save_any(llama(), tmp_path / "c", peft.LoraConfig(r=5, target_modules=["q_proj", "down_proj"]), seed=9)
    extract_lora(
        {**recipe, "experts": {"a": experts["a"], "c": tmp_path / "c"}}, tmp_path / "out", rank="cat"
    )
    wrapped = peft.PeftModel.from_pretrained(llama(), experts["a"], adapter_name="a")
    wrapped.load_adapter(tmp_path / "c", adapter_name="c")
    wrapped.add_weighted_adapter(["a", "c"], [0.5, 0.5], "both", combination_type="cat")
    wrapped.set_adapter("both")
    expected = wrapped.merge_and_unload(adapter_names=["both"]).state_dict()
    found = peft.PeftModel.from_pretrained(llama(), tmp_path / "out").merge_and_unload().state_dict()
    assert all(torch.allclose(found[key], expected[key], atol=1e-6) for key in expected)


def test_what_adapters_without_a_base_cannot_become(tmp_path):
    experts = two(llama, tmp_path)
    with refused("without a base", "extract-lora", "name the base"):
        merge({**AVERAGE, "experts": experts}, tmp_path / "out")
    assert "become one adapter" in make_plan({**AVERAGE, "experts": experts}).warnings[-1]
    with refused("ties of adapters without a base", "name the base"):
        extract_lora({"method": "ties", "experts": experts}, tmp_path / "out")
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], use_dora=True)
    save_any(llama(), tmp_path / "dora", config)
    with refused("use_dora", "name the base"):
        extract_lora({**AVERAGE, "experts": {**experts, "d": tmp_path / "dora"}}, tmp_path / "out")
    with refused("no weighted sum of adapters", "give a number"):
        ties = {"method": "ties", "base": tmp_path / "base", "experts": experts}
        extract_lora(ties, tmp_path / "out", rank="cat")
    assert not (tmp_path / "out").exists()
