"""Soft prompts are merged by position where they have one; where they have none, nearest rows are merged."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import State, refused
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergeline.merging import merge
from mergeline.merging.algebra.assignment import matched
from mergeline.merging.architecture import Role, describe
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.verify import verify

ROWS, WIDTH, LAYERS = 5, 4, 3
SEEDS = st.integers(0, 2**31)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def vpt(seed: int) -> State:
    """As MVLPT saves shallow and deep visual prompts."""
    return {
        "vpt_embeddings": random(seed, 1, ROWS, WIDTH),
        "vpt_embeddings_deep": random(seed + 1, LAYERS - 1, ROWS, WIDTH),
    }


def coop(seed: int, classes: int = 3) -> State:
    """As CoOp saves text prompts, with what belongs to its class names."""
    buffers = {
        "token_prefix": random(classes, classes, 1, WIDTH),
        "token_suffix": random(classes + 1, classes, 6, WIDTH),
    }
    return {"ctx": random(seed, ROWS, WIDTH), **buffers}


def shuffled(prompts: State, seed: int) -> State:
    """The same prompts in another order of rows, of its own in every layer."""
    generator = torch.Generator().manual_seed(seed)

    def order(layer: torch.Tensor) -> torch.Tensor:
        return layer[torch.randperm(len(layer), generator=generator)]

    return {name: torch.stack([order(layer) for layer in value]) for name, value in prompts.items()}


def recipe_of(folder: Path, states: dict[str, State], **more: Any) -> dict[str, Any]:
    for name, state in states.items():
        save_file({key: value.contiguous() for key, value in state.items()}, folder / f"{name}.safetensors")
    experts = {name: folder / f"{name}.safetensors" for name in states if name != "base"}
    base = {"base": folder / "base.safetensors"} if "base" in states else {}
    return {"method": "average", "experts": experts, **base, **more}


def merged(folder: Path, states: dict[str, State], **more: Any) -> State:
    out = folder / "out.safetensors"
    merge(recipe_of(folder, states, **more), out)
    return load_file(out)


def equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts")


def test_roles_say_which_prompts_have_an_order():
    shapes = {
        "prompt_learner.ctx": (16, 512), "cocoop_ctx": (4, 512), "prompt_embeddings": (20, 64),
        "vpt_embeddings": (1, 8, 768), "vpt_embeddings_deep": (11, 8, 768),
        "enc.transformer.prompt_embeddings": (1, 8, 768), "enc.transformer.deep_prompt_embeddings": (11, 8, 768),
    }  # fmt: skip
    found = {name: tensor.role for name, tensor in describe(shapes).tensors.items()}
    ordered = ("prompt_learner.ctx", "cocoop_ctx", "prompt_embeddings")
    assert found == {name: Role.PROMPT if name in ordered else Role.UNORDERED_PROMPT for name in shapes}


# ------------------------------------------------------------------------------------------ without order


@given(seed=SEEDS)
def test_the_order_of_rows_of_an_expert_does_not_change_the_merge(tmp_path_factory, seed):
    folder = tmp_path_factory.mktemp("prompts")
    for method in ("average", "ties"):
        base = {"base": vpt(seed)} if method == "ties" else {}
        experts = {"a": vpt(seed + 10), "b": vpt(seed + 20)}
        found = merged(folder, {**base, **experts}, method=method)
        other = merged(folder, {**base, **experts, "b": shuffled(experts["b"], seed)}, method=method)
        assert equal(found, other)


@given(seed=SEEDS)
def test_the_order_of_rows_of_the_reference_is_that_of_the_merge(tmp_path_factory, seed):
    folder, a, b = tmp_path_factory.mktemp("prompts"), vpt(seed), vpt(seed + 10)
    order = random(seed, ROWS).argsort()
    turned = {name: value[:, order] for name, value in a.items()}
    found, other = (merged(folder, {"a": first, "b": b}) for first in (a, turned))
    assert equal({name: value[:, order] for name, value in found.items()}, other)


@given(seed=SEEDS)
def test_a_prompt_and_itself_in_another_order_are_itself(tmp_path_factory, seed):
    folder, prompts = tmp_path_factory.mktemp("prompts"), vpt(seed)
    experts = {"a": prompts, "b": shuffled(prompts, seed)}
    assert equal(merged(folder, experts), prompts)
    plain = merged(folder, experts, prompt_rows="as_stored")  # scripts/avg_ckpt.py of MVLPT
    assert all(torch.equal(plain[n], (experts["a"][n] + experts["b"][n]) / 2) for n in prompts)


@given(seed=SEEDS, rows=st.integers(1, 5))
def test_matched_rows_are_as_near_as_any_order_brings_them(seed, rows):
    a, b = random(seed, rows, 3).double(), random(seed + 1, rows, 3).double()
    least = min(float((a - b[list(order)]).square().sum()) for order in permutations(range(rows)))
    assert float((a - b[matched([a], [b])]).square().sum()) == pytest.approx(least)


def test_what_a_layer_computes_is_the_same_for_any_order_and_not_for_the_plain_average(folder):
    """The premise: prompts between the class token and patches that have their positions already."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True).eval()
    class_token, patches = torch.randn(1, 1, WIDTH), torch.randn(1, 6, WIDTH)

    def seen(prompts: State) -> torch.Tensor:
        with torch.no_grad():
            return layer(torch.cat([class_token, prompts["vpt_embeddings"], patches], dim=1))[:, 0]

    prompts = vpt(1)
    other = {**prompts, "vpt_embeddings": prompts["vpt_embeddings"].flip(1)}
    assert torch.allclose(seen(prompts), seen(other), atol=1e-6)
    experts = {"a": prompts, "b": other}
    assert torch.equal(seen(merged(folder, experts)), seen(prompts))
    assert not torch.allclose(
        seen(merged(folder, experts, prompt_rows="as_stored")), seen(prompts), atol=1e-3
    )


