"""PEFT adapters as experts: what PEFT itself merges, read in any pieces; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from checkpoints import refused
from peft_adapters import LLAMA, gpt2, llama, save_adapter, transformers
from safetensors.torch import load_file, save_file

from mergeline.merging import merge
from mergeline.merging.algebra import decompositions
from mergeline.merging.compress import compress, extract_expert
from mergeline.merging.engine.manifest import identity
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.engine.sources import FileInputs


@pytest.fixture
def family(tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A base, an adapter, and what PEFT merges."""
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base", tmp_path / "lora", save_adapter(llama(), tmp_path / "lora")


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (llama, {}),
        (llama, {"use_rslora": True}),
        (llama, {"use_dora": True}),
        (llama, {"use_dora": True, "use_rslora": True, "r": 20}),
        (
            llama,
            {
                "rank_pattern": {"q_proj": 2},
                "alpha_pattern": {"layers.1.self_attn.q_proj": 9, "down_proj": 1},
            },
        ),
        (llama, {"target_modules": ["q_proj", "embed_tokens"]}),
        (llama, {"modules_to_save": ["lm_head"]}),
        (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
)
def test_an_adapter_is_what_peft_merges(model, config, tmp_path):
    model().save_pretrained(tmp_path / "base")
    expected = save_adapter(model(), tmp_path / "lora", **config)
    merge(
        {"method": "average", "base": tmp_path / "base", "experts": {"lora": tmp_path / "lora"}},
        tmp_path / "out",
    )
    found, before = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "base"))
    changed = {name for name, value in found.items() if not torch.equal(value, before[name])}
    assert changed and changed <= set(expected)
    for name, value in found.items():
        assert torch.allclose(value, expected[name], rtol=1e-5, atol=1e-6), name


def test_any_pieces_give_the_same_bits(family, monkeypatch):
    base, lora, _ = family
    monkeypatch.setattr("mergeline.merging.checkpoints.adapters.tensor._BLOCK", 64)
    plan = make_plan({"method": "average", "base": base, "experts": {"lora": lora}})
    name = "model.layers.0.mlp.down_proj.weight"
    with FileInputs(plan) as source:
        whole = source.stored("lora", name, 0, 16 * 24)
        for step in (1, 7, 24, 100, 384):
            pieces = [source.stored("lora", name, i, min(i + step, 384)) for i in range(0, 384, step)]
            assert torch.equal(torch.cat(pieces), whole)
        assert torch.equal(source.stored("lora", name, 50, 120), whole[50:120])


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "della", "cart"])
def test_adapters_merge_as_their_full_models_do(method, family, tmp_path):
    base, lora, expected = family
    experts, full = {"a": lora}, {}
    save_file(expected, tmp_path / "a.safetensors")
    for seed, name in ((2, "b"), (3, "c")):
        save_file(save_adapter(llama(), tmp_path / name, seed), tmp_path / f"{name}.safetensors")
        experts[name] = tmp_path / name
    full = {name: tmp_path / f"{name}.safetensors" for name in experts}
    merge({"method": method, "base": base, "experts": experts}, tmp_path / "one.safetensors")
    merge({"method": method, "base": base, "experts": full}, tmp_path / "two.safetensors")
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    for name, value in two.items():
        assert torch.allclose(one[name], value, rtol=1e-4, atol=1e-5), name


