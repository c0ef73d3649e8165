"""LoRA adapters as output: what PEFT and our own reader make of them; best approximations; factors stay factors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from checkpoints import State, edit, file_hashes, refused, save_family
from golden_cases import ALL
from golden_cases import recipe as golden_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from patched import patch_everywhere
from peft_adapters import LLAMA, gpt2, llama, peft, save_adapter, transformers
from places import GOLDENS
from safetensors.torch import load_file, save_file

from mergeline.merging import extract_lora as module
from mergeline.merging import merge
from mergeline.merging.algebra import decompositions
from mergeline.merging.checkpoints.adapters import AdaptedTensor
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.engine.manifest import manifest_path
from mergeline.merging.extract_lora import extract_lora
from mergeline.merging.methods import catalogue
from mergeline.merging.verify import verify

SHAPES = {  # as open_clip and transformers name them
    "blocks.0.attn.weight": (6, 4),
    "blocks.0.mlp.weight": (3, 5),
    "blocks.0.in_proj_weight": (6, 3),
    "blocks.1.attn.weight": (4, 4),
    "blocks.1.attn.bias": (4,),
    "blocks.1.norm.weight": (4,),
    "head.weight": (5, 4),
    "logit_scale": (),
}
MATRICES = ["blocks.0.attn.weight", "blocks.0.mlp.weight", "blocks.1.attn.weight"]  # that PEFT knows


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Any]:
    """A base and one fine-tune of it; a recipe."""
    return save_family(tmp_path / "in", experts=1, shapes=SHAPES)


def adapted(base: Path, adapter: Path, folder: Path) -> State:
    """What our reader makes of an adapter and its base."""
    merge({"method": "average", "base": base, "experts": {"e": adapter}}, folder / "adapted.safetensors")
    return load_file(folder / "adapted.safetensors")


def by_peft(model: Any, adapter: Path) -> State:
    """What PEFT makes of an adapter and its base; it must find a place for every tensor."""
    wrapped = peft.PeftModel.from_pretrained(model, adapter)
    stored = load_file(adapter / "adapter_model.safetensors")
    state = peft.get_peft_model_state_dict(wrapped)
    assert stored.keys() <= state.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    return wrapped.merge_and_unload().state_dict()


def close(a: State, b: State, atol: float = 1e-5) -> bool:
    return all(torch.allclose(a[name].double(), b[name].double(), atol=atol) for name in b)


# ------------------------------------------------------------------------------------- of one fine-tune


def test_at_full_rank_with_all_else_whole_the_adapter_is_the_fine_tune(family, tmp_path):
    edit(family["base"], blocks__0__in_proj_weight=None, blocks__1__attn__bias=None, logit_scale=None)
    edit(family["experts"]["a"], blocks__0__in_proj_weight=None, blocks__1__attn__bias=None, logit_scale=None)
    manifest = extract_lora(family, tmp_path / "lora", rank=1.0, modules_to_save=["*"])
    found = adapted(family["base"], tmp_path / "lora", tmp_path)
    assert close(found, load_file(family["experts"]["a"]), 1e-6)
    made = manifest["adapter"]
    assert made["energy"] == 1.0 and made["left_out"] == {"tensors": 0, "energy": 0.0, "largest": None}
    assert {name: matrix["rank"] for name, matrix in made["matrices"].items()} == dict(
        zip(MATRICES, (4, 3, 4))
    )
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["blocks.1.norm", "head"]
    assert (config["r"], config["rank_pattern"]) == (4, {"^blocks.0.mlp": 3})


def test_the_error_is_the_tail_of_the_spectrum(family, tmp_path):
    manifest = extract_lora({**family, "dtype": "float64"}, tmp_path / "lora", rank=2)
    base, expert = load_file(family["base"]), load_file(family["experts"]["a"])
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert len(stored) == 6
    kept = whole = 0.0
    for name, like in base.items():
        tau = expert[name].double() - like.double()
        whole += float(tau.square().sum())
        if name in MATRICES:
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            down, up = stored[f"{key}A.weight"], stored[f"{key}B.weight"]
            assert down.shape == (2, tau.shape[1]) and up.shape == (tau.shape[0], 2)
            assert torch.allclose(down @ down.T, up.T @ up, atol=1e-12)  # the singular values are shared
            s = torch.linalg.svdvals(tau)
            assert float((tau - up @ down).norm()) == pytest.approx(float(s[2:].norm()), rel=1e-9)
            share = float(s[:2].square().sum() / s.square().sum())
            assert manifest["adapter"]["matrices"][name] == {
                "rank": 2,
                "energy": pytest.approx(share, abs=1e-6),
            }
            kept += float(s[:2].square().sum())
    assert manifest["adapter"]["energy"] == pytest.approx(kept / whole, abs=1e-6)
    left = manifest["adapter"]["left_out"]
    assert left["tensors"] == 5 and left["largest"] in base.keys() - set(MATRICES)
    lost = sum(float((expert[n].double() - base[n]).square().sum()) for n in base.keys() - set(MATRICES))
    assert left["energy"] == pytest.approx(lost / whole, abs=1e-6)


def test_equals_the_reference(tmp_path):
    [case] = [case for case in ALL if case["method"] == "extract_lora"]
    given = {**golden_recipe(case), "method": "average", "params": {}}
    extract_lora(given, tmp_path / "lora.safetensors", rank=case["params"]["max_rank"])
    stored, expected = load_file(tmp_path / "lora.safetensors"), load_file(GOLDENS / case["expected"])
    for key, value in expected.items():
        name, _, what = key.rpartition(".")
        down, up = stored[f"{name}.lora_A"], stored[f"{name}.lora_B"]
        found = {"BA": up @ down, "absA": down.abs(), "absB": up.abs()}[what]
        assert torch.allclose(found, value, rtol=case["rtol"], atol=case["atol"]), key


def test_counters_of_batch_norm_are_left_out(family, tmp_path):
    """They are integers that no adapter changes, and need not agree."""
    for count, path in enumerate((family["base"], family["experts"]["a"])):
        edit(
            path,
            blocks__0__bn__running_mean=torch.ones(4),
            blocks__0__bn__num_batches_tracked=torch.tensor(count),
        )
    manifest = extract_lora(family, tmp_path / "lora", rank=2)
    assert sorted(manifest["adapter"]["matrices"]) == sorted(MATRICES)
    assert not any("bn" in name for name in load_file(tmp_path / "lora" / "adapter_model.safetensors"))


def test_bare_factors_are_read_as_an_expert(family, tmp_path):
    extract_lora(family, tmp_path / "lora.safetensors", rank=1.0)
    expert, base = load_file(family["experts"]["a"]), load_file(family["base"])
    decomposed = {*MATRICES, "blocks.0.in_proj_weight"}
    expected = {name: (expert if name in decomposed else base)[name] for name in base}
    assert close(adapted(family["base"], tmp_path / "lora.safetensors", tmp_path), expected, 1e-6)


@pytest.mark.parametrize(
    ("rank", "expected"), [(3, [3, 3, 3]), (9, [4, 3, 4]), (0.5, [2, 1, 2]), (0.01, [1] * 3)]
)
def test_ranks_are_numbers_or_shares_and_no_more_than_there_is(rank, expected, family, tmp_path):
    made = extract_lora(family, tmp_path / "lora", rank=rank)["adapter"]
    assert [matrix["rank"] for matrix in made["matrices"].values()] == expected


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float64"])
def test_factors_are_float32_or_what_the_recipe_says(dtype, family, tmp_path):
    extract_lora({**family, "dtype": dtype}, tmp_path / "lora", rank=1)
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype or "float32")}


# ------------------------------------------------------------------------------------- PEFT


def tied_llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | {"tie_word_embeddings": True}))


@pytest.mark.parametrize("model", [llama, tied_llama, gpt2])
def test_peft_reads_what_was_extracted(model, tmp_path):
    """A full fine-tune, everything that is no linear layer of a block kept whole."""
    model().save_pretrained(tmp_path / "base")
    tuned = model()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.ndim == 2 or "norm" in name:  # biases of linear layers have no place in an adapter
                parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "tuned")
    expected = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    recipe = {"method": "average", "base": tmp_path / "base", "experts": {"e": tmp_path / "tuned"}}
    made = extract_lora(recipe, tmp_path / "lora", rank=1.0, modules_to_save=["*"])["adapter"]
    if model is llama:
        assert made["energy"] == 1.0
    else:  # PEFT would change the embedding and leave the output matrix, which is the same
        embedding = "model.embed_tokens.weight" if model is tied_llama else "transformer.wte.weight"
        assert (
            made["energy"] < 1
            and made["left_out"]["largest"] == embedding
            and made["left_out"]["tensors"] == 1
        )
        expected |= dict.fromkeys((embedding, "lm_head.weight"), model().state_dict()[embedding])
    assert close(by_peft(model(), tmp_path / "lora"), expected)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["fan_in_fan_out"] == (
        model is gpt2
    )
    assert not (tmp_path / "lora" / "config.json").exists()


@pytest.mark.parametrize(
    ("model", "config", "rank"),
    [
        (llama, {}, None),
        (llama, {}, 3),
        (llama, {"use_rslora": True}, None),
        (llama, {"use_dora": True}, 1.0),
        (llama, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 1}}, None),
        (llama, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, None),
        (llama, {"modules_to_save": ["lm_head"]}, None),
        (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}, None),
    ],
)
def test_an_adapter_comes_back_as_it_was(model, config, rank, tmp_path):
    model().save_pretrained(tmp_path / "base")
    expected = save_adapter(model(), tmp_path / "lora", **config)
    recipe = {"method": "average", "base": tmp_path / "base", "experts": {"e": tmp_path / "lora"}}
    made = extract_lora(recipe, tmp_path / "out", rank=rank)["adapter"]
    assert made["energy"] == 1.0 and not made["left_out"]["tensors"]
    assert close(by_peft(model(), tmp_path / "out"), expected)
    before, after = (
        {n: t.shape for n, t in open_checkpoint(tmp_path / name).tensors.items() if "base_layer" not in n}
        for name in ("lora", "out")
    )
    assert before == after or config.get("use_dora")
    found = adapted(tmp_path / "base", tmp_path / "out", tmp_path)
    assert close(found, {name: tensor for name, tensor in expected.items() if name in found})


def test_a_convolution_and_names_that_peft_prefixes(tmp_path):
    """The base's file has the names of the bare model inside of the one that was trained."""

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = torch.nn.Conv2d(3, 4, 2)
            self.linear = torch.nn.Linear(4, 5)

    outer = torch.nn.Module()
    outer.inner = Inner()
    save_file(outer.inner.state_dict(), tmp_path / "base.safetensors")
    config = dict(task_type=None, target_modules=["conv", "linear"])
    expected = save_adapter(outer, tmp_path / "lora", **config)
    recipe = {"method": "average", "base": tmp_path / "base.safetensors", "experts": {"e": tmp_path / "lora"}}
    extract_lora(recipe, tmp_path / "out")
    outer.inner = Inner()
    assert close(by_peft(outer, tmp_path / "out"), expected)


