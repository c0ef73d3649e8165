"""Stacks of layers: what comes from where, that transformers opens them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import file_hashes, refused
from safetensors.torch import load_file
from small_language_model import save_model
from small_vision_language import save_llava

from mergeline.merging import merge
from mergeline.merging.checkpoints.writer import CheckpointWriter
from mergeline.merging.compress import compress
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.extract_lora import extract_lora
from mergeline.merging.recipes.recipe import Recipe
from mergeline.merging.verify import verify

LAYER = "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture
def experts(tmp_path: Path) -> dict[str, Path]:
    """Models of two and of three layers."""
    save_model(tmp_path / "a", 0)
    save_model(tmp_path / "b", 1, num_hidden_layers=3)
    return {"a": tmp_path / "a", "b": tmp_path / "b"}


def recipe(experts: dict[str, Path], *ranges: tuple[str, list[int]], **more: Any) -> dict[str, Any]:
    parts = [{"expert": expert, "layers": layers} for expert, layers in ranges]
    return {"method": "passthrough", "experts": experts, "stack": parts, **more}


def test_layers_follow_one_another(experts, tmp_path):
    out = tmp_path / "out"
    merge(recipe(experts, ("b", [0, 1]), ("a", [0, -1]), ("b", [-1, -1])), out)
    found, a, b = (load_file(folder / "model.safetensors") for folder in (out, experts["a"], experts["b"]))
    sources = [(b, 0), (b, 1), (a, 0), (a, 1), (b, 2)]
    for i, (state, layer) in enumerate(sources):
        assert torch.equal(found[LAYER.format(i)], state[LAYER.format(layer)])
    assert len(found) == 5 * 9 + 2
    assert torch.equal(found["model.embed_tokens.weight"], b["model.embed_tokens.weight"])
    assert torch.equal(found["model.norm.weight"], b["model.norm.weight"])
    assert "bit-identical" in verify(out)


def test_embeddings_are_the_firsts_and_the_last_norm_is_the_lasts(experts, tmp_path):
    merge(recipe(experts, ("a", [0, 0]), ("b", [1, 2])), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    states = {name: load_file(folder / "model.safetensors") for name, folder in experts.items()}
    embedding, norm = "model.embed_tokens.weight", "model.norm.weight"
    assert torch.equal(found[embedding], states["a"][embedding])
    assert torch.equal(found[norm], states["b"][norm])


def test_transformers_opens_a_stack(experts, tmp_path):
    from transformers import AutoModelForCausalLM

    merge(recipe({"a": experts["a"]}, ("a", [0, 1]), ("a", [0, 1])), tmp_path / "out")
    stacked = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stacked.config.num_hidden_layers == 4
    single = AutoModelForCausalLM.from_pretrained(experts["a"])
    ids = torch.tensor([[1, 5, 9]])
    hidden = single.model.embed_tokens(ids)
    places = torch.arange(3)[None]
    rotary = single.model.rotary_emb(hidden, places)
    mask = torch.full((3, 3), float("-inf")).triu(1)[None, None]
    for layer in [*single.model.layers, *single.model.layers]:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    expected = single.lm_head(single.model.norm(hidden))
    assert torch.allclose(stacked(ids).logits, expected, atol=1e-5)


@pytest.mark.parametrize(("ranges", "parts"), [
    ([("c", [0, 1])], ["no expert is named 'c'"]),
    ([("a", [0, 2])], ["layers [0, 2] of 'a', which has 2"]),
    ([("a", [1, 0])], ["layers [1, 0] of 'a'"]),
    ([("b", [-4, -1])], ["layers [-4, -1] of 'b', which has 3"]),
])  # fmt: skip
def test_ranges_that_are_not_there(ranges, parts, experts):
    [problem] = make_plan(recipe(experts, *ranges)).problems
    assert all(part in problem for part in parts)


def test_a_stack_is_of_whole_models(experts):
    with refused("stack", "without", "exclude"):
        make_plan(recipe(experts, ("a", [0, 1]), exclude=["*norm*"]))


def test_models_without_layers(tmp_path):
    from checkpoints import random_state
    from safetensors.torch import save_file

    save_file(random_state(0, shapes={"weight": (3, 3)}), tmp_path / "a.safetensors")
    [problem] = make_plan(recipe({"a": tmp_path / "a.safetensors"}, ("a", [0, 0]))).problems
    assert "in one tower" in problem and "none" in problem


# --------------------------------------------------------------------------------------- parts that are merged


def parts_of(experts: dict[str, Path], *parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "method": "task_arithmetic",
        "experts": experts,
        "stack": list(parts),
        "params": {"scale": 1.0},
        **more,
    }


def test_each_part_is_merged_of_its_own_models_with_its_own_parameters(experts, tmp_path):
    save_model(tmp_path / "c", 2, num_hidden_layers=3)
    rules = [{"match": ["*mlp*"], "gradient": {"scale": [1.0, 3.0]}}]
    made = parts_of(
        {**experts, "c": tmp_path / "c"},
        {"layers": {"a": [0, 1], "b": [1, 2]}, "base": "a", "params": {"scale": 0.5}, "rules": rules},
        {
            "layers": {"c": [2, 2], "b": [0, 0], "a": [-1, -1]},
            "base": "c",
            "params": {"weights": [0.25, 2.0]},
        },
    )
    merge(made, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    a, b, c = (load_file(tmp_path / n / "model.safetensors") for n in "abc")
    attention = LAYER.replace("mlp.up", "self_attn.q")
    expected = {
        LAYER.format(0): b[LAYER.format(1)],
        LAYER.format(1): a[LAYER.format(1)] + 3 * (b[LAYER.format(2)] - a[LAYER.format(1)]),
        attention.format(1): (a[attention.format(1)] + b[attention.format(2)]) / 2,
        LAYER.format(2): c[LAYER.format(2)] * -1.25 + b[LAYER.format(0)] / 4 + 2 * a[LAYER.format(1)],
        "model.embed_tokens.weight": (a["model.embed_tokens.weight"] + b["model.embed_tokens.weight"]) / 2,
        "model.norm.weight": c["model.norm.weight"] * -1.25
        + b["model.norm.weight"] / 4
        + 2 * a["model.norm.weight"],
    }
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-6), name
    assert "bit-identical" in verify(tmp_path / "out")
    from transformers import AutoModelForCausalLM

    _, loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["mismatched_keys"]


def test_a_stack_that_was_interrupted_goes_on_where_it_was(experts, tmp_path, monkeypatch):
    made = parts_of(
        experts,
        {"layers": {"a": [0, 1], "b": [1, 2]}, "base": "a", "params": {"scale": 0.5}},
        {"layers": {"b": [0, 1], "a": [0, 1]}, "base": "b"},
    )
    merge(made, tmp_path / "whole")
    begun, interrupts = list[str](), list[str]()
    begin = CheckpointWriter.open

    def interrupted(writer: CheckpointWriter, name: str) -> Any:
        begun.append(name)
        if len(begun) == 20 and not interrupts:
            interrupts.append(name)
            raise KeyboardInterrupt
        return begin(writer, name)

    monkeypatch.setattr(CheckpointWriter, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(made, tmp_path / "out", workers=1)
    before = set(begun[:19])
    begun.clear()
    merge(made, tmp_path / "out", workers=1)
    assert len(before & set(begun)) <= 1
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "whole")


def test_a_stack_is_no_adapter_and_no_store(experts, tmp_path):
    part = {"layers": {"a": [0, 1], "base": [0, 1]}}
    made = parts_of({"a": experts["a"]}, part, base=experts["b"])
    with refused("adapter", "a stack has others"):
        extract_lora(made, tmp_path / "out", rank=2)
    with refused("leave out stack"):
        save_model(tmp_path / "c", 2)
        two = parts_of({"a": experts["a"], "c": tmp_path / "c"}, {"layers": {**part["layers"], "c": [0, 1]}})
        compress({**two, "base": experts["b"], "method": "emr", "params": {"task": 0}}, tmp_path / "out")
    card = merge(made, tmp_path / "out") and (tmp_path / "out" / "README.md").read_text()
    assert '"stack"' in card


def test_a_model_alone_is_taken_as_it_is_whatever_the_method(experts, tmp_path):
    merged = {"layers": {"a": [0, 1], "b": [0, 1]}, "base": "b"}
    made = {
        **parts_of(experts, merged, {"expert": "b", "layers": [2, 2]}),
        "method": "slerp",
        "params": {"t": 0.3},
    }
    [problem] = {problem.partition(":")[0] for problem in make_plan(made).problems}
    assert problem == "stack"  # slerp is of two experts
    made |= {"method": "task_arithmetic", "params": {"scale": 1.0}}
    merge(made, tmp_path / "out")
    found, b = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "b"))
    assert torch.equal(found[LAYER.format(2)], b[LAYER.format(2)])
    assert torch.equal(found["model.norm.weight"], b["model.norm.weight"])
    made["stack"][1]["params"] = {"scale": 0.5}
    assert make_plan(made).problems == ["stack: part 2 is 'b' as it is, and takes no params and rules"]


def test_lists_of_the_recipe_are_of_all_its_experts(experts, tmp_path):
    save_model(tmp_path / "c", 2)
    made = {"method": "linear", "params": {"weights": [1.0, 3.0, 1.0], "normalize": True}}
    made |= {"experts": {**experts, "c": tmp_path / "c"}, "stack": [{"layers": {"c": [0, 0], "b": [0, 0]}}]}
    merge(made, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")[LAYER.format(0)]
    b, c = (load_file(tmp_path / n / "model.safetensors")[LAYER.format(0)] for n in "bc")
    assert torch.allclose(found, (3 * b + c) / 4)
    assert "stack: no part takes layers of 'a'" in make_plan(made).warnings


def test_what_is_listed_by_layer_follows_the_layers(experts, tmp_path):
    kinds = {"a": ["full", "sliding"], "b": ["sliding", "full", "full"]}
    for name, listed in kinds.items():
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "layer_types": listed, "mlp_only_layers": [1]}))
    merge(recipe(experts, ("b", [1, 2]), ("a", [1, 1]), ("b", [0, 0])), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == ["full", "full", "sliding", "sliding"] and config["mlp_only_layers"] == [
        0,
        2,
    ]
    assert config["num_hidden_layers"] == 4


@pytest.mark.parametrize(("part", "words"), [
    ({"layers": {"a": [0, 1], "b": [0, 2]}, "base": "a"}, ["part 1", "2 of 'a' and 3 of 'b'"]),
    ({"layers": {"a": [0, 1], "b": [0, 1]}}, ["part 1", "measures from the base"]),
    ({"layers": {"a": [0, 1], "base": [0, 1]}}, ["part 1", "the recipe has no base"]),
    ({"layers": {"a": [0, 1], "b": [0, 1]}, "base": "a", "params": {"weights": [1.0, 2.0]}}, ["2 weights for 1"]),
    ({"layers": {"a": [0, 1], "b": [0, 1]}, "base": "a", "params": {"wieghts": [1.0]}}, ["parameter 'wieghts'"]),
])  # fmt: skip
def test_parts_that_cannot_be_merged_are_problems_of_the_plan(part, words, experts):
    problems = make_plan(parts_of(experts, part)).problems
    assert len(problems) == 1 and all(word in problems[0] for word in words)


@pytest.mark.parametrize(("part", "words"), [
    ({"layers": {"a": [0, 1]}, "expert": "a"}, ["`expert` and one pair"]),
    ({"layers": [0, 1]}, ["`expert` and one pair"]),
    ({"layers": {}}, ["name a model"]),
    ({"layers": {"a": [0, 1]}, "base": "b"}, ["base 'b' is not among"]),
    ({"layers": {"a": [0, 1], "base": [0, 1]}, "base": "a"}, ["name it as an expert, too"]),
    ({"layers": {"a": [0, 1]}, "rules": [{"expert": "b", "params": {"weights": 1}}]}, ["no expert is named 'b'"]),
])  # fmt: skip
def test_parts_that_say_nothing_or_too_much_are_refused(part, words, experts):
    with refused("stack", *words):
        make_plan(parts_of(experts, part))


def test_a_look_at_the_whole_model_needs_the_same_models_in_all_parts(experts):
    save = {"layers": {"a": [0, 1], "b": [0, 1]}, "base": "a"}
    turned = {"layers": {"a": [0, 1], "b": [0, 1]}, "base": "b"}
    assert make_plan({**parts_of(experts, save, save), "method": "ties"}).problems == []
    [problem] = make_plan({**parts_of(experts, save, turned), "method": "ties"}).problems
    assert "measures the whole model" in problem


def test_a_sweep_refuses_what_the_parts_set(experts, tmp_path):
    from mergeline.merging.sweep import grid_points

    part = {"layers": {"a": [0, 1], "b": [0, 1]}, "base": "a", "params": {"scale": 0.5}}
    with refused("'scale' is set by part 1"):
        grid_points(Recipe.of(parts_of(experts, part)), {"scale": [0.1, 0.2]})
    merge(parts_of(experts, {**part, "params": {}}), tmp_path / "out")
    assert len(grid_points(Recipe.of(parts_of(experts, {**part, "params": {}})), {"scale": [0.1, 0.2]})) == 2


# --------------------------------------------------------------------------------------- models of several towers


def names_of(folder: Path) -> set[str]:
    return set(load_file(folder / "model.safetensors"))


def test_a_tower_is_stacked_beside_one_that_is_merged(tmp_path):
    from transformers import LlavaForConditionalGeneration

    for seed, name in enumerate(("base", "a", "b")):
        save_llava(tmp_path / name, seed)
    language = next(
        n.partition("layers.")[0] for n in names_of(tmp_path / "a") if "q_proj" in n and "vision" not in n
    )
    vision = next(n.partition("encoder.")[0] for n in names_of(tmp_path / "a") if "vision" in n)
    made = {
        "method": "task_arithmetic",
        "experts": {name: tmp_path / name for name in "ab"},
        "base": tmp_path / "base",
        "params": {"scale": 0.5},
        "stack": [
            {"match": f"{vision}*", "layers": {"a": [0, -1], "b": [0, -1], "base": [0, -1]}},
            {"match": f"{language}*", "expert": "a", "layers": [0, 1]},
            {"match": f"{language}*", "expert": "b", "layers": [0, 1]},
        ],
    }
    plan = make_plan(made)
    assert not plan.problems
    assert any("are of no part" in warning and "stay the base's" in warning for warning in plan.warnings)
    merge(made, tmp_path / "out")
    assert "bit-identical" in verify(tmp_path / "out")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(model[1][key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model[0].config.text_config.num_hidden_layers == 4
    assert model[0].config.vision_config.num_hidden_layers == 2
    out, base, a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "base", "a", "b"))
    for name, value in out.items():
        if name.startswith(vision):
            expected = base[name] + 0.5 * (a[name] - base[name] + b[name] - base[name])
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
        elif name.startswith(f"{language}layers."):
            layer, rest = name.removeprefix(f"{language}layers.").split(".", 1)
            source = a if int(layer) < 2 else b
            assert torch.equal(value, source[f"{language}layers.{int(layer) % 2}.{rest}"])
        elif not name.startswith(language):
            assert torch.equal(value, base[name])


def test_tensors_of_no_part_need_a_base(experts):
    made = recipe({"a": experts["a"]}, ("a", [0, 1]))
    made["stack"][0]["match"] = ["model.layers.*"]
    [problem] = make_plan(made).problems
    assert "are of no part" in problem and "no base to take them from" in problem


def test_parts_of_a_piece_of_a_tower_cannot_make_what_is_the_bases(experts):
    made = recipe({"b": experts["b"]}, ("b", [0, 0]), ("b", [0, 0]), base=experts["a"])
    for part in made["stack"]:
        part["match"] = ["model.layers.0.*"]
    [problem] = make_plan(made).problems
    assert "parts make 'model.layers.1." in problem and "match whole towers" in problem
