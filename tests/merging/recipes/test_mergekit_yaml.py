"""Configurations of mergekit's: what they become, and that it is what mergekit made of them.

tests/goldens/mergekit holds configurations and mergekit's own outputs (benchmarks/make_mergekit_outputs.py).
"""

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import State, random_state, refused, same_tensors
from places import GOLDENS
from safetensors.torch import load_file, save_file

from mergeline.flows.cli import main
from mergeline.merging import merge, merge_state_dicts
from mergeline.merging.architecture import describe
from mergeline.merging.checkpoints.chat_templates import NAMED
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.methods import catalogue
from mergeline.merging.recipes.loading import load_recipe
from mergeline.merging.recipes.mergekit_yaml import METHODS, translated
from mergeline.merging.recipes.recipe import Recipe
from mergeline.merging.recipes.rules import parameters_for
from mergeline.merging.strict_yaml import YamlFile

STORED = GOLDENS / "mergekit"
NAMES = sorted(path.stem for path in STORED.glob("*.yml") if path.stem != "multi")
# Wider than float32's rounding: mergekit computes these in float32, where norms and angles are not exact.
LOOSE = {"karcher-with-base": 2e-6, "slerp": 2e-7, "slerp-filters": 2e-7, "slerp-slices": 2e-7}


def is_known(name: str) -> bool:
    method = yaml.safe_load((STORED / f"{name}.yml").read_text())["merge_method"]
    return METHODS[method].id in catalogue()


@pytest.fixture
def family(tmp_path) -> Path:
    """A folder where the models of the configurations lie."""
    for path in STORED.glob("*.safetensors"):
        if path.stem == "base" or path.stem.startswith("expert"):
            (tmp_path / path.stem).mkdir()
            shutil.copyfile(path, tmp_path / path.stem / "model.safetensors")
            (tmp_path / path.stem / "config.json").write_text('{"num_hidden_layers": 4}')
    return tmp_path


def rounded(folder: Path) -> State:
    """Round the models of a family to bfloat16; the largest magnitudes among them."""
    states = []
    for path in folder.glob("*/model.safetensors"):
        states.append({name: value.bfloat16() for name, value in load_file(path).items()})
        save_file(states[-1], path)
    return {name: torch.stack([state[name].double().abs() for state in states]).amax(0) for name in states[0]}


