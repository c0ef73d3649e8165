"""Stacks of layers: what comes from where, that transformers opens them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import refused
from safetensors.torch import load_file
from small_language_model import save_model

from mergeline.merging import merge
from mergeline.merging.engine.planning import make_plan
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
