"""Merges of learned methods: fitted at every point, chosen by what they have not seen, merged, and marked."""

from __future__ import annotations

import json
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Iterator
from unittest.mock import patch

import numpy as np
import pytest
import torch
from checkpoints import refused
from places import REPOSITORY
from safetensors.numpy import load_file, save_file
from test_new_modality import PARAMS, N, Toy, rows
from toy_workspace import TASKS, WIDTH, run_all

from mergeline.merging.engine.manifest import read_manifest
from mergeline.merging.learning.contract import learned_methods
from mergeline.merging.learning.fitting import fit
from mergeline.merging.learning.network import Examples, Network
from mergeline.merging.methods import contract
from mergeline.merging.verify import verify
from mergeline.tasks import modalities
from mergeline.tasks.fit import examples_of, fit_recipe, fitted_recipe
from mergeline.tasks.publish import write_report
from mergeline.tasks.schema import Params
from mergeline.tasks.workspace import Workspace

METHODS = str(REPOSITORY / "tests/helpers/halfway.py")
NEAR = {"method": "nearest_scale", "examples": 5, "search": {"penalty": [0.0, 1000.0]}}


@pytest.fixture(scope="module", autouse=True)
def forgotten() -> Iterator[None]:
    """What a params.yaml of these tests defines is no method of others' tests."""
    learned_methods()  # Mergeline's own stay
    with patch.dict(contract.LEARNED):
        yield


class Weight(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(WIDTH), requires_grad=False)