def written(folder: Path, text: str, name: str = "mergekit.yml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def loaded(folder: Path, text: str) -> Recipe:
    return load_recipe(written(folder, text), Path)


# --------------------------------------------------------------------------------------- mergekit's own outputs


@pytest.mark.parametrize("name", [name for name in NAMES if is_known(name)])
def test_the_merge_is_what_mergekit_makes_of_it(name, family):
    # mergekit rounds inputs, and every step, to bfloat16 if that is `dtype`; only the result if it is `out_dtype`.
    largest = rounded(family) if name in ("task_arithmetic-bf16", "ties-bf16") else {}
    recipe = loaded(family, (STORED / f"{name}.yml").read_text())
    plan = make_plan(recipe)
    assert plan.problems == []
    merge(recipe, family / "out.safetensors")
    found, expected = load_file(family / "out.safetensors"), load_file(STORED / f"{name}.safetensors")
    assert found.keys() == expected.keys()
    beyond = 0
    for key, theirs in expected.items():
        ours = found[key]
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        apart = (ours.double() - theirs.double()).abs()
        if theirs.dtype == torch.bfloat16:
            size = torch.maximum(theirs.double().abs(), largest.get(key, torch.zeros(())))
            assert bool((apart <= 2**-7 * size).all()), key  # one unit in the last place
        else:
            beyond += int((apart > LOOSE.get(name, 1.3e-7)).sum())
    # Divergences of rows that hardly differ are noise in mergekit's float32: 71 of 3,336 entries end on the other side
    # of the threshold than in float64, as the same formula shows in both.
    assert beyond <= (71 if name == "arcee_fusion" else 0)


@pytest.mark.parametrize("name", [name for name in NAMES if not is_known(name)])
def test_a_method_that_is_not_in_the_catalogue_is_named(name, family):
    with refused("mergekit.yml:", f"unknown method '{name.partition('-')[0].replace('plus_tl', '')}'"):
        loaded(family, (STORED / f"{name}.yml").read_text())


# --------------------------------------------------------------------------------------- what parameters become

MODELS = """models:
- {model: expert0, parameters: {weight: 0.3, density: 0.25}}
- {model: expert1, parameters: {weight: 0.5}}
"""


def arithmetic(method: str, more: str = "") -> str:
    return f"merge_method: {method}\nbase_model: base\n{MODELS}{more}"


@pytest.mark.parametrize(
    ("method", "id", "params"),
    [
        ("dare_linear", "dare", {"variant": "mergekit", "drop_rate": [0.75, 0.0], "weights": [0.3, 0.5], "scale": 1.0,
                                 "normalize": False, "rescale": True}),
        ("dare_ties", "dare", {"variant": "mergekit", "inner": "ties", "inner_variant": "mergekit", "density": 1.0,
                               "drop_rate": [0.75, 0.0], "weights": [0.3, 0.5], "scale": 1.0, "normalize": False,
                               "rescale": True}),
        ("breadcrumbs_ties", "breadcrumbs", {"variant": "mergekit", "scope": "tensor", "elect": True, "scale": 1.0,
                                             "density": [0.25, 1.0], "outlier_rate": [0.01, 0.01],
                                             "weights": [0.3, 0.5], "normalize": False,
                                             "rescale": False}),
        ("ties", "ties", {"variant": "mergekit", "density": [0.25, 1.0], "weights": [0.3, 0.5], "normalize": True,
                          "rescale": False, "scale": 1.0}),
    ],
)  # fmt: skip
def test_defaults_are_mergekits(method, id, params, family):
    recipe = loaded(family, arithmetic(method))
    assert (recipe.method, recipe.params, recipe.rules) == (id, params, [])
    assert list(recipe.experts) == ["expert0", "expert1"] and recipe.base == family / "base"


@pytest.mark.parametrize(("method", "normalize"), [("della", True), ("della_linear", False)])
def test_della_of_mergekit(method, normalize, family):
    text = arithmetic(method, "parameters: {density: 0.5, rescale: false, lambda: 1.5}\n")
    recipe = loaded(family, text)
    expected = {"variant": "mergekit", "density": [0.25, 0.5], "epsilon": [0.15, 0.15], "weights": [0.3, 0.5],
                "normalize": normalize, "rescale": False, "scale": 1.5}  # fmt: skip
    assert recipe.method == "della" and recipe.params == (
        expected if normalize else {**expected, "elect": False}
    )


def test_random_methods_keep_as_many_as_mergekit_would(family):
    text = arithmetic("dare_linear", "parameters: {rescale: false, lambda: 2.0}\ndtype: float32\n")
    merge(loaded(family, text), family / "out.safetensors")
    found, base, first, second = (
        load_file(p) for p in (family / "out.safetensors", *(family / n / "model.safetensors" for n in
                                                             ("base", "expert0", "expert1")))
    )  # fmt: skip
    kept, count = 0.0, 0
    for key, start in base.items():
        one, two = 0.6 * (first[key] - start).double(), 1.0 * (second[key] - start).double()
        without, whole = (start.double() + two), (start.double() + one + two)
        near = (found[key].double() - whole).abs() < (found[key].double() - without).abs()
        kept, count = kept + near.sum().item(), count + near.numel()
    assert abs(kept / count - 0.25) < 5 * (0.25 * 0.75 / count) ** 0.5


@pytest.mark.parametrize(
    ("method", "id", "own", "params"),
    [
        ("nuslerp", "nuslerp", "weight: 0.5", {"weights": [0.5, 0.5], "scope": "tensor"}),
        ("multislerp", "multislerp", "weight: 0.5", {"weights": [0.5, 0.5], "normalize": True, "epsilon": 1e-8}),
        ("ram", "ram", "epsilon: 1e-3", {"variant": "ram", "threshold": 1e-3}),
        ("ramplus_tl", "ram", "r: 0.2",
         {"variant": "ram_plus", "threshold": 1e-5, "rescale_factor": 0.2, "rescale_cap": 0.2}),
        ("model_stock", "model_stock", "filter_wise: true", {"scope": "row"}),
        ("sce", "sce", "select_topk: 0.2", {"density": 0.2}),
    ],
)  # fmt: skip
def test_ids_and_names_are_ours(method, id, own, params, family):
    text = f"merge_method: {method}\nbase_model: base\nmodels: [{{model: expert0}}, {{model: expert1}}]\n"
    written_recipe, _, _ = translated(YamlFile(written(family, f"{text}parameters: {{{own}}}\n")), Path)
    assert (written_recipe["method"], written_recipe["params"]) == (id, params)


def test_filters_and_lists_become_rules_of_one_expert(family):
    text = """
        merge_method: task_arithmetic
        base_model: base
        models:
        - model: expert0
          parameters: {weight: [{filter: q_proj, value: [0.1, 0.7]}, {filter: self_attn, value: 0.6}, {value: 0.3}]}
        - model: expert1
          parameters: {weight: [0.0, 1.0]}
        """
    recipe = loaded(family, textwrap.dedent(text))
    assert recipe.params == {"weights": [0.3, 0.0], "scale": 1.0, "normalize": False}
    found = [rule.model_dump(exclude_defaults=True) for rule in recipe.rules]
    assert found == [
        {"match": ["*self_attn*"], "params": {"weights": 0.6}, "expert": "expert0"},
        {
            "match": ["*q_proj*"],
            "params": {"weights": 0.1},
            "gradient": {"weights": [0.1, 0.7]},
            "expert": "expert0",
        },
        {"params": {"weights": 0.0}, "gradient": {"weights": [0.0, 1.0]}, "expert": "expert1"},
    ]
    names = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight",
             "model.layers.3.self_attn.k_proj.weight", "model.layers.3.self_attn.q_proj.weight")  # fmt: skip
    model = describe(dict.fromkeys(names, (4, 4)))
    weights = [parameters_for(recipe, name, model)["weights"] for name in names]
    assert weights == [[0.3, 0.0], [0.1, 0.0], [0.6, 1.0], [pytest.approx(0.7), 1.0]]