def test_a_mixture_of_adapters_and_full_models_and_its_manifest(family, tmp_path):
    from mergeline.merging.checkpoints.checkpoint import open_checkpoint
    from mergeline.merging.verify import verify

    base, lora, expected = family
    save_file(expected, tmp_path / "full.safetensors")
    recipe = {"method": "average", "base": base, "experts": {"a": lora, "b": tmp_path / "full.safetensors"}}
    manifest = merge(recipe, tmp_path / "out")
    assert manifest["recipe"]["experts"]["a"]["digest"] == open_checkpoint(lora).digest()
    assert "bit-identical" in verify(tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def edited(path: Path, **change: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"peft_type": "BOFT"}, ["BOFT", "LORA, LOHA", "merge it with PEFT"]),
        ({"peft_type": "PREFIX_TUNING"}, ["PREFIX_TUNING", "adds inputs", "cannot be merged"]),
        ({"alora_invocation_tokens": [1, 2]}, ["aLoRA", "cannot be merged"]),
        ({"kasa_config": {}, "use_bdlora": {"nblocks": 2}}, ["use_bdlora", "BD-LoRA"]),
        ({"use_qalora": True}, ["use_qalora", "with PEFT first"]),
        (
            {"init_lora_weights": "pissa_niter_4"},
            ["pissa_niter_4", "path_initial_model_for_weight_conversion"],
        ),
        ({"lora_alpha": None}, ["lora_alpha"]),
        ({"layer_replication": [[0, 1]]}, ["layer_replication"]),
        ({"alpha_pattern": {"(": 1}}, ["alpha_pattern", "regular expression"]),
        ({"lora_alpha": 10**400}, ["lora_alpha"]),
        ({"lora_alpha": float("nan")}, ["lora_alpha"]),
        ({"alpha_pattern": {"q_proj": None}}, ["alpha_pattern", "no numbers"]),
        ({"alpha_pattern": ["q_proj"]}, ["alpha_pattern", "no numbers"]),
        ({"alpha_pattern": {"([a-z_.0-9]+)+X": 1}}, ["alpha_pattern", "for ever"]),
        ({"alpha_pattern": {".*.*.*.*X": 1}}, ["alpha_pattern", "for ever"]),
        ({"peft_type": None}, ["peft_type"]),
    ],
)
def test_configurations_that_are_refused(change, parts, family, tmp_path):
    base, lora, _ = family
    edited(lora / "adapter_config.json", **change)
    with refused("lora: ", "adapter_config.json", *parts):
        merge({"method": "average", "base": base, "experts": {"lora": lora}}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base(family, tmp_path):
    base, lora, _ = family
    torch.manual_seed(0)
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, "hidden_size": 8}))
    other.save_pretrained(tmp_path / "small")
    edited(lora / "adapter_config.json", base_model_name_or_path="org/right")
    with refused("does not fit the base", "factors [3, 24] and [16, 3]", "'org/right'"):
        merge({"method": "average", "base": tmp_path / "small", "experts": {"lora": lora}}, tmp_path / "out")
    gpt2().save_pretrained(tmp_path / "gpt2")
    with refused("does not fit the base", "layers.0.mlp.down_proj.weight' is not there", "'org/right'"):
        merge({"method": "average", "base": tmp_path / "gpt2", "experts": {"lora": lora}}, tmp_path / "out")


def test_a_factor_that_is_missing_or_not_finite(family, tmp_path):
    base, lora, _ = family
    weights = load_file(lora / "adapter_model.safetensors")
    key = next(name for name in weights if "lora_B" in name)
    save_file({k: v for k, v in weights.items() if k != key}, lora / "adapter_model.safetensors")
    recipe = {"method": "average", "base": base, "experts": {"lora": lora}}
    with refused("lacks one of its factors"):
        merge(recipe, tmp_path / "out")
    save_file({**weights, key: weights[key] * float("nan")}, lora / "adapter_model.safetensors")
    with refused("'lora'", "holds NaN"):
        merge(recipe, tmp_path / "out")


def test_an_adapter_without_a_base_is_refused(family, tmp_path):
    """Factors would be merged one by one, which is no merge of what they add."""
    _, lora, _ = family
    with refused("without a base", "name the base", "extract-lora"):
        merge({"method": "average", "experts": {"lora": lora}}, tmp_path / "out")


@pytest.mark.parametrize("where", ["", "adapter_model.safetensors"])
def test_another_scaling_is_another_merge(where, family):
    """A merge that was stopped does not go on with another lora_alpha; an adapter's file alone will do."""
    base, lora, _ = family
    recipe = {"method": "average", "base": base, "experts": {"lora": lora / where}}
    before = identity(make_plan(recipe), "cpu")
    assert identity(make_plan(recipe), "cpu") == before
    edited(lora / "adapter_config.json", lora_alpha=7)
    assert identity(make_plan(recipe), "cpu") != before


@pytest.mark.parametrize("model", [llama, gpt2])
def test_methods_that_merge_factors_get_those_that_peft_has(model, tmp_path):
    model().save_pretrained(tmp_path / "base")
    targets = ["q_proj", "down_proj"] if model is llama else ["c_attn"]
    merged = save_adapter(model(), tmp_path / "lora", target_modules=targets, fan_in_fan_out=model is gpt2)
    recipe = {
        "method": "core_space",
        "params": {"inner": "task_arithmetic", "scale": 1.0},
        "experts": {"lora": tmp_path / "lora"},
    }
    with refused("without a base", "name the base"):
        merge(recipe, tmp_path / "out")
    with patch.object(
        decompositions, "singular_triplets"
    ) as decomposed:  # which others are, where they differ at all
        decomposed.side_effect = lambda a_MN: (a_MN[:, :0], a_MN[0, :0], a_MN[:0].T)
        merge({**recipe, "base": tmp_path / "base"}, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.allclose(found[name], merged[name], atol=1e-5) for name in found)


def test_a_store_gives_adapters_back_as_full_models(family, tmp_path):
    base, lora, _ = family
    experts = {"a": lora}
    for seed, name in ((2, "b"), (3, "c")):
        save_adapter(llama(), tmp_path / name, seed)
        experts[name] = tmp_path / name
    recipe = {"method": "tsv_compress", "base": base, "experts": experts, "params": {"task": 1}}
    compress(recipe, tmp_path / "store.safetensors")
    found = extract_expert(tmp_path / "store.safetensors", "b", tmp_path / "found.safetensors")
    assert found["output"]["digest"] == merge(recipe, tmp_path / "out.safetensors")["output"]["digest"]
