"""The families of classifiers: their images, and a small variant of them through the whole pipeline."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from places import SAMPLES
from ruamel.yaml import YAML
from toy_workspace import run_all

sys.path.insert(0, str(SAMPLES))
from make import classifier_tasks  # noqa: E402


@pytest.mark.parametrize("task", classifier_tasks.TASKS)
def test_images_of_a_task_can_be_told_apart_and_are_the_same_every_time(task, monkeypatch):
    monkeypatch.setattr(classifier_tasks, "_SIZES", {"train": 240, "val": 24, "test": 24, "fit": 24})
    arrays, again = classifier_tasks.task_arrays(task), classifier_tasks.task_arrays(task)
    assert all(np.array_equal(array, again[name]) for name, array in arrays.items())
    x, y = arrays["train_x"].astype(float), arrays["train_y"]
    assert set(y) == set(range(y.max() + 1)) and set(arrays["test_y"]) <= set(y)
    assert x.std(axis=(1, 2, 3)).min() > 15, "something is to be seen on every image"
    pixels = {image.tobytes() for name in arrays if name.endswith("_x") for image in arrays[name]}
    assert len(pixels) == sum(len(arrays[name]) for name in arrays if name.endswith("_x"))


@pytest.mark.slow
def test_families_of_few_steps_go_through_the_pipeline(tmp_path, monkeypatch):
    script = [sys.executable, str(SAMPLES / "make_classifiers.py"), str(tmp_path), "--share", "0.2"]
    subprocess.run(script, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for kind in ("vit", "resnet"):
        root = tmp_path / kind
        shutil.copyfile(SAMPLES / "classifiers" / kind / "params.yaml", root / "params.yaml")
        params = YAML(typ="safe").load(root / "params.yaml")
        reset = {"method": "reset_batch_norm", "images": 32}
        solved = {"method": "progressive_least_squares", "images": 16}
        params["merges"] = {
            "average": {"method": "average"},
            "cart": {"method": "cart", "params": {"rank": 0.16}, "search": {"scale": [1.0, 2.0]}},
            "solved": solved,
            **({"reset": reset} if kind == "resnet" else {}),
        }
        with open(root / "params.yaml", "w") as file:
            YAML().dump(params, file)
        monkeypatch.chdir(root)
        run_all(root)
        board = json.loads((root / "build/leaderboard/leaderboard.json").read_text())
        rows = {row["name"]: row for row in board["rows"]}
        assert rows["experts"]["mean"] > rows["base"]["mean"] + 0.1
        assert rows["solved"]["mean"] > rows["average"]["mean"]
        if kind == "resnet":
            assert rows["reset"]["mean"] != rows["average"]["mean"]
            assert "32 unlabelled" in rows["reset"]["seen"]["words"]