@pytest.mark.parametrize(
    ("rule", "parts"),
    [
        ({"expert": "expert7", "params": {"weights": 1.0}}, ["no expert is named 'expert7'", "'expert"]),
        ({"expert": "a", "params": {"density": 0.5}}, ["list 'density' of every expert"]),
        ({"expert": "a", "gradient": {"scale": [0.5]}}, ["list 'scale' of every expert"]),
    ],
)
def test_a_rule_of_one_expert_needs_a_list_that_it_changes(rule, parts):
    given = {
        "method": "ties",
        "experts": {"a": "a", "expert1": "b"},
        "params": {"weights": [1.0, 2.0], "scale": 1.0},
    }
    with refused(*parts):
        Recipe.of({**given, "rules": [rule]})
    plain = Recipe.of({**given, "rules": [{"params": {"scale": 0.5}}]})
    assert "expert" not in plain.settings["rules"][0]  # the digests of recipes without such rules stay


# --------------------------------------------------------------------------------------- models, tokenizers


def test_where_models_lie(family, monkeypatch):
    monkeypatch.chdir(family / "expert0")
    (family / "expert0" / "near").mkdir()
    text = "merge_method: linear\nparameters: {weight: 1.0}\nmodels: [{model: expert1}, {model: near},"
    text += " {model: org/name@v1}, {model: {model: {path: org/other, revision: v2}}},"
    text += " {model: elsewhere/expert1/}]\n"
    brought: list[str] = []

    def bring(where: str) -> Path:
        if "://" not in where:
            return Path(where)
        brought.append(where)
        return Path("fetched")

    recipe = load_recipe(written(family, text), bring)
    assert brought == ["hf://org/name@v1", "hf://org/other@v2"]
    assert list(recipe.experts) == ["expert1", "near", "name", "other", "expert1_2"]
    assert (
        recipe.experts["expert1"] == family / "expert1"
        and recipe.experts["near"] == family / "expert0" / "near"
    )


