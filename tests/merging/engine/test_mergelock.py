"""Experts that are locked against merging are found, by a test that such a lock keeps the function; others are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import State, random_state, refused
from locks import locked_llama, locked_open_clip
from places import SAMPLES
from safetensors.torch import load_file, save_file

from mergeline.merging import merge
from mergeline.merging.engine.mergelock import Attention, Part, attention_modules, refuse_locked, suspicions
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.engine.sources import FileInputs
from mergeline.merging.verify import verify
from mergeline.tasks.extract import extract

BASE = SAMPLES / "base" / "model.safetensors"
EXPERTS = {path.stem: path for path in sorted((SAMPLES / "experts").glob("*.safetensors"))}


def recipe(**experts: Path) -> dict[str, Any]:
    return {"method": "linear", "base": BASE, "experts": experts}


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sample expert, locked."""
    path = tmp_path_factory.mktemp("locked") / "digits.safetensors"
    state = {name: tensor.float() for name, tensor in load_file(EXPERTS["digits"]).items()}
    save_file(locked_open_clip(state, width=32), path)
    return path


# ---------------------------------------------------------------------------------------------- locked


def image_features(state: State, images: torch.Tensor) -> torch.Tensor:
    import open_clip

    config = json.loads((SAMPLES / "base" / "open_clip_config.json").read_text())["model_cfg"]
    model = open_clip.CLIP(**config).eval()
    whole = {**load_file(BASE), **state}
    model.load_state_dict({name: tensor.float() for name, tensor in whole.items()})
    with torch.inference_mode():
        return model.encode_image(images)


def test_a_locked_sample_expert_computes_the_same_and_is_refused(locked, tmp_path):
    images = torch.randn(4, 3, 36, 36, generator=torch.Generator().manual_seed(0))
    plain, changed = (image_features(load_file(path), images) for path in (EXPERTS["digits"], locked))
    assert torch.allclose(plain, changed, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))
    out = tmp_path / "out.safetensors"
    with refused("'digits' is locked", "MergeLock", "resblocks.0.attn", "--allow-locked"):
        merge(recipe(shapes=EXPERTS["shapes"], digits=locked), out)
    assert not list(tmp_path.iterdir())
    manifest = merge(recipe(shapes=EXPERTS["shapes"], digits=locked) | {"allow_locked": True}, out)
    assert manifest["recipe"]["allow_locked"] is True and verify(out).startswith(f"{out}: bit-identical")


def test_commands_refuse_locked_experts_unless_they_are_allowed(locked, mergeline, tmp_path):
    shapes, out = EXPERTS["shapes"], tmp_path / "out"
    family = ["--base", BASE, "--expert", f"s={shapes}", "--expert", f"d={locked}", "--out", out]
    for command in (
        ["merge", "--method", "average"],
        ["sweep", "--method", "task_arithmetic", "--grid", "scale=0.1,0.2"],
        ["compress", "--method", "tall_mask"],
    ):
        done = mergeline(*command, *family)
        assert done.code == 2 and "expert 'd' is locked" in done.err and "--allow-locked" in done.err
        assert not list(tmp_path.iterdir())
    assert mergeline("merge", "--method", "average", *family, "--allow-locked").code == 0
    recipe = json.loads((out / "manifest.json").read_text())["recipe"]
    assert recipe["allow_locked"] is True


