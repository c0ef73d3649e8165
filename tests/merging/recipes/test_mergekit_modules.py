"""mergekit's modules that differ: what mergekit itself makes of them, and what is refused.

tests/goldens/mergekit/modules holds configurations and mergekit's outputs (benchmarks/make_mergekit_module_outputs.py).
"""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import refused, same_tensors
from hypothesis import given
from hypothesis import strategies as st
from places import GOLDENS
from safetensors.torch import load_file

from mergeline.merging import merge
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.recipes.loading import load_merges, load_recipe
from mergeline.merging.recipes.mergekit_modules import patterns, prefixes
from mergeline.merging.recipes.recipe import Recipe
from mergeline.merging.verify import verify

STORED = GOLDENS / "mergekit" / "modules"
NAMES = sorted(path.stem for path in STORED.glob("*.yml"))
MODELS = ("base", "expert0", "expert1")
LAYERS = {
    "t5": {"num_layers": 2, "num_decoder_layers": 3},
    "bart": {"encoder_layers": 2, "decoder_layers": 2, "num_hidden_layers": 2},
}


def family(folder: Path, kind: str) -> Path:
    """A folder where the models of a kind lie."""
    for model in MODELS:
        (folder / model).mkdir()
        shutil.copyfile(STORED / f"{kind}-{model}.safetensors", folder / model / "model.safetensors")
        (folder / model / "config.json").write_text(json.dumps({"model_type": kind, **LAYERS[kind]}))
    return folder


@pytest.fixture
def t5(tmp_path: Path) -> Path:
    return family(tmp_path, "t5")


def loaded(folder: Path, config: dict[str, Any] | str) -> Recipe:
    text = config if isinstance(config, str) else yaml.safe_dump(config)
    (folder / "mergekit.yml").write_text(text)
    return load_recipe(folder / "mergekit.yml", Path)