# ------------------------------------------------------------------------------------- of merged adapters


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, Any]:
    """A base and three adapters of ranks 3, 2, 1, of partly different modules; experts of a recipe."""
    llama().save_pretrained(tmp_path / "base")
    targets = {"a": ["q_proj", "down_proj"], "b": ["q_proj", "v_proj"], "c": ["q_proj"]}
    for r, (name, modules) in zip((3, 2, 1), targets.items()):
        save_adapter(llama(), tmp_path / name, seed=r, r=r, target_modules=modules)
    return {"base": tmp_path / "base", "experts": {name: tmp_path / name for name in targets}}


WEIGHTED = [
    ("average", {}),
    ("linear", {"weights": [1.0, 2.0, 5.0]}),
    ("task_arithmetic", {"scale": 0.7, "weights": [1.0, -1.0, 2.0]}),
    ("task_arithmetic", {"scale": 0.7, "weights": [1.0, 3.0, 2.0], "normalize": True}),
    ("core_space", {"inner": "tsv_merge"}),
    ("core_space", {"inner": "task_arithmetic", "keys": "block_linear"}),
    ("knots", {"inner": "ties"}),
]


@pytest.mark.parametrize(("method", "params"), WEIGHTED)
def test_a_merge_as_one_adapter_is_the_full_merge(method, params, adapters, tmp_path):
    recipe = {**adapters, "method": method, "params": params}
    merge(recipe, tmp_path / "full.safetensors")
    unchecked = {**recipe, "allow_locked": True}  # the check for locks reads some rows
    with patch.object(AdaptedTensor, "read", autospec=True, side_effect=AdaptedTensor.read) as multiplied:
        made = extract_lora(unchecked, tmp_path / "out")["adapter"]
    assert method == "knots" or not multiplied.called  # whose common directions are those of whole matrices
    assert made["energy"] == 1.0 and made["left_out"] == {"tensors": 0, "energy": 0.0, "largest": None}
    ranks = {name.split(".")[-2]: matrix["rank"] for name, matrix in made["matrices"].items()}
    assert ranks == {"q_proj": 6, "down_proj": 3, "v_proj": 2}
    full = load_file(tmp_path / "full.safetensors")
    assert close(by_peft(llama(), tmp_path / "out"), full)
    assert close(adapted(adapters["base"], tmp_path / "out", tmp_path), full)


