"""Which tensors a recipe merges, and with which parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import State, random_state, refused, same_tensors
from safetensors.torch import load_file, save_file

from mergeline.merging import merge, merge_state_dicts
from mergeline.merging.architecture import describe, layer_counts, layer_of
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.recipes.recipe import Recipe
from mergeline.merging.recipes.rules import is_merged, parameters_for

# Two towers, of three blocks and of two.
SHAPES = {f"visual.blocks.{i}.{part}": (4, 3) for i in range(3) for part in ("attn.weight", "mlp.weight")}
SHAPES |= {f"text.layers.{i}.weight": (3, 3) for i in range(2)} | {"visual.proj": (4, 3), "logit_scale": ()}


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """Task arithmetic of two experts of two towers."""
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("base", "a", "b")}
    for seed, path in enumerate(paths.values()):
        save_file(random_state(seed, shapes=SHAPES), path)
    base = paths.pop("base")
    return {"method": "task_arithmetic", "params": {"scale": 0.5}, "base": base, "experts": paths}


def rules(*rules: dict[str, Any], **recipe: Any) -> Recipe:
    return Recipe.of({"method": "m", "experts": {}, "rules": rules, **recipe})


def parameters(*given: dict[str, Any], key: str = "scale") -> dict[str, Any]:
    """What becomes of one parameter, by tensor; tensors that keep the recipe's are left out."""
    model, made = describe(SHAPES), rules(*given, params={key: "own"})
    found = {name: parameters_for(made, name, model)[key] for name in SHAPES}
    return {name: value for name, value in found.items() if value != "own"}


# --------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("visual.transformer.resblocks.11.mlp.c_fc.weight", ("visual.transformer.resblocks.", 11)),
        ("model.layers.3.experts.7.weight", ("model.layers.", 3)),  # the first number is the block
        ("0.weight", ("", 0)),
        ("visual.proj", (None, None)),
        ("conv1.weight", (None, None)),
        ("layer.10", (None, None)),  # a number that ends the name is no block
    ],
)
def test_the_block_of_a_tensor(name, block):
    assert layer_of(name) == block


def test_each_tower_has_a_depth_of_its_own():
    shapes = {**SHAPES, "one.0.weight": (2, 2)}
    assert layer_counts(shapes) == {"visual.blocks.": 3, "text.layers.": 2, "one.": 1}
    model = describe(shapes)
    assert [model.depth(n) for n in ("visual.blocks.1.attn.weight", "text.layers.1.weight")] == [0.5, 1.0]
    assert model.depth("one.0.weight") == 0.0 and model.depth("visual.proj") is None


# --------------------------------------------------------------------------------------- include, exclude


@pytest.mark.parametrize(
    ("patterns", "merged"),
    [
        ({}, True),
        ({"include": ["*.attn.*"]}, True),
        ({"include": "*.attn.*"}, True),  # one pattern need not be a list
        ({"include": ["*.mlp.*", "visual.*"]}, True),
        ({"include": ["attn"]}, False),  # the whole name must match
        ({"include": []}, False),
        ({"exclude": ["visual.*"]}, False),
        ({"include": ["visual.*"], "exclude": ["*.attn.*"]}, False),
        ({"exclude": ["VISUAL.*"]}, True),
    ],
)
def test_include_and_exclude(patterns, merged):
    assert is_merged(rules(**patterns), "visual.blocks.0.attn.weight") is merged


@pytest.mark.parametrize("excluded", ["base", "average"])
def test_excluded_tensors_become_the_bases_or_the_average(excluded, recipe, tmp_path):
    out = tmp_path / "out.safetensors"
    merge({**recipe, "exclude": "visual.*", "excluded": excluded}, out)
    base, experts = load_file(recipe["base"]), {n: load_file(p) for n, p in recipe["experts"].items()}
    merged = merge_state_dicts("task_arithmetic", experts, base, params=recipe["params"])
    others = base if excluded == "base" else merge_state_dicts("average", experts)
    expected = {n: (others if n.startswith("visual.") else merged)[n] for n in SHAPES}
    assert same_tensors(load_file(out), expected)


def test_excluded_tensors_need_a_base_or_the_average(recipe):
    without = {**recipe, "method": "average", "params": {}, "base": None, "include": ["visual.*"]}
    [problem] = make_plan(without).problems
    assert "name a base" in problem and "excluded: average" in problem
    assert make_plan({**without, "excluded": "average"}).problems == []
    assert make_plan({**without, "include": ["*"]}).problems == []