def stored(name: str) -> dict[str, Any]:
    return yaml.safe_load((STORED / f"{name}.yml").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_modules_that_differ_are_what_mergekit_makes_of_them(name, tmp_path):
    folder = family(tmp_path, name.partition("-")[0])
    recipe = loaded(folder, (STORED / f"{name}.yml").read_text())
    merge(recipe, tmp_path / "out")
    found, theirs = load_file(tmp_path / "out/model.safetensors"), load_file(STORED / f"{name}.safetensors")
    for tensor, value in theirs.items():
        assert found[tensor].dtype == value.dtype
        torch.testing.assert_close(found[tensor], value, rtol=0.0, atol=2e-7, msg=tensor)
    assert (found.keys() == theirs.keys()) == (name != "t5-encoder-alone")


@pytest.mark.parametrize(("name", "layers"), [
    ("t5-slices", {"num_layers": 3, "num_decoder_layers": 3}),
    ("t5-passthrough-slices", {"num_layers": 2, "num_decoder_layers": 5}),
    ("bart-slices", {"encoder_layers": 2, "decoder_layers": 3, "num_hidden_layers": 2}),
])  # fmt: skip
def test_slices_of_a_module_are_numbered_in_its_part_of_the_configuration(name, layers, tmp_path):
    folder = family(tmp_path, name.partition("-")[0])
    merge(loaded(folder, stored(name)), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {key: config[key] for key in layers} == layers


def test_slices_of_a_module_whose_layers_the_configuration_does_not_count(t5):
    for model in MODELS:
        (t5 / model / "config.json").write_text('{"model_type": "t5", "num_layers": 2}')
    [problem] = make_plan(loaded(t5, stored("t5-passthrough-slices"))).problems
    assert "does not say how many layers 'decoder.block.' has" in problem


def test_what_is_of_no_module_stays_the_bases_and_is_told(t5, tmp_path):
    recipe = loaded(t5, stored("t5-encoder-alone"))
    merge(recipe, tmp_path / "out")
    found, base = load_file(tmp_path / "out/model.safetensors"), load_file(t5 / "base/model.safetensors")
    rest = {name for name in base if not name.startswith("encoder.")}
    assert same_tensors({n: found[n] for n in rest}, {n: base[n] for n in rest})
    told = f"{len(rest)} tensors are of no module that is named, 'decoder.block.0.layer.0.SelfAttention.k.weight' first"
    assert any(told in note and "stay the base's; mergekit leaves them out" in note for note in recipe.notes)
    assert any(told in warning for warning in make_plan(recipe).warnings)


def test_a_tensor_belongs_to_the_module_with_the_longest_beginning():
    names = [
        "visual.blocks.0.mlp.weight",
        "visual.merger.ln_q.weight",
        "model.layers.0.mlp.weight",
        "lm_head.weight",
    ]
    assert prefixes("vision_tower", names) == ["visual."]
    assert prefixes("multi_modal_projector", names) == ["visual.merger."]
    assert prefixes("text_decoder", names) == ["model.layers.", "lm_head."]
    assert prefixes("default", names) == [""] and prefixes("decoder", names) == []
    assert prefixes("model.layers", names) == ["model.layers."]


TEXT = st.text("ab.*[", max_size=5)


@given(prefix=TEXT, within=st.none() | st.text("ab.*[", min_size=1, max_size=5), rest=TEXT, other=TEXT)
def test_patterns_are_of_names_that_begin_so_and_hold_a_filter(prefix, within, rest, other):
    for name in (prefix + rest, prefix + (within or "") + rest, other, (within or "") + other):
        expected = name.startswith(prefix) and (within or "") in name
        assert any(fnmatchcase(name, pattern) for pattern in patterns(prefix, within)) == expected


ALL = [{"model": "expert0", "parameters": {"weight": 1}}, {"model": "expert1", "parameters": {"weight": 1}}]
TIES = {"merge_method": "ties", "base_model": "base"}


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({**TIES, "modules": {"encodr": {"models": ALL}, "decoder": {"models": ALL[:1]}}},
         ["no tensor of base is of a module 'encodr'", "did you mean 'encoder'?"]),
        ({**TIES, "modules": {"encoder": {"slices": [{"sources": [{"model": "expert0", "layer_range": [0, 2]}]}]},
                              "decoder": {"models": ALL}}}, ["base, is not among the sources of this slice"]),
        ({"merge_method": "linear", "modules": {"encoder": {"models": ALL}}},
         ["tensors are of no module that is named", "there is no base to take them from: name their modules, too"]),
        ({**TIES, "modules": {"encoder": {}, "decoder": {"models": ALL}}}, ["either models or slices"]),
        ({**TIES, "modules": {"encoder": {"models": ALL, "parameters": {"densty": 1}}, "decoder": {"models": ALL}}},
         ["ties has no parameter 'densty'", "did you mean 'density'?"]),
        ({"merge_method": "sce", "base_model": "base",
          "modules": {"encoder": {"models": ALL}, "decoder": {"models": ALL[:1]}}},
         ["sce has no weights by which a model is left out", "add expert1"]),
        ({"merge_method": "passthrough", "modules": {"encoder": {"models": ALL}, "decoder": {"models": ALL[:1]}}},
         ["passthrough takes one model a module"]),
        ({"merge_method": "model_stock", "base_model": "base",
          "modules": {"encoder": {"models": ALL, "parameters": {"filter_wise": True}}, "decoder": {"models": ALL}}},
         ["'filter_wise' is one for the whole merge"]),
        ({**TIES, "base_model": "nowhere", "modules": {"encoder": {"models": ALL}, "decoder": {"models": ALL[:1]}}},
         ["which tensors are whose is seen from nowhere: ", "no such file or folder"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_line(config, parts, t5):
    with refused("mergekit.yml:", *parts):
        loaded(t5, config)


def test_modules_of_a_remote_model_are_seen_from_its_headers(t5):
    brought = []

    def bring(where: str) -> Path:
        brought.append(where)
        return t5 / where.rpartition("/")[2]

    config = stored("t5-encoder-alone")
    for model in (config, *config["modules"]["encoder"]["models"]):
        key = "base_model" if model is config else "model"
        model[key] = f"org/{model[key]}"
    (t5 / "mergekit.yml").write_text(yaml.safe_dump(config))
    recipe = load_recipe(t5 / "mergekit.yml", bring)
    assert brought[0] == "hf://org/base" and recipe.include == ["encoder.*"]


def test_modules_of_a_model_that_another_document_makes_are_refused(t5):
    first = {"name": "one", "merge_method": "linear", "models": ALL}
    second = {**stored("t5-encoder-alone"), "base_model": "one"}
    (t5 / "mergekit.yml").write_text(yaml.safe_dump_all([first, second]))
    with refused("mergekit.yml:", "which tensors are whose is seen from one: ", "no such file or folder"):
        load_merges(t5 / "mergekit.yml", t5 / "made", Path)


@pytest.mark.parametrize("name", ["t5-task_arithmetic", "t5-passthrough", "t5-slices"])
def test_merges_by_modules_are_verified_from_their_manifests(name, t5, tmp_path):
    merge(loaded(t5, stored(name)), tmp_path / "out")
    assert "bit-identical" in verify(tmp_path / "out")
