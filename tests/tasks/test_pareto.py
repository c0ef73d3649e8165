"""`mergeline pareto`: the front of a search, the point that does best what is asked, and its recipe and page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_pages import Page
from ruamel.yaml import YAML
from safetensors.numpy import load_file, save_file
from toy_workspace import FAMILY, SCORED, save_with_score

from mergeline.merging.errors import UserError
from mergeline.tasks.params import load_params
from mergeline.tasks.workspace import Workspace

WEIGHTS = {"each": {"low": 0, "high": 1}}
SPACE = {"weights": WEIGHTS}
SCORE = """
from safetensors.numpy import load_file

def score(model, split, tasks, device):
    [file] = model.glob("*.safetensors")
    a, b = load_file(file)["w"][[0, 2]] - 0.5
    for task in tasks:
        for i in range(5):
            yield task, i, float(1 - (a - 0.5) ** 2 - b**2 if task == "left" else 1 - a**2 - (b - 0.4) ** 2)
"""
# (left, right): the second is beaten by the first; experts have 1 and 0.8.
SCORES = [(0.9, 0.3), (0.85, 0.3), (0.8, 0.6), (0.4, 0.76), (0.95, 0.1)]


def search(**own: Any) -> dict[str, Any]:
    return {
        "method": "task_arithmetic",
        "params": {"scale": 1.0},
        "search": {"sampler": "map", "budget": 12, "space": SPACE, **own},
    }


def made(root: Path, merges: dict[str, Any], **evaluate: Any) -> Workspace:
    evaluated = {**SCORED["evaluate"], **evaluate}
    YAML().dump({**FAMILY, **SCORED, "evaluate": evaluated, "merges": merges}, root / "params.yaml")
    return Workspace(root / "params.yaml")


def ran(workspace: Workspace, *steps: str) -> None:
    for stage in workspace.stages:
        if stage.step in steps:
            workspace.run(stage)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace in which `found` was searched: what was found is made up."""
    monkeypatch.chdir(tmp_path)
    save_with_score(tmp_path, SCORE)
    ran(made(tmp_path, {"found": search(), "fixed": {"method": "average"}}), "fetch", "fit")
    points = [
        {
            "params": {"scale": 1.0, "weights": [0.1 * i, 0.5]},
            "mean": (left + right) / 2,
            "tasks": {"left": left, "right": right},
        }
        for i, (left, right) in enumerate(SCORES)
    ]
    found = {
        "method": "task_arithmetic",
        "points": points,
        "chosen": points[2]["params"],
        "front": [0, 2, 3, 4],
    }
    for name, own in (("found", found), ("fixed", {**found, "points": []})):
        (tmp_path / "build/search").mkdir(exist_ok=True)
        (tmp_path / f"build/search/{name}.json").write_text(json.dumps(own))
    baselines = tmp_path / "build/evaluations/baselines"
    baselines.mkdir(parents=True)
    answers = {"left/val/left": np.full(5, 1.0), "right/val/right": np.array([0.6, 1.0, 0.8, 0.8, 0.8])}
    save_file(answers, baselines / "predictions.safetensors")
    return tmp_path


def picked(mergeline, *arguments: str) -> int:
    done = mergeline("pareto", "found", "--json", *arguments)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    return found["points"][found["picked"]]["index"]


def test_the_front_is_shown_with_shares_of_the_experts(root, mergeline):
    out = mergeline("pareto", "found").out.splitlines()
    assert out[0] == "found: 4 of 5 points are on the front; scores on validation, and shares of the experts'"
    assert [line.split()[0] for line in out[2:]] == ["2", "0", "3", "4"]
    assert out[2].split() == [
        "2",
        "0.700",
        "0.800",
        "80%",
        "0.600",
        "75%",
        "scale=1.0",
        "weights=[0.2,",
        "0.5]",
    ]
    (root / "build/evaluations/baselines/predictions.safetensors").unlink()
    out = mergeline("pareto", "found").out
    assert "%" not in out and "experts" not in out


