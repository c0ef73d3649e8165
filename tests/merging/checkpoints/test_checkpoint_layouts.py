"""Experts of a mixture lie packed, or each in tensors of its own: mixed families, and layouts that are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import refused
from hypothesis import given
from hypothesis import strategies as st
from model_zoo import build
from safetensors.torch import save_file

from mergeline.merging import merge
from mergeline.merging.checkpoints.checkpoint import Files, open_checkpoint
from mergeline.merging.checkpoints.layouts import one_layout
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.verify import verify

# What transformers writes with a tensor for each expert, and has packed in memory.
BOTH = [
    *("mixtral", "qwen3_moe"),
    *(
        pytest.param(model, marks=pytest.mark.slow)
        for model in ("phimoe", "qwen2_moe", "olmoe", "deepseek_v2", "deepseek_v3", "qwen3_5_moe")
    ),
]
PACKED_ALONE = ("gpt_oss", "llama4", "qwen3_vl_moe", "granitemoe", "aria")


def save(model: str, folder: Path, seed: int, packed: bool) -> Path:
    """A model of transformers with random weights."""
    torch.manual_seed(seed)
    built = build(model)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter.data, std=0.2)
    built.save_pretrained(folder, save_original_format=not packed)
    return folder


def family(model: str, folder: Path, packed: dict[str, bool]) -> dict[str, Any]:
    """A base and two experts, packed or not."""
    paths = {
        name: save(model, folder / name, seed, packed[name]) for seed, name in enumerate(("base", "a", "b"))
    }
    return {"base": paths.pop("base"), "experts": paths}


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
    )
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    with torch.no_grad():
        return model.eval()(torch.arange(2, 10)[None]).logits


def by_hand(models: dict[str, Any], scale: float = 0.5) -> torch.Tensor:
    """The logits of base + scale * the sum of task vectors, in memory."""
    states = []
    for folder in (models["base"], *models["experts"].values()):
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        states.append(loaded.state_dict())
    base, *experts = states
    merged = {
        name: tensor + scale * sum(expert[name] - tensor for expert in experts)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in base.items()
    }
    loaded.load_state_dict(merged)
    with torch.no_grad():
        return loaded.eval()(torch.arange(2, 10)[None]).logits


@pytest.mark.parametrize("model", BOTH)
@pytest.mark.parametrize("base_packed", [False, True], ids=["per-expert base", "packed base"])
def test_a_family_of_both_layouts_is_merged_in_the_bases(model, base_packed, tmp_path):
    models = family(model, tmp_path, {"base": base_packed, "a": not base_packed, "b": base_packed})
    merge({"method": "task_arithmetic", "params": {"scale": 0.5}, **models}, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").tensors.keys() == open_checkpoint(models["base"]).tensors.keys()
    assert torch.allclose(logits(tmp_path / "out"), by_hand(models), atol=1e-5)
    assert "bit-identical" in verify(tmp_path / "out")


@pytest.mark.parametrize("layout", ["packed", "per_expert"])
@pytest.mark.parametrize("model", BOTH)
def test_the_layout_that_is_asked_for_is_what_transformers_writes_so(model, layout, tmp_path):
    models = family(model, tmp_path, {"base": layout != "packed", "a": True, "b": False})
    merge(
        {"method": "task_arithmetic", "params": {"scale": 0.5}, "layout": layout, **models}, tmp_path / "out"
    )
    like = save(model, tmp_path / "like", 0, layout == "packed")
    shapes = [
        {n: t.shape for n, t in open_checkpoint(folder).tensors.items()}
        for folder in (tmp_path / "out", like)
    ]
    assert shapes[0] == shapes[1]
    assert torch.allclose(logits(tmp_path / "out"), by_hand(models), atol=1e-5)


@pytest.mark.parametrize("model", PACKED_ALONE)
def test_a_layout_that_transformers_does_not_have_is_refused(model, tmp_path):
    models = family(model, tmp_path, {"base": False, "a": False, "b": False})
    [problem] = make_plan({"method": "average", "layout": "per_expert", **models}).problems
    assert "no form with a tensor for each expert" in problem


@pytest.mark.parametrize("model", ["llava", "vit", "dinov2", "gpt_neox", "granitemoe", "aria"])
@pytest.mark.parametrize("in_memory", ["base", "a"])
def test_names_on_disk_and_in_memory_meet(model, in_memory, tmp_path):
    base, expert = (
        save(model, tmp_path / name, seed, name == in_memory) for seed, name in enumerate(("base", "a"))
    )
    recipe = {"method": "task_arithmetic", "params": {"scale": 1.0}, "base": base, "experts": {"a": expert}}
    assert any("get other names, as in 'base'" in warning for warning in make_plan(recipe).warnings)
    merge(recipe, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").tensors.keys() == open_checkpoint(base).tensors.keys()
    found, expected = (
        type(build(model)).from_pretrained(folder).state_dict() for folder in (tmp_path / "out", expert)
    )
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


QWEN = {"model_type": "qwen3_moe"}
EXPERTS, INNER, WIDTH = 3, 2, 5
PLACE = "model.layers.0.mlp.experts."


def saved(state: dict[str, torch.Tensor], path: Path) -> Path:
    save_file(state, path)
    return path


def single() -> dict[str, torch.Tensor]:
    """Experts with tensors of their own, all numbers different."""
    numbers = iter(range(10_000))
    shapes = {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}
    return {
        f"{PLACE}{expert}.{part}.weight": torch.tensor(
            [[float(next(numbers)) for _ in range(columns)] for _ in range(rows)]
        )
        for expert in range(EXPERTS)
        for part, (rows, columns) in shapes.items()
    }


def packed(outputs_first: bool) -> dict[str, torch.Tensor]:
    """The same, packed."""
    state = single()
    experts = [
        {p: state[f"{PLACE}{e}.{p}_proj.weight"] for p in ("gate", "up", "down")} for e in range(EXPERTS)
    ]
    both = torch.stack([torch.cat([own["gate"], own["up"]]) for own in experts])
    down = torch.stack([own["down"] for own in experts])
    turned = (lambda t: t) if outputs_first else (lambda t: t.transpose(1, 2).contiguous())
    return {f"{PLACE}gate_up_proj": turned(both), f"{PLACE}down_proj": turned(down)}


@given(st.data())
def test_any_stretch_of_a_converted_tensor_is_that_of_the_tensor_itself(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("stretches")
    states = {"single": single(), "outputs": packed(True), "inputs": packed(False)}
    found = {
        name: open_checkpoint(saved(state, folder / f"{name}.safetensors")) for name, state in states.items()
    }
    reference, other = data.draw(st.permutations(list(states)))[:2]
    converted = one_layout(
        {"base": found[reference], "a": found[other]}, "base", "as_base", QWEN
    ).checkpoints["a"]
    with Files() as files:
        for name, info in converted.tensors.items():
            expected = states[reference][name].flatten()
            for _ in range(3):  # forward, backward, across experts
                start = data.draw(st.integers(0, len(expected)))
                stop = data.draw(st.integers(start, len(expected)))
                assert torch.equal(info.read(files.elements, start, stop), expected[start:stop])


def test_experts_that_lack_a_matrix_are_told_by_name(tmp_path):
    state = single()
    del state[f"{PLACE}1.up_proj.weight"]
    base = saved(packed(True), tmp_path / "base.safetensors")
    lacking = saved(state, tmp_path / "a.safetensors")
    [problem] = make_plan({"method": "average", "base": base, "experts": {"a": lacking}}).problems
    assert "'a': experts cannot be packed into" in problem
    assert f"'{PLACE}1.up_proj.weight' is missing" in problem
    with refused("experts cannot be packed into", "is missing"):
        one_layout({"a": open_checkpoint(lacking)}, "a", "packed", QWEN)


def test_a_model_without_experts_cannot_be_packed(tmp_path):
    dense = saved({"model.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with refused("layout: packed: no experts of a mixture"):
        one_layout({"a": open_checkpoint(dense)}, "a", "packed", QWEN)


def test_the_plan_says_what_is_converted(tmp_path):
    base = saved(single(), tmp_path / "base.safetensors")
    expert = saved(packed(False), tmp_path / "a.safetensors")
    plan = make_plan({"method": "average", "base": base, "experts": {"a": expert}})
    assert plan.warnings == [f"'a': packed experts become {3 * EXPERTS} tensors, one a matrix, as in 'base'"]


def test_the_card_says_what_was_converted(tmp_path):
    base = saved(single(), tmp_path / "base.safetensors")
    expert = saved(packed(False), tmp_path / "a.safetensors")
    merge({"method": "average", "base": base, "experts": {"a": expert}}, tmp_path / "out")
    assert f"packed experts become {3 * EXPERTS} tensors" in (tmp_path / "out/README.md").read_text()
    assert "bit-identical" in verify(tmp_path / "out")


def test_a_thread_keeps_little_of_converted_tensors_that_it_does_not_read_to_their_ends(
    tmp_path, monkeypatch
):
    found = {
        name: open_checkpoint(saved(state, tmp_path / name))
        for name, state in (("a", packed(False)), ("b", single()))
    }
    converted = one_layout(found, "b", "as_base", QWEN).checkpoints["a"]
    monkeypatch.setattr("mergeline.merging.checkpoints.computed._MOST_KEPT", 0)
    with Files() as files:
        for name, info in converted.tensors.items():
            assert torch.equal(info.read(files.elements, 1, 3), single()[name].flatten()[1:3])
        kept = [info.kept_bytes for info in converted.tensors.values()]
        assert sum(size > 0 for size in kept) == 1
    assert not any(info.kept_bytes for info in converted.tensors.values())
