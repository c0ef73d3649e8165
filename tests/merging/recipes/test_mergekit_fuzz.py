"""Fuzzed configurations of mergekit's: a plan, or one line of refusal; never a traceback or a hang."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import GOLDENS

from mergeline.merging.engine.planning import make_plan
from mergeline.merging.errors import UserError
from mergeline.merging.recipes.loading import load_merges, load_recipe
from mergeline.merging.recipes.mergekit_yaml import METHODS

STORED = GOLDENS / "mergekit"
CONFIGS = [list(yaml.safe_load_all(path.read_text())) for path in sorted(STORED.glob("*.yml"))]
KEYS = st.sampled_from(
    ["models", "slices", "modules", "sources", "model", "base_model", "layer_range", "parameters", "weight", "t",
     "scale", "value", "filter", "tokenizer", "tokens", "tokenizer_source", "chat_template", "dtype", "out_dtype",
     "name", "lora"]
)  # fmt: skip
WORDS = st.sampled_from(
    ["base", "expert0", "expert9", "base+expert0", "+", "a+b+c", "union", "auto", "chatml", "*", "mean", "bfloat16", "",
     "1e-3", "nan", "inf", ".inf", *METHODS]
)  # fmt: skip
LEAVES = st.none() | st.booleans() | st.integers(-3, 5) | st.floats() | WORDS | st.text(max_size=3)
JUNK = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(part: Any) -> list[tuple[Any, Any]]:
    """Every container of a configuration with each key in it."""
    keys = list(part) if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ()
    return [place for key in keys for place in ((part, key), *places(part[key]))]


@st.composite
def configurations(draw: st.DrawFn) -> str:
    """A stored configuration of which some things were changed, left out or added."""
    found = copy.deepcopy(draw(st.sampled_from(CONFIGS)))
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(places(found)))
        what = draw(st.sampled_from(["replace", "leave out", "add"]))
        if what == "replace":
            container[key] = draw(JUNK)
        elif what == "leave out":
            del container[key]
        elif isinstance(container, dict):
            container[draw(KEYS)] = draw(JUNK)
        else:
            container.append(draw(JUNK))
        if not places(found):
            break
    return yaml.safe_dump_all(found)


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    for name in ("base", "expert0", "expert1", "expert2"):
        (folder / name).mkdir()
        shutil.copyfile(STORED / f"{name}.safetensors", folder / name / "model.safetensors")
    return folder


@settings(
    max_examples=1000 if os.environ.get("EXAMPLES") else 100,
    suppress_health_check=list(HealthCheck),
    deadline=5000,
)
@given(text=configurations())
def test_fuzzed_configurations(text, family):
    file = family / "fuzzed.yml"
    file.write_text(text)
    for read in (
        lambda: [load_recipe(file, Path)],
        lambda: [m.recipe for m in load_merges(file, family / "x", Path)],
    ):
        try:
            for recipe in read():
                make_plan(recipe)
        except UserError as error:
            assert "\n" not in str(error)