def test_an_adapter_says_what_it_adds_to_where_that_is_not_the_base(family):
    (family / "lora").mkdir()
    text = "merge_method: task_arithmetic\nbase_model: base\nparameters: {weight: 1.0}\nmodels: [{model: base+lora}]\n"
    recipe = loaded(family, text)
    assert list(recipe.experts.values()) == [family / "lora"] and recipe.base == family / "base"
    assert recipe.onto == {}
    other = loaded(family, text.replace("base+lora", "expert0+lora"))
    assert list(other.experts) == list(other.onto) and list(other.onto.values()) == [family / "expert0"]
    both = loaded(family, text.replace("base_model: base", "base_model: expert0+lora"))
    assert both.base == family / "lora" and both.onto["base"] == family / "expert0"


@pytest.mark.parametrize(
    ("text", "donor", "vocabulary"),
    [
        ("", "base_model", "donor"),
        ("tokenizer_source: base", "base_model", "donor"),
        ("tokenizer_source: union", "base_model", "union"),
        ("tokenizer_source: expert0", "expert0", "donor"),
        ("tokenizer: {source: expert0}", "expert0", "donor"),
        ("tokenizer: {}", "base_model", "union"),
    ],
)
def test_whose_tokenizer_the_merge_has(text, donor, vocabulary, family):
    slerp = "merge_method: slerp\nbase_model: base\nmodels: [{model: base}, {model: expert0}]\nparameters: {t: 0.5}\n"
    recipe = loaded(family, slerp + text)
    assert (recipe.donor, recipe.vocabulary) == (donor, vocabulary)
    assert list(recipe.experts) == ["base_model", "expert0"] and recipe.base is None


# --------------------------------------------------------------------------------------- slices


def slices(*ranges: tuple[int, int], method: str = "linear", more: str = "") -> str:
    listed = "".join(
        f"- sources: [{{model: expert0, layer_range: [{a}, {b}]}}, {{model: expert1, layer_range: [{a}, {b}]}}]\n"
        for a, b in ranges
    )
    return f"merge_method: {method}\nparameters: {{weight: 1.0}}\nslices:\n{listed}{more}"


def test_slices_of_all_layers_in_order_are_the_models(family):
    whole = loaded(family, slices((0, 4)))
    assert [part.params for part in whole.stack] == [{"weights": [1.0, 1.0], "normalize": True}]
    merge(whole, family / "whole.safetensors")
    merge(loaded(family, slices((0, 1), (1, 4))), family / "parts.safetensors")
    assert same_tensors(load_file(family / "whole.safetensors"), load_file(family / "parts.safetensors"))


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    [
        (slices((2, 2)), 4, ["[FIRST, END]"]),
        (slices((0, 4)).replace("expert1, layer_range: [0, 4]", "expert1, layer_range: [0, 3]"), 4, ["equally many"]),
        (slices((0, 4)).replace("model: expert1", "model: expert0"), 4, ["expert0 is there twice"]),
        (slices((0, 4), method="ties"), 4, ["ties needs a base_model"]),
        (slices((0, 4), method="ties", more="  base_model: base\n"), 4, ["base, is not among the sources"]),
        (slices((0, 4), more="- {sources: []}\n"), 5, ["needs sources"]),
        (slices((1, 4)).replace("weight: 1.0", "weight: [{filter: .2.mlp, value: 2}, {value: 1}]"), 2,
         ["'.2.mlp' has a number", "write which layer it means"]),
    ],
)  # fmt: skip
def test_slices_that_make_no_model_are_refused(text, line, parts, family):
    with refused(f"mergekit.yml:{line}:", *parts):
        loaded(family, text)


