"""Dense models as the experts of one mixture: transformers opens it, and it computes what its experts do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import refused
from model_zoo import build
from safetensors.torch import load_file, save_file

from mergeline.merging.make_moe import Expert, make_moe
from mergeline.merging.verify import verify

IDS = torch.randint(0, 40, (3, 8), generator=torch.Generator().manual_seed(1))


def saved(name: str, folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    build(name).save_pretrained(folder / f"{name}{seed}")
    return folder / f"{name}{seed}"


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    return [saved("llama", tmp_path_factory.mktemp("dense"), seed) for seed in range(3)]


def opened(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return opened(folder)(input_ids=IDS).logits


@pytest.mark.parametrize(
    "name, shared, kind",
    [
        ("llama", False, "Mixtral"), ("mistral", False, "Mixtral"), ("qwen3", False, "Qwen3Moe"),
        ("qwen2", True, "Qwen2Moe"), ("llama", True, "Qwen2Moe"),
    ],
)  # fmt: skip
def test_every_expert_has_the_mlps_of_its_model(name, shared, kind, tmp_path):
    a, b, c = (saved(name, tmp_path, seed) for seed in range(3))
    made = make_moe(a, {"b": b, "c": c}, tmp_path / "out", shared=a if shared else None)
    found = opened(tmp_path / "out")
    assert type(found).__name__ == f"{kind}ForCausalLM"
    base, *dense = (opened(folder) for folder in (a, b, c))
    for layer, *others in zip(found.model.layers, *(model.model.layers for model in dense)):
        for i, other in enumerate(others):
            gate_up = torch.cat([other.mlp.gate_proj.weight, other.mlp.up_proj.weight])
            assert torch.equal(layer.mlp.experts.gate_up_proj[i], gate_up)
            assert torch.equal(layer.mlp.experts.down_proj[i], other.mlp.down_proj.weight)
    alike = found.state_dict()
    assert all(torch.equal(alike[key], t) for key, t in base.state_dict().items() if ".mlp." not in key)
    assert made["moe"]["routers"] == "random"
    assert "bit-identical" in verify(tmp_path / "out")


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_a_mixture_of_copies_computes_what_the_model_does(name, tmp_path):
    model = saved(name, tmp_path, 0)
    make_moe(model, {"a": model, "b": model, "c": model}, tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model))
    verify(tmp_path / "out")


def test_a_router_that_sends_every_token_to_one_expert_computes_what_its_mlps_do(llamas, tmp_path):
    """With one expert a token, and rows that are the same but for a sign, MLPs are those of one of the two."""
    a, b, _ = llamas
    shape = (2, 16)
    save_file({f"layers.{i}": torch.zeros(shape) for i in range(2)}, tmp_path / "routers.safetensors")
    made = make_moe(
        a, {"b": b, "a": a}, tmp_path / "out", routers=tmp_path / "routers.safetensors", experts_per_token=2
    )
    assert made["moe"]["unbalanced"] == [0, 1]
    merged = opened(a)
    ours = opened(tmp_path / "out")
    for layer, one, other in zip(ours.model.layers, merged.model.layers, opened(b).model.layers):
        x = torch.randn(5, 16)
        torch.testing.assert_close(layer.mlp(x[None])[0], (one.mlp(x) + other.mlp(x)) / 2)
    assert "bit-identical" in verify(tmp_path / "out")


def test_the_condition_of_each_router_is_computed_once(llamas, tmp_path, monkeypatch):
    a, b, _ = llamas
    save_file({f"layers.{i}": torch.eye(2, 16) for i in range(2)}, tmp_path / "routers.safetensors")
    seen, cond = [], torch.linalg.cond
    monkeypatch.setattr(torch.linalg, "cond", lambda rows: seen.append(rows) or cond(rows))
    made = make_moe(a, {"b": b, "a": a}, tmp_path / "out", routers=tmp_path / "routers.safetensors")
    assert made["moe"]["unbalanced"] == [] and len(seen) == 2


def test_the_layout_of_deepseek_has_its_names(llamas, tmp_path):
    a, b, c = llamas
    make_moe(a, {"b": b, "c": c}, tmp_path / "out", kind="deepseek", shared=a, experts_per_token=1)
    found = load_file(tmp_path / "out/model.safetensors")
    dense = load_file(c / "model.safetensors")
    first = "model.layers.0.mlp."
    assert torch.equal(found[f"{first}experts.1.up_proj.weight"], dense[f"{first}up_proj.weight"])
    assert f"{first}shared_experts.down_proj.weight" in found and found[f"{first}gate.weight"].shape == (
        2,
        16,
    )
    assert f"{first}up_proj.weight" not in found


def test_scales_change_the_residual_and_noise_is_drawn_by_the_seed(llamas, tmp_path):
    a, b, c = llamas
    noisy = Expert(model=b, noise_scale=0.5, residual_scale=2.0)
    outs = {"one": 0, "again": 0, "other": 1}
    for name, seed in outs.items():
        make_moe(a, {"b": noisy, "c": c}, tmp_path / name, seed=seed, workers=1 + seed)
    one, again, other = (load_file(tmp_path / name / "model.safetensors") for name in outs)
    assert all(torch.equal(one[key], again[key]) for key in one)
    before = load_file(b / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    name = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    assert not torch.equal(one[name], other[name])
    noise = one[name] / 2 - before
    assert 0.4 < noise.std() < 0.6 and abs(noise.mean()) < 0.1
    verify(tmp_path / "one")


@pytest.mark.parametrize("routers, spread", [("random", 1.0), ("uniform_random", (1 / 16 / 3) ** 0.5)])
def test_random_routers_have_the_stated_spread(routers, spread, llamas, tmp_path):
    a, b, c = llamas
    make_moe(a, {"b": b, "c": c}, tmp_path / "out", routers=routers)
    found = load_file(tmp_path / "out/model.safetensors")
    rows = torch.cat([found[f"model.layers.{i}.block_sparse_moe.gate.weight"] for i in range(2)])
    assert rows.std() == pytest.approx(spread, rel=0.3)


@pytest.mark.parametrize(
    "names, options, parts",
    [
        (["llama", "llama"], {"kind": "mixtrl"}, ["did you mean 'mixtral'"]),
        (["llama", "llama"], {"kind": "qwen3"}, ["no mixture qwen3 is made of llama"]),
        (["llama", "llama"], {"experts_per_token": 3}, ["2 experts", "sent to 3"]),
        (["qwen2", "qwen2"], {}, ["without a shared expert"]),
        (["llama", "mistral"], {}, ["only one architecture"]),
        (["gpt2", "gpt2"], {}, ["gpt2"]),
        (["mixtral", "mixtral"], {}, ["mixtral models"]),
    ],
)
def test_what_cannot_become_experts_is_refused_before_anything_is_written(names, options, parts, tmp_path):
    a, b = (saved(name, tmp_path, seed) for seed, name in enumerate(names))
    with refused(*parts):
        make_moe(a, {"a": a, "b": b}, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_routers_of_other_shapes_are_refused(llamas, tmp_path):
    a, b, _ = llamas
    file = tmp_path / "routers.safetensors"
    for held, part in (
        ({"layers.0": torch.ones(2, 16)}, "'layers.1' is missing"),
        ({f"layers.{i}": torch.ones(3, 16) for i in range(2)}, "not [2, 16]"),
        ({f"layers.{i}": torch.full((2, 16), float("nan")) for i in range(2)}, "NaN"),
    ):
        save_file(held, file)
        with refused(part):
            make_moe(a, {"a": a, "b": b}, tmp_path / "out", routers=file)