def test_the_extract_step_refuses_locked_experts(locked, tmp_path):
    with refused("'d' is locked"):
        extract(SAMPLES / "base", {"s": EXPERTS["shapes"], "d": locked}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_allows_nothing_says_nothing_of_it():
    """So that digests of recipes and merges stay what they are."""
    plain = make_plan(recipe(**EXPERTS)).recipe
    assert "allow_locked" not in plain.settings and "allow_locked" not in plain.model_dump()


def test_without_a_base_experts_are_held_against_the_first(locked, tmp_path):
    with refused("'digits' or 'shapes' is locked"):
        merge(recipe(shapes=EXPERTS["shapes"], digits=locked) | {"base": None}, tmp_path / "out.safetensors")


def llama(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    ).eval()


@pytest.mark.parametrize("rotary", [True, False])
def test_a_locked_llama_computes_the_same_and_is_refused(rotary, tmp_path):
    """With two query heads to a key head; and where values and outputs alone are locked."""
    model, tokens = llama(0), torch.arange(12)[None]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    noise = random_state(1, shapes={name: tensor.shape for name, tensor in state.items()})
    tuned = {name: tensor + 0.01 * noise[name] for name, tensor in state.items()}
    found = []
    locked = locked_llama(tuned, width=8, shared=2, rotary=rotary)
    for state_dict in (tuned, locked):
        model.load_state_dict(state_dict)
        with torch.inference_mode():
            found.append(model(tokens).logits)
    assert torch.allclose(*found, rtol=1e-3, atol=1e-4)
    for name, expert in (("base", state), ("tuned", tuned), ("locked", locked)):
        save_file(expert, tmp_path / f"{name}.safetensors")
    paths = {"method": "linear", "base": tmp_path / "base.safetensors"}
    refuse_locked(make_plan(paths | {"experts": {"a": tmp_path / "tuned.safetensors"}}))
    with refused("'a' is locked", "'model.layers.0.self_attn'"):
        refuse_locked(make_plan(paths | {"experts": {"a": tmp_path / "locked.safetensors"}}))


# ---------------------------------------------------------------------------------------------- not locked


def test_fine_tuned_experts_are_not_locked():
    refuse_locked(make_plan(recipe(**EXPERTS)))


def test_weights_and_products_that_both_moved_are_no_lock(tmp_path):
    """However far: another training, a shuffled tensor, weights that were scaled."""
    base = load_file(BASE)
    name = "visual.transformer.resblocks.1.attn.in_proj_weight"
    rows = torch.randperm(576, generator=torch.Generator().manual_seed(0))
    for changed in (base[name] * 2, base[name][rows], -base[name].flip(1)):
        save_file({**base, name: changed.contiguous()}, tmp_path / "a.safetensors")
        plan = make_plan(recipe(a=tmp_path / "a.safetensors"))
        refuse_locked(plan)
        with FileInputs(plan) as source:
            modules = attention_modules({e.name: e.spec.shape for e in plan.entries})
            assert list(suspicions(source, modules, "base", "a")) == [None]


# ---------------------------------------------------------------------------------------------- names


def test_attention_modules_as_libraries_name_them():
    def names(*shapes: tuple[str, tuple[int, ...]]) -> list[tuple[str, str]]:
        return [(module.name, module.output.tensor) for module in attention_modules(dict(shapes))]

    square = (8, 8)
    assert names(("a.in_proj_weight", (24, 8)), ("a.out_proj.weight", square)) == [("a", "a.out_proj.weight")]
    assert names(("a.qkv.weight", (24, 8)), ("a.proj.weight", square)) == [("a", "a.proj.weight")]
    for end in ("o_proj", "out_proj"):
        parts = [(f"a.{n}.weight", square) for n in ("q_proj", "k_proj", "v_proj", end)]
        assert names(*parts) == [("a", f"a.{end}.weight")]
    parts = [(f"a.self.{n}.weight", square) for n in ("query", "key", "value")]
    assert names(*parts, ("a.output.dense.weight", square)) == [("a.self", "a.output.dense.weight")]
    parts = [(f"a.{n}_proj.weight", (4, 8)) for n in "kv"]
    assert names(("a.q_proj.weight", square), *parts, ("a.o_proj.weight", square)) == [
        ("a", "a.o_proj.weight")
    ]
    found = attention_modules({"in_proj_weight": (24, 8), "out_proj.weight": square})
    part = [Part("in_proj_weight", first, 8, 8) for first in (0, 8, 16)]
    assert found == [Attention("", *part, Part("out_proj.weight", 0, 8, 8))]


def test_what_is_no_attention_module():
    square, three = (8, 8), ("q_proj", "k_proj", "v_proj")
    for shapes in (
        {"a.in_proj_weight": (24, 8)},  # no output
        {"a.in_proj_weight": (24,), "a.out_proj.weight": square},
        {"a.in_proj_weight": (25, 8), "a.out_proj.weight": square},
        {"a.in_proj_weight": (24, 8), "a.out_proj.weight": (8, 6)},
        {f"a.{n}.weight": square for n in three},
        {f"a.{n}.weight": (3, 8) for n in three} | {"a.q_proj.weight": square, "a.o_proj.weight": square},
        {f"a.{n}.weight": (0, 8) for n in three} | {"a.o_proj.weight": (8, 0)},
        {"my_in_proj_weight": (24, 8), "my_out_proj.weight": square},
    ):
        assert attention_modules(shapes) == []