def test_the_plan_and_the_card_say_what_was_matched_and_the_merge_is_proven(folder):
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    save_file(vpt(1), folder / "a" / "model.safetensors")
    save_file(vpt(9), folder / "b" / "model.safetensors")
    recipe = {"method": "average", "experts": {"a": folder / "a", "b": folder / "b"}}
    line = (
        "'b': rows of vpt_embeddings, vpt_embeddings_deep have no order: those nearest to the rows of 'a' take their "
        "places, layer by layer"
    )
    assert line in make_plan(recipe).warnings
    merge(recipe, folder / "out")
    assert "rows of vpt" in (folder / "out" / "README.md").read_text()
    assert "bit-identical" in verify(folder / "out")
    kept = make_plan({**recipe, "prompt_rows": "as_stored"}).warnings
    assert any("merged where they lie, as prompt_rows says" in warning for warning in kept)


def test_numbers_that_are_none_are_refused_by_the_name_of_the_prompt(folder):
    broken = vpt(2)
    broken["vpt_embeddings"][0, 1, 2] = torch.nan
    with refused("'b': tensor 'vpt_embeddings' holds NaN"):
        merged(folder, {"a": vpt(1), "b": broken})
    with refused("'a': tensor 'vpt_embeddings' holds NaN"):
        merged(folder, {"a": broken, "b": vpt(1)})
    many = {"vpt_embeddings": torch.zeros(1, 5000, 1)}
    with refused("has 5000 rows, too many to match them: set prompt_rows: as_stored"):
        merged(folder, {"a": many, "b": many})
    assert not (folder / "out.safetensors").exists()


# ------------------------------------------------------------------------------------------ by position


def test_text_prompts_are_merged_by_position_without_what_belongs_to_class_names(folder):
    experts = {"a": coop(1, classes=3), "b": coop(2, classes=7)}
    plan = make_plan(recipe_of(folder, experts))
    said = "'b': what belongs to its class names is left out: token_prefix, token_suffix"
    assert not plan.problems and said in plan.warnings
    assert equal(merged(folder, experts), {"ctx": (experts["a"]["ctx"] + experts["b"]["ctx"]) / 2})


def test_meta_nets_and_projections_are_merged_with_their_prompts(folder):
    def upt(seed: int) -> State:
        meta = {
            "meta_net.linear1.weight": random(seed, 2, 8),
            "mvlpt_proj.resblocks.0.ln_1.bias": random(seed, 4),
        }
        return {**coop(seed), **vpt(seed), **meta}

    experts = {"a": upt(1), "b": upt(2)}
    found = merged(folder, experts)
    assert found.keys() == {*vpt(1), "ctx", "meta_net.linear1.weight", "mvlpt_proj.resblocks.0.ln_1.bias"}
    plan = make_plan(recipe_of(folder, experts))
    assert any("each expert's own mvlpt_proj: name what" in warning for warning in plan.warnings)
    plan = make_plan(recipe_of(folder, {"base": upt(3), **experts}))
    assert not any("each expert's own mvlpt_proj" in warning for warning in plan.warnings)
    assert any("those nearest to the rows of 'base'" in warning for warning in plan.warnings)


def test_contexts_of_classes_are_merged_of_the_same_classes_alone(folder):
    def csc(seed: int, classes: int, names: int) -> State:
        buffers = {
            "token_suffix": random(names, classes, 6, WIDTH),
            "token_prefix": random(0, classes, 1, WIDTH),
        }
        return {"prompt_learner.ctx": random(seed, classes, ROWS, WIDTH)} | {
            f"prompt_learner.{name}": value for name, value in buffers.items()
        }

    experts = {"a": csc(1, 3, names=5), "b": csc(2, 3, names=5)}
    key = "prompt_learner.ctx"
    assert torch.equal(merged(folder, experts)[key], (experts["a"][key] + experts["b"][key]) / 2)
    line = f"'{key}' of 'b' has a context for each class, and its classes are not those of 'a'"
    for other in (csc(2, 4, names=5), csc(2, 3, names=6)):
        with refused(line):
            merge(recipe_of(folder, {**experts, "b": other}), folder / "other.safetensors")
        assert not (folder / "other.safetensors").exists()
    bare = {name: {key: state[key]} for name, state in experts.items()}
    warnings = make_plan(recipe_of(folder, bare)).warnings
    assert any("no prompt_learner.token_suffix says of which" in warning for warning in warnings)


def test_prompts_of_other_kinds_or_sizes_are_refused(folder):
    with refused("tensor 'vpt_embeddings': shape [1, 5, 3]"):
        merged(folder, {"a": vpt(1), "b": {**vpt(2), "vpt_embeddings": torch.zeros(1, ROWS, 3)}})
    with refused("lacks 1 tensor(s) that others have, first 'ctx'"):
        merged(folder, {"a": vpt(1), "b": coop(2)})


def test_a_pickle_of_prompts_is_refused_in_one_line(folder):
    torch.save({"state_dict": coop(1), "epoch": 5}, folder / "model.pth.tar-5")
    with refused("a pickle checkpoint can run code", "--allow-pickle"):
        merge({"method": "average", "experts": {"a": folder / "model.pth.tar-5"}}, folder / "out.safetensors")
