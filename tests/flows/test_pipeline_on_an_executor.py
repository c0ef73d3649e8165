"""A pipeline on the workers of an executor: the same bytes as on this machine alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML
from small_workspace import SmallWorkspace, make_workspace

pytestmark = pytest.mark.slow

SWEEP = ("sweep", "--params", "params.yaml", "--out", "table.md")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> SmallWorkspace:
    pytest.importorskip("distributed", reason="Dask is not installed: pip install 'mergeline[dask]'")
    return make_workspace(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def here(clone: SmallWorkspace, tmp_path_factory: pytest.TempPathFactory) -> SmallWorkspace:
    workspace = clone.copy(tmp_path_factory.mktemp("here") / "workspace")
    workspace.check("mergeline", *SWEEP)
    return workspace


def test_a_sweep(clone: SmallWorkspace, here: SmallWorkspace, tmp_path: Path) -> None:
    there = clone.copy(tmp_path / "there")
    there.check("mergeline", *SWEEP, "--executor", "dask:2")
    assert there.outputs() == here.outputs()
    assert (there.root / "table.md").read_text() == (here.root / "table.md").read_text()
    # Nothing is stale: the executor is none of what decides it, nor of what an evaluation is known by.
    assert there.check("mergeline", *SWEEP, "--json").count('"ran": []') == 1
    there.check("mergeline", "search", "cart")
    assert there.outputs() == here.outputs()


def test_a_run(clone: SmallWorkspace, here: SmallWorkspace, tmp_path: Path) -> None:
    there = clone.copy(tmp_path / "there")
    file = there.root / "params.yaml"
    params = YAML(typ="safe").load(file)
    YAML().dump({**params, "executor": "dask:2"}, file)
    there.check("mergeline", "run", "--only", "compare")
    assert there.outputs() == here.outputs()
