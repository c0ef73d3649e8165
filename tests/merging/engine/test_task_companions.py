"""What lies beside the weights for where the task of an input is known, or found: adapters of tasks, and routers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_family

from mergeline.merging import merge
from mergeline.merging.api import merge_points
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.checkpoints.router import ROUTER, Router, write_router
from mergeline.merging.checkpoints.task_adapters import TaskAdapter, task_adapters, write_task_adapter
from mergeline.merging.compress import compress, expert_state, extract_expert, is_store
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.errors import UserError
from mergeline.merging.recipes.loading import load_recipe
from mergeline.merging.verify import verify


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return save_family(tmp_path / "in", method="task_arithmetic", params={"scale": 0.5}, seed=3)


def adapter(path: Path, model: str, task: str = "digits") -> Path:
    tensors = {"matrix": torch.eye(3), "offset": torch.ones(3)}
    write_task_adapter(path, TaskAdapter("linear", task, model, tensors))
    return path


@pytest.fixture
def adapted(recipe, tmp_path) -> dict[str, Any]:
    """The recipe with an adapter for its own merge."""
    digest = merge(recipe, tmp_path / "plain")["output"]["digest"]
    return {**recipe, "adapters": {"digits": adapter(tmp_path / "fit" / "digits.safetensors", digest)}}


def test_adapters_lie_beside_the_merge_and_are_verified_with_it(adapted, tmp_path):
    out = tmp_path / "out"
    manifest = merge(adapted, out)
    assert "adapters/digits.safetensors" in manifest["files"]
    assert manifest["output"] == merge({**adapted, "adapters": {}}, tmp_path / "plain")["output"]
    assert task_adapters(out)["digits"].model == manifest["output"]["digest"]
    shutil.rmtree(tmp_path / "fit")
    assert verify(out).endswith(f"of its inputs ({manifest['output']['digest']})")
    assert "`adapters/` holds what corrects it where the task is known at use: digits." in (
        (out / "README.md").read_text()
    )
    (out / "adapters" / "mine.txt").write_text("")
    assert "what the manifest does not list: adapters/mine.txt" in verify(out)
    with pytest.raises(UserError, match="holds 'adapters/mine.txt', which Mergeline did not write"):
        merge({**adapted, "adapters": {}}, out)
    (out / "adapters" / "mine.txt").unlink()
    adapter(out / "adapters/digits.safetensors", "sha256:other")
    with pytest.raises(UserError, match=r"adapters/digits.safetensors: is sha256:.*changed after the merge"):
        verify(out)
    with pytest.raises(UserError, match="made for another merge .sha256:other. than this one"):
        task_adapters(out)


def test_a_merge_with_adapters_is_replaced_by_another_of_its_kind(adapted, tmp_path):
    merge(adapted, tmp_path / "out")
    merge({**adapted, "adapters": {}}, tmp_path / "out")
    assert not (tmp_path / "out" / "adapters").exists() and task_adapters(tmp_path / "out") == {}


def test_an_adapter_for_another_merge_or_task_or_place_is_refused(adapted, tmp_path):
    with pytest.raises(UserError, match="made for another merge"):
        merge({**adapted, "params": {"scale": 0.25}}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    file = adapted["adapters"]["digits"]
    for name, said in [
        ("shapes", "is the adapter of 'digits', not of 'shapes'"),
        ("../digits", "names a file"),
    ]:
        assert said in make_plan({**adapted, "adapters": {name: file}}).problems[0]
    with pytest.raises(UserError, match="lie beside weights in a folder"):
        merge(adapted, tmp_path / "out.safetensors")
    with pytest.raises(UserError, match="adapters correct a merge"):
        compress({**adapted, "method": "tsv_compress", "params": {}}, tmp_path / "store")
    assert not list(tmp_path.glob("out*")) and not (tmp_path / "store").exists()


def test_a_written_recipe_names_them_from_its_own_folder(adapted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experts = {name: f"../in/{path.name}" for name, path in adapted["experts"].items()}
    written = {"method": "average", "base": "../in/base.safetensors", "experts": experts}
    written |= {"adapters": {"digits": "digits.safetensors"}, "router": "router.safetensors"}
    (tmp_path / "fit" / "recipe.yaml").write_text(json.dumps(written))
    recipe = load_recipe(tmp_path / "fit" / "recipe.yaml", Path)
    assert recipe.adapters == {"digits": tmp_path / "fit" / "digits.safetensors"}
    assert recipe.router == tmp_path / "fit" / "router.safetensors"


def test_recipes_without_either_are_written_as_they_were(recipe, tmp_path):
    manifest = merge(recipe, tmp_path / "out")
    assert not {"adapters", "router"} & manifest["recipe"].keys()
    assert not {"adapters", "router"} & make_plan(recipe).recipe.model_dump().keys()


@pytest.fixture
def routed(recipe, tmp_path) -> dict[str, Any]:
    """The recipe of a store with a router."""
    base, experts = open_checkpoint(recipe["base"]).digest(), list(recipe["experts"])
    tensors = {"weight": torch.ones(len(experts), 6), "offset": torch.zeros(len(experts))}
    write_router(tmp_path / "r.safetensors", Router("features", experts, base, ["mlp"], tensors))
    return {**recipe, "method": "tsv_compress", "params": {}, "router": tmp_path / "r.safetensors"}


def test_a_router_lies_beside_the_store_and_is_verified_with_it(routed, tmp_path):
    out = tmp_path / "store"
    manifest = merge(routed, out)
    assert ROUTER in manifest["files"] and is_store(out)
    (tmp_path / "r.safetensors").unlink()
    assert "bit-identical" in verify(out)
    name = next(iter(routed["experts"]))
    extract_expert(out, name, tmp_path / "expert")
    expert, state = open_checkpoint(tmp_path / "expert"), expert_state(out, name)
    assert expert.tensors.keys() == state.keys()
    assert all(torch.equal(state[tensor], expert.read(tensor)) for tensor in state)


def test_a_router_for_another_base_or_other_experts_or_a_merge_is_refused(routed, tmp_path):
    with pytest.raises(UserError, match="average makes one merge of all"):
        merge({**routed, "method": "average"}, tmp_path / "out")
    with pytest.raises(UserError, match="router is for a compressed store"):
        merge_points([(routed, tmp_path / "out")])
    experts = dict(reversed(routed["experts"].items()))
    assert "fit it again" in make_plan({**routed, "experts": experts}).problems[0]
    names = list(routed["experts"])
    tensors = {"weight": torch.ones(len(names), 6), "offset": torch.zeros(len(names))}
    write_router(routed["router"], Router("features", names, "sha256:other", ["mlp"], tensors))
    with pytest.raises(UserError, match="made for another base .sha256:other."):
        compress(routed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