@pytest.mark.parametrize("excluded", ["base", "average"])
def test_excluded_tensors_are_not_measured(excluded, recipe, tmp_path):
    """The thresholds of ties are those of what it merges."""
    for path in recipe["experts"].values():
        state = load_file(path)
        save_file({**state, "visual.proj": 1e6 * state["visual.proj"]}, path)
    recipe |= {"method": "ties", "params": {"density": 0.3}, "exclude": ["visual.proj"], "excluded": excluded}
    merge(recipe, tmp_path / "out.safetensors")

    def without(path: Path) -> State:
        return {name: tensor for name, tensor in load_file(path).items() if name != "visual.proj"}

    experts = {name: without(path) for name, path in recipe["experts"].items()}
    expected = merge_state_dicts("ties", experts, without(recipe["base"]), params=recipe["params"])
    assert same_tensors(without(tmp_path / "out.safetensors"), expected)


# --------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("rule", "tensors"),
    [
        ({}, [*SHAPES]),
        ({"match": "*.attn.*"}, [f"visual.blocks.{i}.attn.weight" for i in range(3)]),
        ({"match": ["visual.proj", "logit_*"]}, ["visual.proj", "logit_scale"]),
        ({"match": "text.*", "layers": [0, 0]}, ["text.layers.0.weight"]),
        ({"match": "*.mlp.*", "layers": [1, 2]}, ["visual.blocks.1.mlp.weight", "visual.blocks.2.mlp.weight"]),
        ({"match": "*.mlp.*", "layers": [-2, -1]}, ["visual.blocks.1.mlp.weight", "visual.blocks.2.mlp.weight"]),
        ({"match": "*.mlp.*", "layers": [0, -2]}, ["visual.blocks.0.mlp.weight", "visual.blocks.1.mlp.weight"]),
        # The last block of each tower; tensors outside of blocks are in no layer.
        ({"match": ["*.mlp.*", "text.*", "*proj"], "layers": [-1, -1]},
         ["visual.blocks.2.mlp.weight", "text.layers.1.weight"]),
        ({"match": "*.mlp.*", "layers": [2, 1]}, []),
        ({"match": "*.mlp.*", "layers": [3, 9]}, []),
    ],
)  # fmt: skip
def test_a_rule_changes_what_it_matches(rule, tensors):
    assert parameters({**rule, "params": {"scale": 1.5}}) == dict.fromkeys(tensors, 1.5)


def test_later_rules_win():
    found = parameters(
        {"match": "visual.*", "params": {"scale": 1.0}},
        {"match": "*.attn.*", "params": {"scale": 2.0}},
        {"match": "*.attn.*", "layers": [1, 1], "gradient": {"scale": [3.0]}},
        {"match": "*.attn.*", "layers": [2, 2], "params": {"other": 0.0}},
    )
    assert found.pop("visual.proj") == 1.0
    assert [found.pop(f"visual.blocks.{i}.attn.weight") for i in range(3)] == [2.0, 3.0, 2.0]
    assert set(found.values()) == {1.0} and all(".mlp." in name for name in found)


@pytest.mark.parametrize(
    ("rule", "visual", "text"),
    [
        ({"gradient": {"scale": [0.0, 1.0]}}, [0.0, 0.5, 1.0], [0.0, 1.0]),
        ({"gradient": {"scale": [0.0, 1.0, 0.0]}}, [0.0, 1.0, 0.0], [0.0, 0.0]),
        ({"gradient": {"scale": [0.0, 3.0, 9.0, 1.0]}}, [0.0, 6.0, 1.0], [0.0, 1.0]),
        ({"gradient": {"scale": [0.7]}}, [0.7, 0.7, 0.7], [0.7, 0.7]),
        ({"gradient": {"scale": [2.0, 4.0]}, "layers": [1, 2]}, ["own", 2.0, 4.0], ["own", 2.0]),
        ({"gradient": {"scale": [2.0, 4.0]}, "layers": [-2, -1]}, ["own", 2.0, 4.0], [2.0, 4.0]),
        ({"gradient": {"scale": [2.0, 4.0]}, "layers": [1, 1]}, ["own", 2.0, "own"], ["own", 2.0]),
    ],
)
def test_a_gradient_runs_over_the_depth_of_each_tower(rule, visual, text):
    found = parameters(rule)
    for part in ("attn", "mlp"):
        assert [found.get(f"visual.blocks.{i}.{part}.weight", "own") for i in range(3)] == pytest.approx(
            visual
        )
    assert [found.get(f"text.layers.{i}.weight", "own") for i in range(2)] == pytest.approx(text)
    assert "visual.proj" not in found and "logit_scale" not in found  # they have no depth


