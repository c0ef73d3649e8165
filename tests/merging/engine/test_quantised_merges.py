"""A merge of quantised checkpoints is the merge of the floats that they stand for, in every verb."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import refused
from fp8_folders import FP8, WEIGHTS, configure, quantise
from safetensors.torch import load_file, save_file
from small_language_model import save_model
from torch import Tensor

from mergeline.merging import merge
from mergeline.merging.api import merge_points
from mergeline.merging.checkpoints.checkpoint import Files, open_checkpoint
from mergeline.merging.checkpoints.quantised.formats import dequantised
from mergeline.merging.compress import compress, extract_expert
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.extract_lora import extract_lora
from mergeline.merging.verify import verify

QUERY = "model.layers.0.self_attn.q_proj.weight"


def floats(folder: Path, out: Path) -> Path:
    """The same checkpoint with its weights as the float32 that they stand for."""
    view, _ = dequantised(open_checkpoint(folder))
    with Files() as files:
        state = {
            n: t.read(files.elements, 0, prod(t.shape)).reshape(t.shape) for n, t in view.tensors.items()
        }
    out.mkdir()
    save_file(state, out / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "quantization_config"})
    )
    return out


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Any]:
    """A base in bfloat16 and two experts, of which one is quantised."""
    save_model(tmp_path / "base", 0, dtype=torch.bfloat16)
    save_model(tmp_path / "a", 1, dtype=torch.bfloat16)
    save_model(tmp_path / "b", 2)
    quantise(tmp_path / "b")
    return {"base": tmp_path / "base", "experts": {"a": tmp_path / "a", "b": tmp_path / "b"}}


@pytest.mark.parametrize("method", ["average", "ties", "slerp", "cart", "dare"])
def test_a_quantised_expert_merges_as_its_floats(method, family, tmp_path):
    merge({"method": method, **family}, tmp_path / "out")
    plain = {**family, "experts": {"a": tmp_path / "a", "b": floats(tmp_path / "b", tmp_path / "floats")}}
    merge({"method": method, **plain}, tmp_path / "expected")
    found, expected = (load_file(tmp_path / name / WEIGHTS) for name in ("out", "expected"))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor, expected[name], rtol=2**-7, atol=1e-6)
    assert "bit-identical" in verify(tmp_path / "out")


def test_a_quantised_base_gives_a_merge_in_bfloat16_whose_configuration_says_so(family, tmp_path):
    quantise(tmp_path / "base")
    configure(tmp_path / "base", text_config={"quantization_config": FP8, "vocab_size": 3})
    plan = make_plan({"method": "ties", **family})
    assert plan.problems == []
    said = [
        warning
        for warning in plan.warnings
        if "tensors are quantised (14 of FP8 in blocks of 16 x 16" in warning
    ]
    assert [warning.partition(":")[0] for warning in said] == ["b", "base"]
    assert sum("its config.json has no quantization_config" in warning for warning in plan.warnings) == 1
    assert plan.bytes_read == sum(
        info.nbytes for c in plan.checkpoints.values() for info in c.stored.tensors.values()
    )
    manifest = merge({"method": "ties", **family}, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["text_config"] == {"vocab_size": 3}
    assert {t.dtype for t in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}
    assert manifest["recipe"]["base"]["digest"] == open_checkpoint(tmp_path / "base").digest()
    from transformers import AutoModelForCausalLM

    configure(tmp_path / "out", text_config=None)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_bytes_depend_on_neither_workers_nor_shards(family, tmp_path):
    one = merge({"method": "ties", **family}, tmp_path / "one", workers=1)
    two = merge({"method": "ties", "shard_size": 20_000, **family}, tmp_path / "two", workers=2)
    assert one["output"]["tensors"] == two["output"]["tensors"]


def test_a_merge_that_was_interrupted_goes_on(family, tmp_path):
    expected = merge({"method": "ties", **family}, tmp_path / "expected")

    def stop(done: int, total: int) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge({"method": "ties", **family}, tmp_path / "out", workers=1, progress=stop)
    begun: list[int] = []
    found = merge(
        {"method": "ties", **family}, tmp_path / "out", workers=1, progress=lambda done, _: begun.append(done)
    )
    assert begun[0] > 9
    assert found["output"]["digest"] == expected["output"]["digest"]
    assert found["recipe_digest"] == expected["recipe_digest"]


def test_a_scale_of_nan_is_refused_and_nothing_is_written(family, tmp_path):
    state = load_file(tmp_path / "b" / WEIGHTS)
    state[f"{QUERY}_scale_inv"][1, 1] = float("nan")
    save_file(state, tmp_path / "b" / WEIGHTS)
    with refused("'b'", f"'{QUERY}' holds NaN"):
        merge({"method": "average", **family}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_read_is_a_problem_of_the_plan(family, tmp_path):
    configure(tmp_path / "b", quantization_config={**FP8, "quant_method": "hqq"})
    [problem] = make_plan({"method": "ties", **family}).problems
    assert problem.startswith("b: ") and "is quantised (hqq in config.json), which cannot be read" in problem


def test_an_adapter_adds_to_the_floats_of_a_quantised_base(family, tmp_path):
    quantise(tmp_path / "base")
    folder = tmp_path / "lora"
    folder.mkdir()
    name = f"base_model.model.{QUERY.removesuffix('.weight')}"
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    save_file(
        {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    recipe = {"method": "task_arithmetic", "params": {"scale": 1.0}, "base": tmp_path / "base"}
    merge({**recipe, "experts": {"lora": folder}}, tmp_path / "out")
    base = load_file(floats(tmp_path / "base", tmp_path / "floats") / WEIGHTS)[QUERY]
    expected = (base.double() + up.double() @ down.double()).bfloat16()
    torch.testing.assert_close(load_file(tmp_path / "out" / WEIGHTS)[QUERY], expected, rtol=2**-7, atol=1e-6)
    assert "bit-identical" in verify(tmp_path / "out")


def test_heads_of_a_quantised_expert_lie_beside_the_merge_in_bfloat16(family, tmp_path):
    merge({"method": "average", **family, "heads": ["model.layers.1.mlp.down_proj.*"]}, tmp_path / "out")
    [head] = load_file(tmp_path / "out" / "heads" / "b.safetensors").values()
    assert head.dtype == torch.bfloat16
    assert "quantization_config" not in json.loads((tmp_path / "out" / "heads" / "b.json").read_text())
    assert "bit-identical" in verify(tmp_path / "out")


def test_stores_and_adapters_are_made_of_quantised_experts(family, tmp_path):
    compress({"method": "tall_mask", **family}, tmp_path / "store")
    extract_expert(tmp_path / "store", "b", tmp_path / "again", base=tmp_path / "base")
    assert load_file(tmp_path / "again" / WEIGHTS)[QUERY].dtype == torch.bfloat16
    extract_lora({"method": "ties", **family}, tmp_path / "lora", rank=4)
    for name in ("store", "again", "lora"):
        assert "bit-identical" in verify(tmp_path / name)


def test_a_quantised_embedding_of_another_vocabulary_is_gathered_in_float32(tmp_path):
    for seed, (name, tokens) in enumerate({"base": "ab", "a": "ba"}.items()):
        save_model(
            tmp_path / name, seed, tokens=["<pad>", "<s>", "</s>", "<unk>", *(f"w{t}" for t in tokens)]
        )
    state = load_file(tmp_path / "a" / WEIGHTS)
    embedding = state["model.embed_tokens.weight"]
    code, scale = (embedding * 100).to(torch.float8_e4m3fn), torch.full((1,), 0.01)
    new = {"model.embed_tokens.weight": code, "model.embed_tokens.weight_scale": scale}
    save_file({**state, **new}, tmp_path / "a" / WEIGHTS, {"format": "pt"})
    recipe = {"method": "passthrough", "base": tmp_path / "base", "experts": {"a": tmp_path / "a"}}
    merge(recipe, tmp_path / "out")
    found = load_file(tmp_path / "out" / WEIGHTS)["model.embed_tokens.weight"]
    assert torch.equal(found, (code.float() * scale)[[0, 1, 2, 3, 5, 4]])


def test_layers_of_quantised_experts_are_stacked(family, tmp_path):
    layers = [
        {"expert": "a", "layers": [0, 1]},
        {"expert": "b", "layers": [0, 0]},
        {"expert": "b", "layers": [0, 1]},
    ]
    merge({"method": "passthrough", "experts": family["experts"], "stack": layers}, tmp_path / "out")
    found, expert = load_file(tmp_path / "out" / WEIGHTS), values(tmp_path / "b")
    for layer, own in ((2, 0), (3, 0), (4, 1)):
        name = QUERY.replace("layers.0", f"layers.{layer}")
        assert torch.equal(found[name], expert[QUERY.replace("layers.0", f"layers.{own}")].bfloat16())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_what_is_kept_from_a_quantised_expert_is_rounded_once(family, tmp_path):
    merge({"method": "ties", **family, "keep": {QUERY: "b"}}, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / WEIGHTS)[QUERY], values(tmp_path / "b")[QUERY].bfloat16())


# --------------------------------------------------------------------------------------- written quantised again


def mxfp4_experts(tmp_path: Path) -> dict[str, Any]:
    """A base and an expert of nothing but gpt-oss's packed experts."""
    for seed, name in enumerate(("base", "a")):
        draw = torch.Generator().manual_seed(seed)
        blocks = torch.randint(0, 256, (3, 40, 4, 16), dtype=torch.uint8, generator=draw)
        scales = torch.randint(115, 125, (3, 40, 4), dtype=torch.uint8, generator=draw)
        stem = "model.layers.0.mlp.experts.gate_up_proj"
        (tmp_path / name).mkdir()
        save_file({f"{stem}_blocks": blocks, f"{stem}_scales": scales}, tmp_path / name / WEIGHTS)
        config = {"quantization_config": {"quant_method": "mxfp4"}}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return {"base": tmp_path / "base", "experts": {"a": tmp_path / "a"}}


