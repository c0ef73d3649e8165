"""Models as learners see them: what they compute is what the evaluator measures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from prepared_workspace import prepared
from ruamel.yaml import YAML
from safetensors.torch import load_file

from mergeline.evaluation.clip.zero_shot import Evaluator
from mergeline.evaluation.datasets import load
from mergeline.evaluation.splits import FIT
from mergeline.merging import merge
from mergeline.merging.recipes.recipe import Recipe
from mergeline.tasks.clip import places
from mergeline.tasks.data_step import dataset
from mergeline.tasks.fit import fit_merge, fitted_recipe
from mergeline.tasks.modalities import modality_of


def test_a_network_predicts_what_the_evaluator_does(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    params, build = prepared(workspace).params, Path("build")
    modality = modality_of(params)
    network, examples = (
        modality.network(params, build, build / "checkpoints/base"),
        modality.examples(params, build),
    )
    state = load_file(build / "checkpoints/digits")
    network.load(state)
    data = {task: load(dataset(build, task)) for task in params.tasks}
    evaluator = Evaluator(build / "checkpoints/base", load_file(places.heads(build)), data)
    for task in params.tasks:
        x, y = data[task].split(FIT)
        assert (y == -1).all() and not examples.labelled
        with torch.inference_mode():
            found = [network.logits(network.features(batch), task).argmax(1) for batch in examples.of(task)]
        assert sum(map(len, found)) == examples.count(task) == len(x) == 400
        expected = evaluator.predict(state, FIT, [task])[task]
        assert np.array_equal(torch.cat(found), expected)


@pytest.mark.slow
def test_a_merge_of_the_pipeline_runs_on_drawn_images_where_data_are_to_have_no_say(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    file = YAML().load(workspace / "params.yaml")
    own = {"inner": "average", "pool": 60, "chosen": 12, "ridge": 1.0}
    file["merges"] = {"dataless": {"method": "dataless_least_squares", "params": own}}
    YAML().dump(file, workspace / "params.yaml")
    params, build = prepared(workspace).params, Path("build")
    fits = build / "fits/dataless"
    fit_merge(modality_of(params), params, "dataless", build, fits)
    [point] = params.merges["dataless"].points
    found = fitted_recipe(fits, point)
    assert found is not None and "examples" not in {k for k, v in found["fitted"].items() if v}
    recipe = Recipe.of(found)
    assert recipe.fitted is not None and recipe.fitted.words == "no data; procedural images"
    merge(recipe, "merged.safetensors")
    merge({**found, "method": "average", "params": {}, "statistics": {}, "fitted": None}, "start.safetensors")
    data = {task: load(dataset(build, task)) for task in params.tasks}
    evaluator = Evaluator(build / "checkpoints/base", load_file(places.heads(build)), data)
    right = {
        name: np.mean(
            [
                (evaluator.predict(load_file(name), "val", [task])[task] == data[task].split("val")[1]).mean()
                for task in params.tasks
            ]
        )
        for name in ("start.safetensors", "merged.safetensors")
    }
    assert right["merged.safetensors"] > right["start.safetensors"]


def test_what_a_fit_has_to_say_is_printed_as_a_note(workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    file = YAML().load(workspace / "params.yaml")
    own = {"inner": "average", "iterations": 1, "shifts": 0}
    file["merges"] = {"distilled": {"method": "distill", "images": 16, "params": own}}
    arrays = dict(np.load(file["datasets"]["files"]["digits"]))
    arrays["fit_x"][:] = arrays["fit_x"][0]
    np.savez(workspace / "one.npz", **arrays)
    file["datasets"]["files"]["digits"] = "one.npz"
    YAML().dump(file, workspace / "params.yaml")
    params, build = prepared(workspace).params, Path("build")
    for _ in range(2):  # of a fit that was done before, too
        capsys.readouterr()
        fit_merge(modality_of(params), params, "distilled", build, build / "fits/distilled")
        said = capsys.readouterr().err
        assert said.startswith("note: distill: the expert of 'digits' takes all 16 examples for class ")
        assert said.count("\n") == 1