def test_a_rule_may_set_some_parameters_and_grade_others():
    rule = {"match": "text.*", "params": {"scale": 1.0, "rank": 0.5}, "gradient": {"scale": [2.0, 4.0]}}
    made, model = rules(rule), describe(SHAPES)
    assert parameters_for(made, "text.layers.1.weight", model) == {"scale": 4.0, "rank": 0.5}
    assert parameters_for(made, "visual.proj", model) == {}


# --------------------------------------------------------------------------------------- merges


def merged_by(recipe: dict[str, Any], out: Path, **changes: Any) -> State:
    merge({**recipe, **changes}, out)
    return load_file(out)


def test_each_tensor_is_merged_with_its_own_parameters(recipe, tmp_path):
    given = [
        {"match": "visual.blocks.*", "gradient": {"scale": [0.0, 1.0]}},
        {"match": "logit_scale", "params": {"weights": [1.0, 0.0]}},
    ]
    merged = merged_by(recipe, tmp_path / "out.safetensors", rules=given)
    base, experts = load_file(recipe["base"]), {n: load_file(p) for n, p in recipe["experts"].items()}

    def alone(name: str, **params: Any) -> torch.Tensor:
        return merge_state_dicts("task_arithmetic", experts, base, params={"scale": 0.5, **params})[name]

    for i, scale in enumerate([0.0, 0.5, 1.0]):
        name = f"visual.blocks.{i}.mlp.weight"
        assert torch.equal(merged[name], alone(name, scale=scale))
    assert torch.equal(merged["visual.proj"], alone("visual.proj"))
    assert torch.equal(merged["logit_scale"], alone("logit_scale", weights=[1.0, 0.0]))


def test_rules_of_other_units_and_of_wrapped_methods(recipe, tmp_path):
    given = [{"match": "visual.*", "params": {"scope": "tensor"}}]  # the others are cut by rows
    crumbs = {"method": "breadcrumbs", "params": {"density": 0.5}, "rules": given}
    merged = merged_by(recipe, tmp_path / "crumbs.safetensors", **crumbs)
    for name, scope in (("visual.proj", "tensor"), ("text.layers.0.weight", "row")):
        params = {"density": 0.5, "scope": scope}
        alone = merged_by(recipe, tmp_path / f"{scope}.safetensors", method="breadcrumbs", params=params)
        assert torch.equal(merged[name], alone[name])

    given = [
        {"match": "visual.*", "params": {"drop_rate": 1.0}},
        {"match": "text.*", "params": {"scale": 0.0}},
    ]
    merged = merged_by(
        recipe, tmp_path / "dare.safetensors", method="dare", params={"drop_rate": 0.0}, rules=given
    )
    base = load_file(recipe["base"])
    changed = [name for name in SHAPES if not torch.equal(merged[name], base[name])]
    assert changed == ["logit_scale"]