def values(folder: Path) -> dict[str, Tensor]:
    view, _ = dequantised(open_checkpoint(folder))
    with Files() as files:
        return {n: t.read(files.elements, 0, prod(t.shape)).reshape(t.shape) for n, t in view.tensors.items()}


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("workers", [1, 2])
def test_a_merge_is_written_in_the_blocks_of_fp8_of_its_base(workers, family, tmp_path):
    quantise(tmp_path / "base")
    recipe = {"method": "ties", **family}
    merge({**recipe, "dtype": "float32"}, tmp_path / "exact")
    manifest = merge({**recipe, "requantise": True}, tmp_path / "out", workers=workers)
    stored, like = load_file(tmp_path / "out" / WEIGHTS), load_file(tmp_path / "base" / WEIGHTS)
    assert {n: (t.dtype, t.shape) for n, t in stored.items()} == {
        n: (t.dtype, t.shape) for n, t in like.items()
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == FP8
    found, exact = values(tmp_path / "out"), load_file(tmp_path / "exact" / WEIGHTS)
    errors = {n: apart(found[n], exact[n]) for n in found if f"{n}_scale_inv" in stored}
    said = manifest["requantised"]
    assert said["tensors"] == len(errors) == 14 and said["worst_tensor"] == max(
        errors, key=errors.__getitem__
    )
    assert said["worst"] == pytest.approx(max(errors.values()), rel=1e-3) and 0.01 < said["mean"] < 0.04
    assert (
        "14 tensors are rounded to the base's quantised format"
        in (tmp_path / "out" / "README.md").read_text()
    )
    assert "bit-identical" in verify(tmp_path / "out")


def test_what_is_requantised_is_what_transformers_quantises(family, tmp_path):
    from types import SimpleNamespace

    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    quantise(tmp_path / "base")
    recipe = {"method": "ties", **family, "dtype": "float32"}
    merge(recipe, tmp_path / "exact")
    merge({**recipe, "requantise": True}, tmp_path / "out")
    weight = load_file(tmp_path / "exact" / WEIGHTS)[QUERY]
    settings = SimpleNamespace(weight_block_size=[16, 16], scale_fmt="float")
    code, scale = (
        Fp8Quantize(SimpleNamespace(quantization_config=settings))._quantize_one(QUERY, weight).values()
    )
    found = load_file(tmp_path / "out" / WEIGHTS)
    torch.testing.assert_close(found[f"{QUERY}_scale_inv"], scale, rtol=1e-6, atol=0.0)
    differ = found[QUERY].float() != code.float()  # a scale that differs in its last bit moves a tie
    assert differ.float().mean() < 0.02


def test_packed_experts_are_written_as_they_were(tmp_path):
    family = mxfp4_experts(tmp_path)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    recipe = {"method": "average", **family}
    merge({**recipe, "dtype": "float32"}, tmp_path / "exact")
    manifest = merge({**recipe, "requantise": True}, tmp_path / "out")
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == load_file(tmp_path / "base" / WEIGHTS).keys()
    error = apart(values(tmp_path / "out")[name], load_file(tmp_path / "exact" / WEIGHTS)[name])
    assert manifest["requantised"]["worst"] == pytest.approx(error, rel=1e-3) and error < 0.15
    assert "bit-identical" in verify(tmp_path / "out")


def test_what_is_copied_from_the_base_keeps_its_codes(family, tmp_path):
    quantise(tmp_path / "base")
    merge({"method": "ties", **family, "requantise": True, "exclude": [QUERY]}, tmp_path / "out")
    found, base = (load_file(tmp_path / name / WEIGHTS) for name in ("out", "base"))
    for name in (QUERY, f"{QUERY}_scale_inv"):
        assert torch.equal(found[name].view(torch.uint8), base[name].view(torch.uint8))
    assert "bit-identical" in verify(tmp_path / "out")


def test_an_interrupted_merge_remembers_the_errors(family, tmp_path):
    quantise(tmp_path / "base")
    recipe = {"method": "ties", **family, "requantise": True}
    expected = merge(recipe, tmp_path / "expected", workers=1)

    def stop(done: int, total: int) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(recipe, tmp_path / "out", workers=1, progress=stop)
    found = merge(recipe, tmp_path / "out", workers=1)
    assert found["requantised"] == expected["requantised"] and found["output"] == expected["output"]


def test_requantise_is_refused_where_it_cannot_be(family, tmp_path):
    recipe = {"method": "ties", **family, "requantise": True}
    [problem] = make_plan(recipe).problems
    assert "requantise: the base is not quantised" in problem
    quantise(tmp_path / "base")
    with refused("requantise is for a merge"):
        compress({**recipe, "method": "tall_mask"}, tmp_path / "store")
    [problem] = make_plan({**recipe, "donor": "a"}).problems
    assert "requantise: config.json must be that of the base" in problem
    [problem] = make_plan({**recipe, "heads": ["*.layers.1.*"]}).problems
    assert "requantise: heads go onto merges that are not quantised" in problem
    state = load_file(tmp_path / "base" / WEIGHTS)
    scale = QUERY.removesuffix("weight") + "input_scale"
    save_file({**state, scale: torch.ones(1)}, tmp_path / "base" / WEIGHTS)
    [problem] = make_plan(recipe).problems
    assert f"scales of quantised activations ('{scale}')" in problem


def test_the_command_says_the_error(family, mergeline, tmp_path):
    quantise(tmp_path / "base")
    given = ["--method", "ties", "--base", tmp_path / "base", "--expert", tmp_path / "a"]
    done = mergeline("merge", *given, "--requantise", "--out", tmp_path / "out")
    assert done.code == 0 and "requantised 14 tensors: relative error " in done.out, done


def test_points_of_a_sweep_each_say_their_error(family, tmp_path):
    quantise(tmp_path / "base")
    recipe = {"method": "task_arithmetic", **family, "requantise": True}
    points = [({**recipe, "params": {"scale": scale}}, tmp_path / f"{scale}") for scale in (0.1, 2.0)]
    found = merge_points(points)
    alone = [merge(*point, force=True) for point in points]
    assert [made["requantised"] for made in found] == [made["requantised"] for made in alone]
    assert found[0]["requantised"] != found[1]["requantised"]