@pytest.mark.parametrize(("method", "params"), WEIGHTED)
def test_factors_are_recompressed_as_the_full_merge_is_decomposed(method, params, adapters, tmp_path):
    recipe = {**adapters, "method": method, "params": params, "dtype": "float64"}
    exact = extract_lora(recipe, tmp_path / "exact", rank=2)
    merge(recipe, tmp_path / "full.safetensors")
    full = {"method": "average", "base": adapters["base"], "experts": {"e": tmp_path / "full.safetensors"}}
    dense = extract_lora({**full, "dtype": "float64"}, tmp_path / "dense", rank=2)
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("exact", "dense"))
    for name in (name for name in one if "lora_A" in name):
        other = name.replace("lora_A", "lora_B")
        assert torch.allclose(one[other] @ one[name], two[other] @ two[name], atol=1e-5)
    matrices = dense["adapter"]["matrices"]
    for name, found in exact["adapter"]["matrices"].items():
        assert found["energy"] == pytest.approx(matrices[name]["energy"], abs=1e-5)


@pytest.mark.parametrize(
    ("method", "params"), [("ties", {}), ("lines", {}), ("linear", {"normalize": False})]
)
def test_any_other_method_needs_a_rank(method, params, adapters, tmp_path):
    recipe = {**adapters, "method": method, "params": params}
    with refused("rank", "proj.weight", "--rank"):
        extract_lora(recipe, tmp_path / "out")
    extract_lora(recipe, tmp_path / "out", rank=1.0)
    merge(recipe, tmp_path / "full.safetensors")
    full, base = load_file(tmp_path / "full.safetensors"), load_file(adapters["base"] / "model.safetensors")
    found = adapted(adapters["base"], tmp_path / "out", tmp_path)
    for name in full:
        linear = name.endswith("proj.weight")
        assert torch.allclose(found[name], (full if linear else base)[name], atol=1e-5)


