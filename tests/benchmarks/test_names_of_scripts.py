"""Scripts that no other test runs: what they take of Mergeline is there."""

from __future__ import annotations

import ast
import importlib
from typing import Iterator

import pytest
from places import REPOSITORY

SCRIPTS = sorted([*(REPOSITORY / "benchmarks").glob("*.py"), *(REPOSITORY / "tools").glob("*.py")])


def missing(source: str) -> Iterator[str]:
    """What a source imports from mergeline's modules, or names of a module of mergeline's, and is not there."""
    tree, modules = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mergeline":
            assert node.module is not None
            for alias in node.names:
                try:
                    modules[alias.asname or alias.name] = importlib.import_module(
                        f"{node.module}.{alias.name}"
                    )
                except ModuleNotFoundError:
                    if not hasattr(importlib.import_module(node.module), alias.name):
                        yield f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            if not hasattr(modules[node.value.id], node.attr):
                yield f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_names_is_there(script):
    assert list(missing(script.read_text())) == []


def test_what_is_not_there_is_found():
    imports = "from mergeline.tasks.clip import places\nfrom mergeline.merging import nothing\n"
    assert list(missing(imports + "places.none\nplaces.heads\n")) == [
        "mergeline.merging.nothing",
        "places.none",
    ]