class LearningToy(Toy):
    """Its features are the differences from points; half of val stands for examples to fit to."""

    @property
    def network(self) -> Any:
        def run(module: Any, batch: Any) -> torch.Tensor:
            return batch["points"] - module.w

        return lambda params, build, like: Network(Weight(), run)

    @property
    def examples(self) -> Any:
        def examples(params: Params, build: Path, split: str = "fit") -> Examples:
            def batches(task: str) -> Any:
                points = load_file(build / "targets" / f"{task}.safetensors")
                own = points["test"] if split == "test" else points["val"][::2]
                return lambda: [{"task": task, "points": torch.from_numpy(own).float()}]

            counts = dict.fromkeys(TASKS, N if split == "test" else N // 2)
            digests = dict.fromkeys(TASKS, "sha256:0")
            return Examples({t: batches(t) for t in TASKS}, counts, params.owners, digests, split)

        return examples

    def choosing(self, build: Path, task: str) -> slice:
        return slice(1, None, 2)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace in which nothing has run, as the current folder."""
    monkeypatch.setattr(modalities, "_KNOWN", modalities.modalities())
    modalities.register(LearningToy())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    half = np.array([0.5, 0.5, -0.5, -0.5], np.float32)
    for name, weight in {"base": 0 * half, "left": half, "right": -0.9 * half}.items():
        save_file({"w": weight + np.float32(0.5)}, tmp_path / "in" / f"{name}.safetensors")
    write(tmp_path)
    return tmp_path


def write(root: Path, **near: Any) -> None:
    merges = {"average": {"method": "average"}, "near": {**NEAR, **near}}
    text = json.dumps({**PARAMS, "gates": {}, "methods": [METHODS], "merges": merges})  # JSON is YAML
    (root / "params.yaml").write_text(text)


def run_step(root: Path, step: str) -> None:
    workspace = Workspace(root / "params.yaml")
    for stage in workspace.select(step, None):
        workspace.run(stage)


def fits(root: Path) -> dict[str, Path]:
    """The folder of each point by its penalty."""
    listed = json.loads((root / "build/fits/near/points.json").read_text())["points"]
    return {point["params"]["penalty"]: root / "build/fits/near" / point["folder"] for point in listed}


def test_a_learned_merge_is_fitted_at_every_point_and_the_best_one_is_merged(root):
    workspace = run_all(root)
    search = json.loads(Path("build/search/near.json").read_text())
    assert [point["params"] for point in search["points"]] == [{"penalty": 0.0}, {"penalty": 1000.0}]
    assert search["chosen"] == max(search["points"], key=lambda point: point["mean"])["params"]
    assert len(fits(root)) == 2 and not list(Path("build/fits/average").glob("*/"))
    manifest = read_manifest(Path("build/merges/near"))
    fitted = fitted_recipe(Path("build/fits/near"), search["chosen"])
    assert fitted and manifest["recipe"]["params"]["scale"] == fitted["params"]["scale"]
    expected = {"method": "nearest_scale", "params": search["chosen"], "data": "unlabelled", "split": "fit"}
    seen = manifest["recipe"]["fitted"]
    assert expected.items() <= seen.items() and seen["examples"] == dict.fromkeys(TASKS, 5)
    assert "Fitted by nearest_scale to data: 5 unlabelled a task of fit" in Path(
        "build/merges/near/README.md"
    ).read_text().replace("&#95;", "_")
    assert "bit-identical" in verify(Path("build/merges/near"))
    found = rows(root)
    assert found["near"]["method"] == "nearest_scale"
    assert found["near"]["seen"]["words"] == "5 unlabelled a task of fit"
    assert found["average"]["seen"] == {"data": "none", "words": "none"} and "seen" not in found["base"]
    assert "5 unlabelled a task of fit" in write_report(workspace).read_text()


def test_examples_that_were_fitted_choose_nothing(root):
    run_all(root)

    def choosing(model: Path) -> float:
        weight = load_file(model / "model.safetensors")["w"]
        points = (load_file(f"build/targets/{task}.safetensors")["val"][1::2] for task in TASKS)
        return float(np.mean([-np.square(weight - own).sum(1).mean() for own in points]))

    found = rows(root)
    for name in ("near", "average"):  # merges are compared by the same examples
        assert found[name]["val_mean"] == pytest.approx(choosing(Path("build/merges") / name), rel=1e-5)
    search = json.loads(Path("build/search/near.json").read_text())
    best = max(point["mean"] for point in search["points"])
    assert best == pytest.approx(found["near"]["val_mean"], rel=1e-5)


def test_points_that_are_fitted_stay_and_others_go(root):
    for step in ("fetch", "targets", "fit"):
        run_step(root, step)
    before = {penalty: (folder / "fit.json").stat().st_mtime_ns for penalty, folder in fits(root).items()}
    gone = fits(root)[1000.0]
    write(root, search={"penalty": [0.0, 2.0]})
    run_step(root, "fit")
    after = fits(root)
    assert list(after) == [0.0, 2.0] and not gone.exists()
    assert (after[0.0] / "fit.json").stat().st_mtime_ns == before[0.0]


def test_a_fit_that_was_killed_goes_on_and_gives_the_same(root, monkeypatch):
    for step in ("fetch", "targets", "fit"):
        run_step(root, step)
    whole = {penalty: (folder / "fit.json").read_bytes() for penalty, folder in fits(root).items()}
    for after in range(4):
        for folder in fits(root).values():
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
        with monkeypatch.context() as patch:
            patch.setenv("STOP_AFTER", str(after))
            killed = get_context("fork").Process(target=run_step, args=(root, "fit"))
            killed.start()
            killed.join()
        assert killed.exitcode == -9
        [left] = [folder for folder in fits(root).values() if folder.exists()]
        steps = (left / "steps.txt").read_text()
        assert len(steps.splitlines()) == after + 1 and not (left / "fit.json").exists()
        (left / "steps.txt").write_text(
            steps.replace(steps.splitlines()[0], "7.0", 1)
        )  # to tell who wrote it
        run_step(root, "fit")
        assert (left / "steps.txt").read_text().startswith("7.0")
        assert {p: (f / "fit.json").read_bytes() for p, f in fits(root).items()} == whole


def test_what_another_fit_left_is_not_gone_on_with(root):
    for step in ("fetch", "targets", "fit"):
        run_step(root, step)
    folder = fits(root)[0.0]
    write(root, examples=6)  # the same point, other examples
    (folder / "steps.txt").write_text("0.0\n" * 4)
    run_step(root, "fit")
    assert (folder / "steps.txt").read_text() != "0.0\n" * 4
    assert json.loads((folder / "fit.json").read_text())["facts"]["seen"]["examples"]["left"] == 6


def test_test_examples_are_fitted_to_only_where_they_are_asked_for(root):
    write(root, split="test")
    run_all(root)
    seen = rows(root)["near"]["seen"]
    assert seen["split"] == "test" and seen["words"].endswith("of test")
    workspace = Workspace(root / "params.yaml")
    params, build = workspace.params, Path("build")
    examples = examples_of(workspace.modality, params, build, split="test")
    network = workspace.modality.network(params, build, build / "checkpoints/base")  # type: ignore[misc]
    experts = {t: build / "checkpoints" / t for t in TASKS}
    recipe = {"method": "nearest_scale", "base": build / "checkpoints/base", "experts": experts}
    with refused("test examples, which then report nothing"):
        fit(recipe, network, examples, root / "fitted")
    assert not (root / "fitted").exists()


def test_mistakes_are_blamed_by_line(root):
    for near, expected in (
        ({"method": "nearest_scal"}, "did you mean 'nearest_scale'?"),
        ({"search": {"penaltee": [1.0]}}, "unknown parameter 'penaltee'"),
        ({"images": 3}, "images are the examples"),
        ({"examples": 0}, "must be more than 0"),
        ({"split": "val"}, "'fit'"),
        ({"method": "average", "search": {}}, "average is fitted to no examples; leave 'examples' out"),
    ):
        write(root, **near)
        with refused("params.yaml:", expected):
            Workspace(root / "params.yaml").params  # noqa: B018


def test_models_that_cannot_be_run_cannot_be_fitted(root):
    for step in ("fetch", "targets"):
        run_step(root, step)
    workspace = Workspace(root / "params.yaml")
    with refused("toys with targets cannot be fitted"):
        fit_recipe(
            Toy(), workspace.params, Path("build"), {"method": "nearest_scale", "experts": {}}, root / "out"
        )


def test_the_command_line_fits_a_recipe_to_the_examples_of_a_pipeline(root, mergeline):
    for step in ("fetch", "targets", "baselines"):
        run_step(root, step)
    experts = {task: f"in/{task}.safetensors" for task in TASKS}
    recipe = {
        "method": "nearest_scale",
        "base": "in/base.safetensors",
        "experts": experts,
        "methods": [METHODS],
    }
    (root / "r.yaml").write_text(json.dumps(recipe))
    command = ("--params", root / "params.yaml", "--recipe", root / "r.yaml", "--examples", 4)
    found = mergeline("fit", *command, "--out", root / "fitted")
    assert found.code == 0 and "4 unlabelled a task of fit" in found.out, found.err
    merged = mergeline("merge", "--recipe", root / "fitted/recipe.yaml", "--out", root / "merged")
    assert merged.code == 0, merged.err
    assert read_manifest(root / "merged")["recipe"]["fitted"]["examples"] == dict.fromkeys(TASKS, 4)
    refusal = mergeline("fit", *command)
    assert refusal.code == 2 and "--recipe and --out together" in refusal.err


@pytest.mark.parametrize(
    ("method", "change", "expected"),
    [
        ("atlas", {}, "atlas is fitted to labels, and the examples have none"),
        ("nearest_scale", {"counts": {"left": 0, "right": 4}}, "'left' has no examples of its own task"),
        ("nearest_scale", {"owners": {"right": "right"}}, "'left' has no examples of its own task"),
        ("nearest_scale", {"split": "test"}, "would be fitted to test examples"),
    ],
)
def test_examples_of_no_use_end_the_command_in_a_line(method, change, expected, root, mergeline, monkeypatch):
    for step in ("fetch", "targets"):
        run_step(root, step)
    given = LearningToy.examples.fget
    assert given is not None
    changed = property(lambda self: lambda *a, **k: replace(given(self)(*a, **k), **change))
    monkeypatch.setattr(LearningToy, "examples", changed)
    experts = {task: f"in/{task}.safetensors" for task in TASKS}
    recipe = {"method": method, "base": "in/base.safetensors", "experts": experts, "methods": [METHODS]}
    (root / "r.yaml").write_text(json.dumps(recipe))
    command = ("--params", root / "params.yaml", "--recipe", root / "r.yaml", "--out", root / "fitted")
    found = mergeline("fit", *command)
    assert (found.code, len(found.err.splitlines())) == (2, 1) and expected in found.err
    assert not (root / "fitted").exists()


def test_a_split_whose_only_example_was_fitted_chooses_nothing(root, monkeypatch):
    monkeypatch.setattr(LearningToy, "choosing", lambda self, build, task: slice(N, None))
    with refused("'left' has", "none to choose by", "bring more"):
        run_all(root)


def test_merge_says_that_a_learned_method_is_fitted_first(root, mergeline):
    family = ("--base", "in/base.safetensors", "--expert", "left=in/left.safetensors", "--methods", METHODS)
    found = mergeline("merge", "--method", "nearest_scale", *family, "--out", "merged")
    assert found.code == 2 and len(found.err.splitlines()) == 1
    assert "nearest_scale is fitted to examples first" in found.err and "mergeline fit" in found.err
    assert not (root / "merged").exists()


def test_methods_says_what_a_learned_one_looks_at(root, mergeline):
    listed = mergeline("methods", "--methods", METHODS)
    assert "learned" in listed.out or "outside" in listed.out
    assert "base, examples, unlabelled" in listed.out
    page = mergeline("methods", "nearest_scale").out
    assert "the base; examples, unlabelled" in page and "Four scales are tried" in page
    found = json.loads(mergeline("methods", "nearest_scale", "--json").out)
    assert found[0]["data"] == "unlabelled" and found[0]["schema"]["penalty"]["default"] == 0.0