@pytest.mark.parametrize(("method", "scale"), [("wise_ft", 0.75), ("expo", 1.5)])
def test_one_adapter_is_scaled(method, scale, adapters, tmp_path):
    able = {id for id, entry in catalogue().items() if entry.factors}
    assert able == {method for method, _ in WEIGHTED} | {"wise_ft", "expo"}
    recipe = {"base": adapters["base"], "experts": {"a": adapters["experts"]["a"]}}
    extract_lora({**recipe, "method": method}, tmp_path / "out")
    extract_lora({**recipe, "method": "average"}, tmp_path / "plain")
    one, plain = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("out", "plain"))
    assert all(torch.allclose(one[name], plain[name] * scale**0.5, atol=1e-6) for name in plain)


@pytest.mark.parametrize("method", ["average", "cart"])
def test_an_accelerator_gives_the_same(method, adapters, tmp_path, monkeypatch):
    """Its branches, run on the CPU."""
    recipe = {**adapters, "method": method}
    extract_lora(recipe, tmp_path / "cpu", rank=2)
    patch_everywhere(monkeypatch, "on_cpu", lambda tensor: False)
    extract_lora(recipe, tmp_path / "other", rank=2)
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("cpu", "other"))
    for name in (name for name in one if "lora_A" in name):
        other = name.replace("lora_A", "lora_B")
        assert torch.allclose(one[other] @ one[name], two[other] @ two[name], atol=1e-5)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 9), st.integers(1, 9), st.integers(0, 7))