def test_what_mergekit_ignores_is_accepted_and_said(family):
    text = """
        merge_method: slerp
        base_model: base
        parameters: {t: 0.5, density: 0.3, int8_mask: true}
        models: [{model: base, parameters: {weight: 1}}, {model: expert0, parameters: {weight: 0.5, t: 0.1}}]
        """
    notes = make_plan(loaded(family, textwrap.dedent(text))).warnings
    assert "mergekit's slerp does not use 'weight': it is ignored" in notes
    assert "mergekit's slerp does not use 'density': it is ignored" in notes
    assert "'t' is one for the whole merge: mergekit ignores that of expert0" in notes
    assert not any("int8_mask" in note for note in notes)
    ties = arithmetic("ties").replace("models:", "models:\n- {model: base, parameters: {weight: 0.1}}")
    assert "'weight' of the base model base is ignored, as by mergekit" in loaded(family, ties).notes


def test_the_command_line_says_what_is_ignored_and_refuses_what_slices_set(family, capsys):
    path = written(family, (STORED / "slices-with-bases.yml").read_text())
    assert main(["merge", "--recipe", str(path), "--out", str(family / "out")]) == 0
    config = json.loads((family / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 5
    assert main(["plan", "--recipe", str(path), "--set", "scale=2"]) == 2
    assert "'scale' is set by part 1 of the stack" in capsys.readouterr().err
    path = written(family, (STORED / "ram-with-weights.yml").read_text())
    assert main(["plan", "--recipe", str(path)]) == 0
    assert "does not use 'weight'" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ties", "slices-with-bases"])
def test_the_one_module_is_the_whole_model(name, family):
    config = yaml.safe_load((STORED / f"{name}.yml").read_text())
    plain = loaded(family, yaml.safe_dump(config))
    key = "slices" if "slices" in config else "models"
    config["modules"] = {"default": {key: config.pop(key), "parameters": config.pop("parameters")}}
    assert loaded(family, yaml.safe_dump(config)) == plain


def test_modules_that_are_all_alike_are_what_mergekit_makes_of_models(family):
    config = yaml.safe_load((STORED / "ties.yml").read_text())
    plain = loaded(family, yaml.safe_dump(config))
    module = {"models": config.pop("models"), "parameters": config.pop("parameters", None)}
    several = loaded(
        family, yaml.safe_dump({**config, "modules": {"text_decoder": module, "vision_tower": module}})
    )
    assert several.notes[-1].startswith("modules are all alike")
    assert several.model_copy(update={"notes": plain.notes}) == plain
    other = {**module, "parameters": {"density": 0.5}}
    text = yaml.safe_dump({**config, "modules": {"text_decoder": module, "vision_tower": other}})
    with refused("no tensor of base is of a module 'vision_tower'"):
        loaded(family, text)


def test_files_of_tensors_are_models_as_of_mergekit_pytorch(family, mergeline):
    state = load_file(STORED / "expert1.safetensors")
    torch.save(state, family / "raw.pth")
    text = "merge_method: linear\nparameters: {weight: 1.0}\n"
    text += "models: [{model: raw.pth}, {model: expert0/model.safetensors}]\n"
    path = written(family, text)
    outcome = mergeline("merge", "--recipe", str(path), "--out", str(family / "out"))
    assert outcome.code == 2 and "raw.pth" in outcome.err
    outcome = mergeline("merge", "--allow-pickle", "--recipe", str(path), "--out", str(family / "out"))
    assert outcome.code == 0, outcome.err
    found, other = load_file(family / "out" / "model.safetensors"), load_file(STORED / "expert0.safetensors")
    assert all(
        torch.allclose(found[name], (value + other[name]) / 2, atol=1e-6) for name, value in state.items()
    )


def test_tokens_and_templates_of_mergekits_are_the_recipes(family):
    text = """
        merge_method: task_arithmetic
        base_model: base
        parameters: {weight: 1.0}
        models: [{model: expert0}, {model: expert1}]
        chat_template: chatml
        tokenizer:
          source: union
          pad_to_multiple_of: 16
          tokens:
            a: {source: expert0}
            b: {source: {kind: zero}, force: true}
            c: {source: {kind: model_token, model: base, token_id: 3}}
        """
    recipe = loaded(family, textwrap.dedent(text))
    found = {token: row.model_dump(exclude_defaults=True) for token, row in recipe.tokens.items()}
    assert found == {
        "a": {"expert": "expert0"},
        "b": {"zero": True, "force": True},
        "c": {"expert": "base", "id": 3},
    }
    assert (recipe.vocabulary, recipe.pad_to_multiple_of, recipe.missing_tokens) == ("union", 16, "base")
    assert recipe.chat_template == NAMED["chatml"]


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    [
        (arithmetic("tise"), 1, ["unknown merge_method 'tise'", "did you mean 'ties'?"]),
        (arithmetic("ties", "dtpye: float32\n"), 6, ["dtpye", "did you mean 'dtype'?"]),
        (arithmetic("ties", "dtype: int8\n"), 6, ["dtype", "float32"]),
        (arithmetic("ties", "parameters:\n  lambad: 1.0\n"), 7, ["no parameter 'lambad'", "did you mean 'lambda'?"]),
        (arithmetic("ties").replace("density: 0.25", "denstiy: 0.25"), 4, ["'denstiy'", "did you mean 'density'?"]),
        (arithmetic("ties").replace("density: 0.25", "density: 2.5"), 4, ["density", "must be 1.0 or less"]),
        (arithmetic("ties").replace("density: 0.25", "density: much"), 4, ["'much'", "no number"]),
        (arithmetic("ties").replace("weight: 0.5", "density: 0.5"), 4, ["needs 'weight' of expert1"]),
        (arithmetic("ties").replace("weight: 0.5", "weight: [{filter: mlp, value: 1.0}]"), 5,
         ["needs 'weight' of expert1", "without a filter"]),
        (arithmetic("ties").replace("weight: 0.5", "weight: {fliter: mlp, value: 1.0}"), 5, ["write {value"]),
        (arithmetic("della").replace("density: 0.25", "density: 0.05"), 0, []),
        (arithmetic("della").replace("density: 0.25", "epsilon: 2"), 4, ["epsilon", "less than 1"]),
        (arithmetic("ties", "chat_template: chatlm\n"), 6, ["no template", "did you mean 'chatml'?"]),
        (arithmetic("ties", "tokenizer: {source: base, tokens: {a: {force: true}}}\n"), 6, ["'a' needs a source"]),
        (arithmetic("ties", "tokenizer: {tokens: {a: {source: other}}}\n"), 6, ["other is none of the models"]),
        (arithmetic("ties", "tokenizer: {tokens: {a: {source: {kind: model_token, model: base}}}}\n"), 6,
         ["one of token and token_id"]),
        (arithmetic("ties").replace("model: expert0", "model: {model: expert0, lroa: x}"), 4, ["lroa", "'lora'"]),
        (arithmetic("ties").replace("model: expert0", "model: a+b+c"), 4, ["more than a model and an adapter"]),
        (arithmetic("ties", "tokenizer_source: other\n"), 6, ["other", "none of the models"]),
        (arithmetic("ties", "tokenizer: {}\ntokenizer_source: base\n"), 6, ["not both"]),
        (arithmetic("ties", "slices: [{sources: []}]\n"), 6, ["exactly one of"]),
        (arithmetic("ties").replace("models:", "models: []\nmodels2:"), 4, ["models2"]),
        (arithmetic("ties").replace("base_model: base\n", ""), 1, ["needs a base_model"]),
        (arithmetic("ties").replace("expert1", "expert0"), 5, ["expert0 is there twice"]),
        ("merge_method: ties\nbase_model: base\nmodules: {a: {models: []}}\n", 3, ["either models or slices"]),
        ("merge_method: ties\nbase_model: base\nmodules: {default: {models: []}}\n", 3, ["either models or slices"]),
        ("base_model: base\nexperts: [{source_model: a}]\n", 1, ["mergekit-moe", "mixture of experts"]),
        ("genome: {}\ntasks: []\n", 1, ["mergekit-evolve", "params.yaml"]),
        ("layer_slices: []\n", 1, ["bakllama", "slices"]),
        (arithmetic("model_stock", "parameters: {filter_wise: [{value: true}]}\n").replace(
            "weight: 0.3, density: 0.25", "").replace("weight: 0.5", ""), 6, ["'filter_wise' must be true or false"]),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name_and_line(text, line, parts, family):
    if not parts:  # the plan says so, for every expert has its own
        assert any("narrow the window" in problem for problem in make_plan(loaded(family, text)).problems)
        return
    with refused(f"mergekit.yml:{line}:", *parts):
        loaded(family, text)


def test_the_command_line_merges_a_configuration(family, capsys):
    path = written(family, (STORED / "ties.yml").read_text())
    assert main(["plan", "--recipe", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "ties"
    assert main(["merge", "--recipe", str(path), "--out", str(family / "out")]) == 0
    assert json.loads((family / "out" / "config.json").read_text())["num_hidden_layers"] == 4
    assert main(["merge", "--recipe", str(path), "--set", "scale=0", "--out", str(family / "zero")]) == 0
    assert same_tensors(
        load_file(family / "zero" / "model.safetensors"), load_file(STORED / "base.safetensors")
    )


# --------------------------------------------------------------------------------------- one number an expert


@pytest.mark.parametrize(
    ("method", "params", "key"),
    [
        ("ties", {}, "density"),
        ("ties", {"scope": "tensor"}, "density"),
        ("ties", {"variant": "mergekit"}, "density"),
        ("breadcrumbs", {"outlier_rate": 0.1}, "density"),
        ("breadcrumbs", {"density": 0.5}, "outlier_rate"),
        ("dare", {}, "drop_rate"),
        ("dare", {"variant": "mergekit"}, "drop_rate"),
        ("della", {"epsilon": 0.05}, "density"),
        ("della", {"density": 0.5}, "epsilon"),
        ("della", {"density": 0.5, "variant": "mergekit"}, "epsilon"),
    ],
)
def test_a_number_an_expert(method, params, key):
    base = random_state(0)
    experts = {f"e{t}": random_state(t + 1) for t in range(3)}

    def merged(value: Any, given: dict[str, State] = experts) -> State:
        return merge_state_dicts(method, given, base, params={**params, key: value})

    assert same_tensors(merged([0.3] * 3), merged(0.3))
    # One after another beside copies of the base, of which nothing is ever kept: what each adds is its own.
    for t, value in enumerate((0.2, 0.3, 0.4)):
        alone = {name: state if name == f"e{t}" else base for name, state in experts.items()}
        assert same_tensors(merged([0.2, 0.3, 0.4], alone), merged(value, alone))
    with refused(method, f"2 numbers in {key} for 3 experts"):
        merged([0.2, 0.3])


@pytest.mark.parametrize("method", ["della", "breadcrumbs"])
def test_without_an_election_the_weighted_sum_is_added(method):
    base = {"w": torch.zeros(2, 4)}
    experts = {"a": {"w": torch.ones(2, 4)}, "b": {"w": -3 * torch.ones(2, 4)}}
    ways = [(False, False, -1.0), (False, True, -1.0 / 3), (True, False, -3.0), (True, True, -3.0)]
    for elect, normalize, expected in ways:
        params = {"density": 1.0, "weights": [2.0, 1.0], "elect": elect, "normalize": normalize, "scale": 1.0}
        if method == "breadcrumbs":
            params["outlier_rate"] = 0.0
        found = merge_state_dicts(method, experts, base, params=params)["w"]
        assert torch.allclose(found, torch.full((2, 4), expected))


def test_passthrough_is_the_one_expert():
    state = random_state(0)
    assert same_tensors(merge_state_dicts("passthrough", {"e": state}), state)
    halved = merge_state_dicts("passthrough", {"e": state}, params={"scale": 0.5})
    assert all(torch.equal(halved[name], value / 2) for name, value in state.items())
    with refused("passthrough", "at most 1 expert(s), got 2"):
        merge_state_dicts("passthrough", {"a": state, "b": state})
