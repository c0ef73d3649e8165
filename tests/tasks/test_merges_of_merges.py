"""Merges that take the results of other merges: what params.yaml may say, what runs, and what makes one stale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import refused
from ruamel.yaml import YAML
from safetensors.numpy import load_file, save_file
from toy_workspace import FAMILY, SCORED, TASKS, run_all, save_with_score

from mergeline.merging.verify import verify
from mergeline.tasks.params import load_params
from mergeline.tasks.records import remember
from mergeline.tasks.seen import seen_by_parts
from mergeline.tasks.status import chosen_stages, states
from mergeline.tasks.workspace import Workspace

SCORE = """
import numpy as np
from safetensors.numpy import load_file

def score(model, split, tasks, device):
    [file] = model.glob("*.safetensors")
    weight = load_file(file)["w"]
    for task in tasks:
        corner = np.array([1, 1, 0, 0]) if task == "left" else np.array([0, 0, 1, 1])
        for i in range(20):
            point = corner + np.random.default_rng(100 * i + len(split)).normal(size=4) / 4
            yield task, i, 1 - np.square(weight - point).mean()
"""
OUTER = {"method": "slerp", "experts": ["merge:average", "right"], "search": {"t": [0.2, 0.7]}}
PARAMS: dict[str, Any] = {
    **FAMILY,
    **SCORED,
    "name": "chained",
    "merges": {**FAMILY["merges"], "left_only": {"method": "task_arithmetic", "experts": ["left"]}},
    "merges_of_merges": {
        "outer": OUTER,
        "on_top": {
            "method": "task_arithmetic",
            "params": {"scale": 1.0},
            "base": "merge:sum",
            "experts": ["merge:average", "left"],
        },
    },
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_with_score(tmp_path, SCORE)
    write(tmp_path)
    return tmp_path


def write(root: Path, **changed: Any) -> Path:
    """params.yaml with other sections."""
    YAML().dump({**PARAMS, **changed}, root / "params.yaml")
    return root / "params.yaml"


def weight(root: Path, name: str) -> Any:
    [file] = (root / "build/merges" / name).glob("*.safetensors")
    return load_file(file)["w"]


def remembered(root: Path) -> None:
    """All stages run, and are on record."""
    workspace = run_all(root)
    for stage in workspace.stages:
        remember(workspace, stage, {**workspace.record(stage), "outs": workspace.outputs(stage)})


def busy(root: Path) -> dict[str, str]:
    """What a run would do with the stages that are not up to date."""
    workspace = Workspace(root / "params.yaml")
    return {s.stage.name: s.action for s in states(workspace, workspace.stages) if s.action != "none"}


def test_merges_take_what_others_have_chosen(root):
    run_all(root)
    manifest = json.loads((root / "build/merges/outer/manifest.json").read_text())
    assert list(manifest["recipe"]["experts"]) == ["average", "right"]
    inner = json.loads((root / "build/merges/average/manifest.json").read_text())
    assert manifest["recipe"]["experts"]["average"]["digest"] == inner["output"]["digest"]
    expected = weight(root, "sum") + (weight(root, "average") - weight(root, "sum"))
    expected = expected + load_file(root / "in/left.safetensors")["w"] - weight(root, "sum")
    assert weight(root, "on_top") == pytest.approx(expected, abs=1e-6)
    assert "bit-identical" in verify(root / "build/merges/outer")
    searched = json.loads((root / "build/search/outer.json").read_text())
    assert len(searched["points"]) == 2
    rows = {
        r["name"]: r for r in json.loads((root / "build/leaderboard/leaderboard.json").read_text())["rows"]
    }
    assert rows["outer"]["experts"] == ["merge:average", "right"] and rows["outer"]["norm_ratio"] > 0


def test_what_experts_lack_is_as_in_the_base(root):
    for name in ("base", *TASKS):
        file = root / "in" / f"{name}.safetensors"
        weight = load_file(file)["w"]
        rest = {"text.a": weight, "text.b": weight, "text": weight} if name == "base" else {}
        save_file({"w": weight, **rest}, file)
    write(root, merges_of_merges={"outer": OUTER})
    run_all(root)
    manifest = json.loads((root / "build/merges/outer/manifest.json").read_text())
    assert manifest["recipe"]["exclude"] == ["text", "text.*"]
    [file] = (root / "build/merges/outer").glob("*.safetensors")
    merged, base = load_file(file), load_file(root / "in/base.safetensors")
    assert all((merged[name] == base[name]).all() for name in ("text", "text.a", "text.b"))


def test_what_merges_are_made_of_is_found_through_those_that_they_take(root):
    params = load_params(root / "params.yaml")
    assert params.made_of("outer") == ["left", "right"]
    assert params.made_of("on_top") == ["left", "right"]
    assert params.made_of("left_only") == ["left"]


def test_a_change_of_what_a_merge_takes_makes_it_stale_and_no_other_change_does(root):
    remembered(root)
    assert busy(root) == {}
    write(root, merges={**PARAMS["merges"], "average": {"method": "average", "dtype": "float16"}})
    assert busy(root)["merge@average"] == "run"
    assert {"fit-of-merges@outer", "search-of-merges@outer", "merge-of-merges@outer"} <= busy(root).keys()
    before = {
        name: (root / f"build/fits/{name}/points.json").read_bytes() for name in PARAMS["merges_of_merges"]
    }
    write(
        root, merges={**PARAMS["merges"], "left_only": {**PARAMS["merges"]["left_only"], "dtype": "float16"}}
    )
    run_all(root)
    assert before == {name: (root / f"build/fits/{name}/points.json").read_bytes() for name in before}
    write(root, merges={**PARAMS["merges"], "average": {"method": "average", "dtype": "float16"}})
    run_all(root)
    assert all(before[name] != (root / f"build/fits/{name}/points.json").read_bytes() for name in before)


def test_one_that_is_taken_out_leaves_the_leaderboard(root):
    remembered(root)
    write(root, merges_of_merges={"outer": OUTER})
    assert busy(root) == {"compare": "run"}
    run_all(root)
    assert not (root / "build/merges/on_top").exists()


def test_a_run_of_one_runs_what_it_takes(root):
    workspace = Workspace(root / "params.yaml")
    names = {stage.name for stage in chosen_stages(workspace, ["outer"], [])[0]}
    assert {"merge@average", "merge-of-merges@outer", "evaluate-of-merges@outer"} <= names
    assert "merge-of-merges@on_top" not in names


@pytest.mark.parametrize(
    ("section", "name", "changed", "words"),
    [
        ("merges", "average", {"experts": ["merge:sum", "left"]}, "move 'average' there"),
        ("merges", "average", {"base": "merge:sum"}, "move 'average' there"),
        ("merges_of_merges", "outer", {"experts": ["merge:avarage", "left"]}, "did you mean 'average'"),
        ("merges_of_merges", "outer", {"experts": ["merge:on_top", "left"]}, "is a merge of merges itself"),
        ("merges_of_merges", "outer", {"experts": ["merge:outer", "left"]}, "is a merge of merges itself"),
        ("merges_of_merges", "outer", {"experts": ["left", "right"]}, "takes the result of no merge"),
        ("merges_of_merges", "outer", {"experts": ["merge:average", "rihgt"]}, "did you mean 'right'"),
        ("merges_of_merges", "outer", {"experts": ["merge:average"] * 2}, "listed twice"),
        ("merges_of_merges", "outer", {"base": "left"}, "no result of a merge"),
        ("merges_of_merges", "outer", {"base": "merge:nothing"}, "no merge has this name"),
        ("merges_of_merges", "average", {}, "is among the merges, too"),
        ("merges_of_merges", "outer", {"method": "adamerging", "search": {}}, "is fitted to examples"),
        ("merges_of_merges", "outer", {"method": "regmean", "search": {}}, "needs statistics"),
    ],
)
def test_what_cannot_be_is_refused_where_it_is_said(root, section, name, changed, words):
    entries = {**PARAMS[section], name: {**PARAMS[section].get(name, OUTER), **changed}}
    path = write(root, **{section: entries})
    with refused(f"{path}:", words):
        load_params(path)


def test_results_that_are_no_one_model_and_names_that_two_have_are_refused(root):
    merges = {**PARAMS["merges"], "left": {"method": "average"}, "store": {"method": "tall_mask"}}
    for experts, words in (
        (["merge:left", "left"], "an expert that it merges has that name, too"),
        (["merge:store", "left"], "makes no model of one set of weights"),
    ):
        path = write(root, merges=merges, merges_of_merges={"outer": {**OUTER, "experts": experts}})
        with refused(f"{path}:", words):
            load_params(path)


def test_what_a_merge_has_seen_is_what_its_parts_have_seen():
    def fitted(**more: Any) -> dict[str, Any]:
        own = {"method": "m", "params": {}, "data": "unlabelled", "split": "fit"}
        return {"recipe": {"fitted": {**own, "examples": {}, "digests": {}, **more}}}

    first = fitted(examples={"left": 5, "right": 3}, digests={"left": "a", "right": "b"}, trains=True)
    second = fitted(data="labelled", split="test", examples={"left": 9}, digests={"left": "a"})
    found = seen_by_parts("slerp", {"t": 0.5}, [{"recipe": {"fitted": None}}, first, second])
    assert found == {
        "method": "slerp",
        "params": {"t": 0.5},
        "data": "labelled",
        "split": "test",
        "examples": {"left": 9, "right": 3},
        "digests": {"left": "a", "right": "b"},
        "trains": True,
        "task_known": False,
    }
    assert seen_by_parts("slerp", {}, [{"recipe": {"fitted": None}}]) is None