def test_recompression_is_the_svd_of_the_product(seed, rows, columns, inner):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, inner, generator=generator, dtype=torch.float64)
    right = torch.randn(inner, columns, generator=generator, dtype=torch.float64)
    u, s, v = decompositions.recompressed(left, right)
    assert s.shape == (min(rows, columns, inner),) and bool((s[1:] <= s[:-1]).all())
    assert torch.allclose((u * s) @ v.T, left @ right, atol=1e-12)
    assert torch.allclose(u.T @ u, torch.eye(len(s), dtype=torch.float64), atol=1e-12)
    assert torch.allclose(v.T @ v, torch.eye(len(s), dtype=torch.float64), atol=1e-12)


# ------------------------------------------------------------------------------------- promises of the engine


def test_the_bytes_depend_on_nothing_else(adapters, tmp_path):
    recipe = {**adapters, "method": "cart"}
    kinds = [{"workers": 1}, {"workers": 2}, {"memory": 1 << 30}, {"factors": tmp_path / "factors"}]
    hashes = []
    for number, kind in enumerate(kinds):
        extract_lora(recipe, tmp_path / str(number), rank=2, **kind)
        hashes.append(file_hashes(tmp_path / str(number)))
    assert all(found == hashes[0] for found in hashes)
    assert sorted(hashes[0]) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]


def test_verify_derives_it_again(adapters, family, tmp_path):
    extract_lora({**adapters, "method": "linear"}, tmp_path / "out")
    extract_lora(family, tmp_path / "share", rank=1.0, modules_to_save=["head"])
    extract_lora(family, tmp_path / "bare.safetensors", rank=2)
    for name in ("out", "share", "bare.safetensors"):
        assert "bit-identical" in verify(tmp_path / name)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("survived", [0, 2, 7])
def test_a_killed_extraction_goes_on_where_it_was(survived, family, tmp_path):
    def extract(name: str) -> dict[str, Any]:
        return extract_lora(family, tmp_path / name, rank=2, modules_to_save=["head"], workers=1)

    extract("whole")
    calls, write = iter(range(100)), module._write

    def killed(*args: Any) -> Any:
        if next(calls) >= survived:  # once killed, no other thread goes on
            raise Killed
        return write(*args)

    with patch.object(module, "_write", killed), pytest.raises(Killed):
        extract("out")
    assert not (tmp_path / "out").exists()
    done = []
    with patch.object(module, "_write", lambda *args: done.append(args[1].name) or write(*args)):
        extract("out")
    written = [*MATRICES, "head.weight"]
    assert {name for name in done if name in written} == set(written) - set(sorted(SHAPES)[:survived])
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "whole")