def test_what_is_asked_is_held_and_the_rest_is_best(root, mergeline):
    assert picked(mergeline, "--at-least", "left=0.9") == 0
    assert picked(mergeline, "--at-least", "right=0.95") == 3
    assert picked(mergeline, "--at-least-score", "right=0.6", "--at-least", "left=0.5") == 2
    assert picked(mergeline, "--prefer", "left=1") == 4
    assert picked(mergeline, "--prefer", "left=1", "--prefer", "right=10") == 3
    assert picked(mergeline, "--prefer", "left=1", "--at-least-score", "right=0.3") == 0


def test_the_nearest_point_is_named_where_none_holds_what_is_asked(root, mergeline):
    done = mergeline("pareto", "found", "--at-least", "left=0.97", "--recipe", "r.yaml", "--html", "p.html")
    assert done.code == 2 and done.out == "" and not Path("r.yaml").exists() and not Path("p.html").exists()
    assert done.err.count("\n") == 1
    said = "left at 0.97 of its expert; the nearest has left 0.950 of its expert, at scale 1.0, weights [0.4, 0.5]"
    assert said in done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "has no 'nothing' to search; known: found, fixed"),
        (["fixed"], "fixed has no search, and so one point alone"),
        (["found", "--at-least", "lft=1"], "'lft' is no task of found; did you mean 'left'?"),
        (["found", "--at-least", "left"], "--at-least left: write TASK=SHARE"),
        (["found", "--prefer", "left=nan"], "'nan' is no number; write TASK=WEIGHT"),
        (["found", "--prefer", "left=1", "--prefer", "left=2"], "'left' is given twice"),
        (["found", "--prefer", "left=0"], "weights of tasks are 0 or more, and one of them is above 0"),
        (["found", "--recipe", "params.yaml"], "params.yaml: holds the input"),
        (["found", "--html", "mine.html"], "is no page of Mergeline's"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(arguments, said, root, mergeline):
    Path("mine.html").write_text("mine")
    done = mergeline("pareto", *arguments)
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1
    assert Path("mine.html").read_text() == "mine"


def test_what_was_not_measured_is_said(root, mergeline):
    (root / "build/evaluations/baselines/predictions.safetensors").unlink()
    done = mergeline("pareto", "found", "--at-least", "left=0.5")
    assert (
        done.code == 2
        and "the experts were not measured yet; run `mergeline run --only baselines`" in done.err
    )
    (root / "build/search/found.json").unlink()
    done = mergeline("pareto", "found")
    assert done.code == 2 and "run `mergeline run --only search@found` first" in done.err


def test_where_smaller_scores_are_better_the_front_is_of_small_ones(root, mergeline):
    made(root, {"found": search(), "fixed": {"method": "average"}}, better="lower")
    out = mergeline("pareto", "found").out
    assert "0.900" not in out and "0.100" in out and "%" not in out
    assert picked(mergeline, "--at-least-score", "left=0.85") == 1
    assert picked(mergeline, "--prefer", "right=1") == 4
    done = mergeline("pareto", "found", "--at-least", "left=0.9")
    assert done.code == 2 and "'left' is better where its score is smaller" in done.err


def test_the_recipe_of_a_point_is_merged(root, mergeline, monkeypatch):
    assert mergeline("pareto", "found", "--at-least", "left=0.9", "--recipe", "r.yaml").code == 0
    monkeypatch.chdir(root.parent)
    assert mergeline("merge", "--recipe", root / "r.yaml", "--out", root / "out").code == 0
    [file] = (root / "out").glob("*.safetensors")
    base, left, right = (
        load_file(root / f"in/{name}.safetensors")["w"] for name in ("base", "left", "right")
    )
    np.testing.assert_allclose(load_file(file)["w"], base + 0.5 * (right - base), atol=1e-6)
    monkeypatch.chdir(root)
    assert mergeline("pareto", "found", "--recipe", "r.yaml").code == 0  # its own may be replaced
    assert json.loads(Path("r.yaml").read_text())["params"]["weights"] == [0.2, 0.5]
    Path("r.yaml").write_text("method: average\n")
    assert mergeline("pareto", "found", "--recipe", "r.yaml").code == 2
    assert mergeline("pareto", "found", "--recipe", "r.yaml", "--force").code == 0


def test_the_page_has_a_picture_and_a_table(root, mergeline):
    assert mergeline("pareto", "found", "--prefer", "right=1", "--html", "p.html").code == 0
    page = Page(Path("p.html").read_text())
    assert "4 points of 5 that were measured on validation" in page.text and "3 chosen" in page.text
    circles = [attrs for tag, attrs in page.tags if tag == "circle"]
    assert len(circles) == 4 + 1 + 1 and circles[-1]["class"] == "chosen"
    assert "0.760 95 %" in page.text


@pytest.mark.slow
def test_a_search_by_map_finds_a_front_and_says_how_far_its_quadratics_are_off(root, mergeline):
    ran(Workspace(root / "params.yaml"), "search")
    found = json.loads((root / "build/search/found.json").read_text())
    assert len(found["points"]) == 12 and found["surrogate"]["sampled"] == 8
    # The scores are quadratics in the weights.
    for one in found["surrogate"]["tasks"].values():
        assert one["front_error"] < 1e-3
    weights = np.array([point["params"]["weights"] for point in found["points"]])
    assert weights.min() >= 0 and weights.max() <= 1
    assert {8, 9, 10, 11} <= {*found["front"]}
    page = json.loads(mergeline("pareto", "found", "--json", "--html", "p.html").out)
    assert page["surrogate"] == found["surrogate"] and "At proposed points" in Path("p.html").read_text()
    # What is foretold of the best for a task is its score there, to which the first weight alone counts.
    asked = ("--prefer", "left=1", "--foretold", "--recipe", "r.yaml", "--html", "p.html")
    told = json.loads(mergeline("pareto", "found", "--json", *asked).out)
    point = told["points"][told["picked"]]
    a, b = point["params"]["weights"]
    moved = (
        np.array([a - 0.9 * b, -a + 0.9 * b]) / 2
    )  # of the toy's task vectors, in its first and third place
    assert point["index"] is None and 1 < len(told["points"]) <= 21
    assert point["tasks"]["left"] == pytest.approx(1 - (moved[0] - 0.5) ** 2 - moved[1] ** 2, abs=1e-3)
    assert json.loads(Path("r.yaml").read_text())["params"] == point["params"]
    assert "none of their scores was measured" in Page(Path("p.html").read_text()).text


def test_what_no_search_by_map_can_foretell_is_refused(root, mergeline):
    done = mergeline("pareto", "found", "--foretold")
    assert done.code == 2 and "was not searched by map" in done.err
    file = root / "build/search/found.json"
    found = json.loads(file.read_text())
    file.write_text(json.dumps({**found, "surrogate": {"sampled": 3, "tasks": {}}}))
    made(root, {"found": search(space={"weights": {"each": {"low": 0, "high": 0.3}}})})
    done = mergeline("pareto", "found", "--foretold")
    assert done.code == 2 and "searched in another space than params.yaml has" in done.err


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"budget": 8}, "the 6 coefficients of a quadratic in 2 numbers to 8 points, .*; give 9 points"),
        ({"budget": {"minutes": 1}}, "map divides a number of points"),
        ({"space": {"weights": {"each": [0, 1]}}}, "numbers of ranges"),
        ({"race": True}, "leave race out"),
    ],
)
def test_what_map_cannot_be_fitted_to_is_refused(own, said, tmp_path):
    save_with_score(tmp_path, SCORE)
    made(tmp_path, {"found": search(**own)})
    with pytest.raises(UserError, match=said):
        load_params(tmp_path / "params.yaml")


def test_map_is_refused_for_several_methods(tmp_path):
    save_with_score(tmp_path, SCORE)
    methods = [{"method": "ties", "space": {"density": [0.5]}}]
    made(tmp_path, {"found": {"search": {"sampler": "map", "budget": 12, "methods": methods}}})
    with pytest.raises(UserError, match="not of several; choose nsga2"):
        load_params(tmp_path / "params.yaml")