def test_a_rule_that_changes_nothing_warns(recipe):
    given = [
        {"match": "visuals.*", "params": {"scale": 1.0}},
        {"layers": [7, 9], "params": {"scale": 1.0}},
        {"match": "logit_scale", "gradient": {"scale": [0.0, 1.0]}},  # it has no depth
        {"match": "visual.*", "params": {"scale": 1.0}},
    ]
    plan = make_plan({**recipe, "rules": given})
    assert plan.problems == [] and len(plan.warnings) == 3
    for part, warning in zip(("visuals.*", "(7, 9)", "logit_scale"), plan.warnings):
        assert "changes nothing" in warning and part in warning
    excluded = make_plan({**recipe, "rules": given[3:], "exclude": "visual.*"})
    assert len(excluded.warnings) == 1


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"scael": 1.0}, ["unknown parameter 'scael'", "did you mean 'scale'?"]),
        ({"scale": "much"}, ["scale = 'much'"]),
        ({"weights": [1.0]}, ["1 weights for 2 experts"]),
        ({"weights": [1.0, -1.0], "normalize": True}, ["sum to 0"]),
    ],
)
def test_what_is_wrong_in_a_rule_names_the_tensor(change, parts, recipe, tmp_path):
    given = {**recipe, "rules": [{"match": "text.*", "params": change}]}
    with refused("tensor 'text.layers.", *parts):
        merge(given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_rule_that_makes_a_base_necessary_is_refused(recipe):
    given = [{"match": "text.*", "params": {"origin": "task_arithmetic"}}]
    plan = make_plan({**recipe, "method": "cart", "params": {}, "base": None, "rules": given})
    assert any("tensor 'text.layers." in p and "name it" in p for p in plan.problems)


@pytest.mark.parametrize(
    ("method", "params", "rule", "name"),
    [
        ("ties", {}, {"density": 0.5}, "density"),
        ("ties", {}, {"scope": "tensor"}, "scope"),
        ("ties", {"scope": "tensor"}, {"scope": "global"}, "scope"),
        ("ties", {}, {"variant": "mergekit"}, "variant"),
        ("dare", {"inner": "ties"}, {"density": 0.5}, "density"),
        ("dare", {"inner": "ties"}, {"drop_rate": 0.5}, "drop_rate"),
        ("lines", {}, {"alpha": 0.5}, "alpha"),
        ("lines", {"inner": "ties", "alpha": 1.0}, {"density": 0.5}, "density"),
    ],
)
def test_what_is_measured_in_the_whole_model_is_not_for_rules(method, params, rule, name, recipe):
    given = [{"match": "text.*", "params": rule}]
    problems = make_plan({**recipe, "method": method, "params": params, "rules": given}).problems
    assert problems and all(f"'{name}'" in p and "whole model" in p for p in problems)


@pytest.mark.parametrize(
    ("method", "params", "rule"),
    [
        ("ties", {}, {"scale": 0.5, "reduce": "sum"}),
        ("ties", {"scope": "tensor"}, {"density": 0.5}),
        ("dare", {"inner": "ties"}, {"scale": 0.5}),
        ("dare", {}, {"drop_rate": 0.5}),
        ("lines", {}, {"beta": 0.7}),
        ("lines", {"alpha": 0.5}, {"scale": 0.7}),
    ],
)
def test_everything_else_is(method, params, rule, recipe, tmp_path):
    given = [{"match": "text.*", "params": rule}]
    changes = {"method": method, "params": params}
    own = merged_by(recipe, tmp_path / "own.safetensors", **changes)
    merged = merged_by(recipe, tmp_path / "merged.safetensors", **changes, rules=given)
    whole = merged_by(recipe, tmp_path / "whole.safetensors", method=method, params={**params, **rule})
    for name in SHAPES:
        assert torch.equal(merged[name], (whole if name.startswith("text.") else own)[name])
    assert not same_tensors(own, merged) and not same_tensors(whole, merged)


# --------------------------------------------------------------------------------------- what is printed


def test_the_table_says_what_becomes_of_every_tensor(recipe):
    given = [{"match": "*.attn.*", "gradient": {"scale": [0.0, 1.0]}}]
    plan = make_plan({**recipe, "rules": given, "exclude": "text.*"})
    table = {row["tensor"]: row for row in plan.table()}
    assert list(table) == sorted(SHAPES)
    assert table["text.layers.0.weight"] == {
        "tensor": "text.layers.0.weight",
        "shape": [3, 3],
        "action": "copy",
        "treatment": "base",
    }
    assert table["visual.blocks.1.attn.weight"]["action"] == "merge"
    assert table["visual.blocks.1.attn.weight"]["params"]["scale"] == 0.5
    assert table["visual.blocks.2.attn.weight"]["params"] == {
        "scale": 1.0,
        "weights": None,
        "normalize": False,
    }
    averaged = make_plan({**recipe, "exclude": "text.*", "excluded": "average"})
    rows = {row["tensor"]: row for row in averaged.table()}
    assert (rows["text.layers.0.weight"]["method"], rows["visual.proj"]["method"]) == (
        "average",
        "task_arithmetic",
    )
    wrapped = make_plan(
        {**recipe, "method": "lines", "rules": [{"match": "text.*", "params": {"beta": 0.1}}]}
    )
    rows = {row["tensor"]: row["params"] for row in wrapped.table()}
    assert rows["text.layers.0.weight"]["beta"] == 0.1 and rows["visual.proj"]["beta"] == 0.5
    assert rows["visual.proj"]["scale"] == 0.5 and rows["visual.proj"]["inner"] == "task_arithmetic"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"rules": [{"matches": "*"}]}, "rules.0.matches"),
        ({"rules": [{"layers": [1]}]}, "rules.0.layers"),
        ({"rules": [{"gradient": {"scale": []}}]}, "rules.0.gradient.scale"),
        ({"rules": [{"gradient": {"scale": ["x"]}}]}, "rules.0.gradient.scale"),
        ({"excluded": "zero"}, "excluded"),
    ],
)
def test_malformed_rules_are_refused(change, part, recipe):
    with refused("recipe", part):
        make_plan({**recipe, **change})


def test_rules_are_part_of_the_recipes_digest(recipe, tmp_path):
    given = [{"match": "text.*", "params": {"scale": 0.1}}]
    digests = {
        merge({**recipe, **change}, tmp_path / "out.safetensors")["recipe_digest"]
        for change in (
            {},
            {"rules": given},
            {"exclude": "text.*"},
            {"exclude": "text.*", "excluded": "average"},
        )
    }
    assert len(digests) == 4