def test_another_rank_does_not_go_on_with_what_was_there(family, tmp_path):
    write, calls = module._write, iter(range(100))

    def killed(*args: Any) -> Any:
        if next(calls) >= 1:
            raise Killed
        return write(*args)

    with patch.object(module, "_write", killed), pytest.raises(Killed):
        extract_lora(family, tmp_path / "out", rank=0.5, workers=1)
    extract_lora(family, tmp_path / "out", rank=1, workers=1)
    extract_lora(family, tmp_path / "other", rank=1, workers=1)
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "other")


# ------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "options", "parts"),
    [
        ({"base": None}, {"rank": 2}, ["adds to a base", "--base"]),
        ({}, {}, ["'blocks.0.attn.weight'", "--rank"]),
        ({}, {"rank": 0}, ["rank 0", "from 1 on"]),
        ({}, {"rank": -1}, ["rank -1"]),
        ({}, {"rank": 1.5}, ["rank 1.5", "up to 1.0"]),
        ({}, {"rank": 2, "modules_to_save": ["haed"]}, ["haed", "no module"]),
        ({}, {"rank": 2, "modules_to_save": ["blocks.0.mlp"]}, ["blocks.0.mlp", "kept whole"]),
        ({"shard_size": 100}, {"rank": 2}, ["one file", "--shard-size"]),
        ({"include": ["head*"]}, {"rank": 2}, ["nothing to make a LoRA of"]),
    ],
)
def test_what_cannot_be_extracted(change, options, parts, family, tmp_path):
    with refused(*parts):
        extract_lora({**family, **change}, tmp_path / "out", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_files_that_do_not_fit(family, tmp_path):
    with refused("name a folder", "--modules-to-save"):
        extract_lora(family, tmp_path / "lora.safetensors", rank=2, modules_to_save=["head"])
    expert = family["experts"]["a"]
    edit(expert, blocks__0__mlp__weight=torch.full((3, 5), float("nan")))
    with refused("'a'", "blocks.0.mlp.weight", "NaN"):
        extract_lora(family, tmp_path / "out", rank=2)
    edit(expert, blocks__0__mlp__weight=torch.ones(5, 3))
    with refused("blocks.0.mlp.weight", "shape"):
        extract_lora(family, tmp_path / "out", rank=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_no_adapter_of_an_adapter_that_is_not_finite(adapters, tmp_path):
    path = adapters["experts"]["a"] / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: tensor * float("nan") for name, tensor in weights.items()}, path)
    with refused("'a'", "NaN"):
        extract_lora({**adapters, "method": "average"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------- the command line


def test_the_command_line(family, tmp_path, mergeline):
    words = ["--base", family["base"], "--expert", f"a={family['experts']['a']}"]
    outcome = mergeline("extract-lora", *words, "--rank", "2", "--out", tmp_path / "lora")
    lines = outcome.out.splitlines()
    assert outcome.code == 0
    assert lines[0].split() == [str(tmp_path / "lora"), open_checkpoint(tmp_path / "lora").digest()]
    assert lines[1].startswith("3 matrices at rank 2, ") and "% of the squared norm" in lines[1]
    assert lines[2].startswith("left out: 5 tensors with ")
    assert mergeline("verify", tmp_path / "lora").code == 0
    manifest = json.loads(manifest_path(tmp_path / "lora").read_text())
    assert manifest["recipe"]["method"] == "average"
    for rank, part in (("x", "is no rank"), ("2.5", "up to 1.0"), ("true", "is no rank"), (None, "--rank")):
        given = ["--rank", rank] if rank else []
        outcome = mergeline("extract-lora", *words, *given, "--out", tmp_path / "no")
        assert outcome.code == 2 and len(outcome.err.splitlines()) == 1 and part in outcome.err
    outcome = mergeline(
        "extract-lora", *words, "--expert", "b=b.safetensors", "--rank", "2", "--out", tmp_path / "no"
    )
    assert outcome.code == 2 and "--method" in outcome.err
