"""GGUF files are read as transformers reads them, under its names; hostile headers are refused in one line."""

from __future__ import annotations

import random
import struct
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import refused
from safetensors.torch import load_file
from small_language_model import save_model
from torch import Tensor

gguf = pytest.importorskip("gguf")

from gguf_files import write  # noqa: E402

from mergeline.merging import merge  # noqa: E402
from mergeline.merging.checkpoints.checkpoint import open_checkpoint  # noqa: E402
from mergeline.merging.checkpoints.gguf_header import header_length  # noqa: E402
from mergeline.merging.checkpoints.quantised.formats import dequantised  # noqa: E402
from mergeline.merging.engine.planning import make_plan  # noqa: E402
from mergeline.merging.engine.sources import Files  # noqa: E402
from mergeline.merging.errors import UserError  # noqa: E402
from mergeline.merging.verify import verify  # noqa: E402

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 2}
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "initializer_range": 0.2}


def model(kind: str, seed: int = 0, **config: Any) -> Any:
    """A tiny model whose norms are not all one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = AutoConfig.for_model(kind, **{**SIZES, **HEADS, "tie_word_embeddings": False, **config})
    made = AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "norm" in name or name.endswith("bias"):
                weight.copy_(torch.rand_like(weight) + 0.5)
    return made


def values(path: Path) -> dict[str, Tensor]:
    view, _ = dequantised(open_checkpoint(path))
    with Files() as files:
        return {n: t.read(files.elements, 0, prod(t.shape)).reshape(t.shape) for n, t in view.tensors.items()}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2"])
def test_tensors_have_the_names_and_the_layout_of_transformers(kind, tmp_path):
    made = model(kind, tie_word_embeddings=kind == "gemma2")
    write(tmp_path / "model.gguf", made)
    found = values(tmp_path / "model.gguf")
    expected = {n: t for n, t in made.state_dict().items() if n in found}
    assert set(made.state_dict()) - set(found) == ({"lm_head.weight"} if kind == "gemma2" else set())
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0.0, atol=1e-6)


def test_transformers_reads_the_same(tmp_path):
    from transformers import AutoModelForCausalLM

    write(tmp_path / "model.gguf", model("llama"), "Q8_0")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).state_dict()
    found = values(tmp_path / "model.gguf")
    assert found.keys() == loaded.keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in found.items())


@pytest.mark.parametrize("type", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "Q4_1", "MXFP4"])
def test_blocks_are_read_as_the_package_reads_them_in_any_stretch(type, tmp_path):
    made = model("llama")
    write(tmp_path / "model.gguf", made, type)
    view, _ = dequantised(open_checkpoint(tmp_path / "model.gguf"))
    name = "model.layers.1.self_attn.k_proj.weight"
    kind = gguf.GGMLQuantizationType[type]
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight"):
        weight = made.state_dict()[name]
        expected = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind))
        info, draw = view.tensors[name], random.Random(0)
        with Files() as files:
            for _ in range(30):
                start, stop = sorted(draw.randint(0, weight.numel()) for _ in range(2))
                found = info.read(files.elements, start, stop).float()
                assert torch.equal(found, expected.flatten()[start:stop])


def test_a_gguf_expert_merges_with_a_base_of_safetensors(tmp_path):
    base = save_model(tmp_path / "base", 0, dtype=torch.bfloat16, **WIDE)
    write(tmp_path / "a.gguf", save_model(tmp_path / "original", 1, **WIDE), "Q8_0")
    recipe = {"method": "task_arithmetic", "params": {"scale": 1.0}, "base": tmp_path / "base"}
    recipe["experts"] = {"a": tmp_path / "a.gguf"}
    plan = make_plan(recipe)
    assert plan.problems == []
    assert any("a: is a GGUF file of llama (F32, Q8_0)" in warning for warning in plan.warnings)
    merge(recipe, tmp_path / "out")
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), values(tmp_path / "a.gguf")
    assert found.keys() == expected.keys() == {n for n in base.state_dict() if n != "lm_head.weight"}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name].bfloat16(), rtol=2**-7, atol=1e-3)
    assert "bit-identical" in verify(tmp_path / "out")


def test_a_base_of_gguf_has_no_configuration_to_carry(tmp_path):
    for seed, name in enumerate(("base", "a")):
        write(tmp_path / f"{name}.gguf", model("llama", seed), "Q8_0")
    recipe = {"method": "ties", "base": tmp_path / "base.gguf", "experts": {"a": tmp_path / "a.gguf"}}
    assert make_plan(recipe).warnings[-1].endswith("a folder must be the base or the donor")
    merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16, torch.float32}  # norms are float32 in GGUF, and not quantised


def test_the_parts_of_a_split_file_are_one_checkpoint(tmp_path):
    made = model("llama")
    write(tmp_path / "whole.gguf", made)
    writer = gguf.GGUFWriter(tmp_path / "parts" / "x.gguf", "llama", split_max_tensors=8)
    (tmp_path / "parts").mkdir()
    reader = gguf.GGUFReader(tmp_path / "whole.gguf")
    for key, value in (("block_count", 2), ("attention.head_count", 4), ("attention.head_count_kv", 2)):
        writer.add_uint32(f"llama.{key}", value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, expected = values(tmp_path / "parts"), values(tmp_path / "whole.gguf")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    one = sorted((tmp_path / "parts").iterdir())[0]
    with refused(one.name, "are not the 3 parts of one GGUF file"):
        open_checkpoint(one)


MIXTURES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}  # fmt: skip


def mixture(kind: str, seed: int = 0, **config: Any) -> Any:
    return model(kind, seed, **{**MIXTURES[kind], **config})


@pytest.mark.parametrize("type", ["F32", "F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_of_mixtures_have_the_names_that_files_of_transformers_have(kind, type, tmp_path):
    made = mixture(kind)
    made.save_pretrained(tmp_path / "original")
    write(tmp_path / "model.gguf", made, type, expert_count=4, expert_used_count=2)
    found, expected = values(tmp_path / "model.gguf"), load_file(tmp_path / "original" / "model.safetensors")
    assert found.keys() == expected.keys()
    code = gguf.GGMLQuantizationType[type]
    for name, tensor in expected.items():
        if tensor.ndim > 1 and "shared_expert_gate" not in name:
            blocks = gguf.quants.quantize(tensor.float().numpy(), code)
            tensor = torch.from_numpy(gguf.quants.dequantize(blocks, code))
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=0.0, atol=1e-6)


def test_transformers_reads_the_same_of_a_mixture(tmp_path):
    from transformers import AutoModelForCausalLM

    counts = {"expert_count": 4, "expert_used_count": 2}
    made = mixture("qwen3_moe", moe_intermediate_size=768)  # which it takes to be the default's
    write(tmp_path / "model.gguf", made, "Q8_0", **counts, **{"attention.key_length": 16})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    made.load_state_dict(loaded.state_dict())
    made.save_pretrained(tmp_path / "loaded")
    found, expected = values(tmp_path / "model.gguf"), load_file(tmp_path / "loaded" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor.float(), expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("packed", [False, True], ids=["as published", "as in memory"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_in_gguf_merges_with_a_base_of_either_layout(kind, packed, tmp_path):
    base, expert = mixture(kind, 1), mixture(kind, 2)
    base.save_pretrained(tmp_path / "base", save_original_format=not packed)
    write(tmp_path / "a.gguf", expert, "Q8_0", expert_count=4, expert_used_count=2)
    recipe = {"method": "task_arithmetic", "params": {"scale": 1.0}, "base": tmp_path / "base"}
    merge({**recipe, "experts": {"a": tmp_path / "a.gguf"}}, tmp_path / "out")
    found = type(expert).from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in expert.state_dict().items():
        assert float((found[name].float() - tensor).norm() / tensor.norm()) < 0.01, name
    assert "bit-identical" in verify(tmp_path / "out")


def test_experts_that_are_not_as_many_as_the_file_says_are_refused(tmp_path):
    write(tmp_path / "a.gguf", mixture("mixtral"), expert_count=5)
    with refused("_exps.weight", "not one matrix for each of 5 experts"):
        dequantised(open_checkpoint(tmp_path / "a.gguf"))
    write(tmp_path / "b.gguf", mixture("mixtral"))
    with refused("_exps.weight", "0 experts"):
        dequantised(open_checkpoint(tmp_path / "b.gguf"))


def test_a_gguf_file_is_fetched_as_it_is(tmp_path):
    from mergeline.tasks.fetch import fetch

    write(tmp_path / "model.Q8_0.gguf", model("llama"), "Q8_0")
    fetch(str(tmp_path / "model.Q8_0.gguf"), tmp_path / "out", cache=tmp_path / "cache")
    assert (tmp_path / "out" / "model.Q8_0.gguf").read_bytes() == (tmp_path / "model.Q8_0.gguf").read_bytes()
    assert (
        open_checkpoint(tmp_path / "out").digest() == open_checkpoint(tmp_path / "model.Q8_0.gguf").digest()
    )


def test_another_architecture_is_refused(tmp_path):
    write(tmp_path / "moe.gguf", model("qwen2"), expert_count=4)
    with refused("moe.gguf", "'qwen2' with experts", "known are llama, qwen2", "original weights"):
        dequantised(open_checkpoint(tmp_path / "moe.gguf"))
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with refused("x.gguf", "'mamba'", "cannot be read"):
        dequantised(open_checkpoint(tmp_path / "x.gguf"))


def fuzzed(whole: bytes, draw: random.Random) -> bytes:
    """A file with some numbers, or bytes, of its header changed, or cut short."""
    changed = bytearray(whole)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(4, min(len(whole), 3000))
        if draw.random() < 0.5:
            numbers = (0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1, draw.randrange(2**64))
            changed[at : at + 8] = struct.pack("<Q", draw.choice(numbers))
        else:
            changed[at] = draw.randrange(256)
    return bytes(changed[: draw.randrange(len(changed))] if draw.random() < 0.2 else changed)


def check_fuzzed(tmp_path: Path, cases: int, kind: str = "llama") -> None:
    counts = {"expert_count": 4, "expert_used_count": 2} if kind in MIXTURES else {}
    made = model(kind, num_hidden_layers=1, **MIXTURES.get(kind, {}))
    write(tmp_path / "whole.gguf", made, "Q4_0", **counts)
    whole, path = (tmp_path / "whole.gguf").read_bytes(), tmp_path / "fuzzed.gguf"
    refusals = 0
    for seed in range(cases):
        path.write_bytes(fuzzed(whole, random.Random(seed)))
        try:
            values(path)
        except UserError as error:
            assert "\n" not in str(error)
            refusals += 1
    assert cases / 4 < refusals < cases


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_hostile_headers_are_refused_in_one_line(kind, tmp_path):
    check_fuzzed(tmp_path, 100, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", *MIXTURES])
def test_many_hostile_headers_are_refused_in_one_line(kind, tmp_path):
    check_fuzzed(tmp_path, 1000, kind)


def test_where_a_header_ends_is_known_once_all_of_it_is_here(tmp_path):
    write(tmp_path / "model.gguf", model("llama"))
    data = (tmp_path / "model.gguf").read_bytes()
    first = min(info.start for info in open_checkpoint(tmp_path / "model.gguf").tensors.values())
    known = [header_length(data[:here], len(data), "x") for here in range(first + 1)]
    ended = known.index(first)
    assert set(known[:ended]) == {None} and set(known[ended:]) == {first} and first - ended < 32
    with refused("x: malformed GGUF header", "it ends before it is complete"):
        header_length(data[: ended - 1], ended - 1, "x")
