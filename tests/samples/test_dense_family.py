"""The dense family: what is drawn is true of its pixels, and a small variant goes through the pipeline."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest
from places import SAMPLES
from safetensors.numpy import load_file

from mergeline.tasks.workspace import Workspace

sys.path.insert(0, str(SAMPLES))
from make import dense_scenes  # noqa: E402


def test_scenes_are_the_same_every_time_and_splits_differ():
    first, again, other = (dense_scenes.scenes(3, "depth", split) for split in ("val", "val", "test"))
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not np.array_equal(first.images, other.images)


def test_what_is_drawn_is_true_of_every_pixel():
    found = dense_scenes.scenes(60, "x")
    assert set(np.unique(found.labels)) == set(range(len(dense_scenes.LABELS)))
    assert (
        np.allclose(np.linalg.norm(found.normals, axis=-1), 1, atol=1e-5)
        and (found.normals[..., 2] > 0).all()
    )
    assert (found.distances > 0).all()
    wall = found.labels == 0
    assert found.distances[wall].min() > found.distances[~wall].mean()
    # Flat faces: a box faces one way, and so does the wall of a scene.
    for labels, normals in zip(found.labels, found.normals):
        assert np.ptp(normals[labels == 0], axis=0).max() < 1e-6
        box = normals[labels == 2]
        assert not box.size or np.allclose(box, [0, 0, 1])
    error = (found.noisy.astype(float) - found.images)[(found.images > 100) & (found.images < 150)] / 255
    assert error.std() == pytest.approx(0.12, rel=0.1)


@pytest.mark.slow
def test_a_dense_family_of_few_steps_goes_through_the_pipeline(tmp_path, monkeypatch):
    from make import dense_family as family

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(family, "TRAINED", 40)
    made, small = tmp_path / "family", {**family.CONFIG, "depths": [1, 1], "hidden_sizes": [8, 16]}
    family.write_data(made / "data", val=6, test=8)
    assert family.write_base(made / "base", steps=8, config=small).startswith("base: loss")
    for name in family.TASKS:
        family.write_expert(name, made / "base", made / name, steps=3)
    first = (made / "depth/model.safetensors").read_bytes()
    family.write_expert("depth", made / "base", made / "depth", steps=3)
    assert (made / "depth/model.safetensors").read_bytes() == first

    shutil.copy(SAMPLES / "dense_prediction/params.yaml", tmp_path)
    workspace = Workspace(tmp_path / "params.yaml")
    for stage in workspace.stages:
        workspace.run(stage)
    for name in workspace.params.merges:
        kept = load_file(tmp_path / "build/evaluations" / name / "predictions.safetensors")
        assert kept["test/segmentation"].shape == (8, 5, 2) and kept["test/normals"].shape == (8,)
