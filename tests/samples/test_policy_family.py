"""The family of policies: its controllers and trajectories, and the training of its models in a small variant."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest
from places import SAMPLES
from safetensors.numpy import load_file

pytest.importorskip("gymnasium")

from mergeline.evaluation.policies.environments import look_at  # noqa: E402
from mergeline.evaluation.policies.settings import Episodes, Task  # noqa: E402
from mergeline.evaluation.policies.trajectories import read_trajectories  # noqa: E402
from mergeline.tasks.workspace import Workspace  # noqa: E402

sys.path.insert(0, str(SAMPLES))
from make import policy_tasks  # noqa: E402


@pytest.mark.parametrize("name", policy_tasks.TASKS)
def test_controllers_reach_their_targets_and_with_noise_they_do_worse(name):
    control = policy_tasks.TASKS[name]
    sure, noisy = (policy_tasks.trajectories(name, 12, noise=noise) for noise in (0.0, 2.0))
    lost = control.target - control.floor
    assert sure.returns.mean() > control.target - 0.2 * lost
    assert noisy.returns.mean() < sure.returns.mean() - 0.2 * lost
    again = policy_tasks.trajectories(name, 2, noise=0.0)
    assert all((array[:2] == again.arrays[key]).all() for key, array in sure.arrays.items())


@pytest.mark.parametrize("name", policy_tasks.TASKS)
def test_trajectories_are_of_seeds_that_measure_nothing_and_files_hold_them(name, tmp_path):
    control = policy_tasks.TASKS[name]
    assert policy_tasks.SEEDS >= Episodes(test=1_000_000).seeds("test").stop
    found = policy_tasks.trajectories(name, 2)
    np.savez(tmp_path / "some.npz", **found.arrays)
    task = Task(
        environment=control.environment,
        target_return=control.target,
        floor=control.floor,
        max_steps=policy_tasks.STEPS,
    )
    read = read_trajectories(tmp_path / "some.npz", look_at(task))
    assert read["mask"].sum() == found.mask.sum()


@pytest.mark.slow
def test_a_family_of_few_steps_goes_through_the_pipeline(tmp_path, monkeypatch):
    from make import policy_family as family

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(family, "EPISODES", 3)
    monkeypatch.setattr(policy_tasks, "STEPS", 20)
    monkeypatch.setattr(family, "STEPS", 20)
    family.known.cache_clear()
    made = tmp_path / "family"
    family.write_trajectories(made / "trajectories")
    family.write_base(made / "base", steps=2, config={**family.CONFIG, "hidden_size": 16})
    for name in policy_tasks.TASKS:
        family.write_expert(name, made / "base", made / name, steps=2)
    first = (made / "car/model.safetensors").read_bytes()
    family.write_expert("car", made / "base", made / "car", steps=2)
    assert (made / "car/model.safetensors").read_bytes() == first

    text = (SAMPLES / "policies/params.yaml").read_text().replace("max_steps: 200", "max_steps: 20")
    (tmp_path / "params.yaml").write_text(text.replace("val: 20, test: 60", "val: 2, test: 3"))
    workspace = Workspace(tmp_path / "params.yaml")
    for stage in workspace.stages:
        workspace.run(stage)
    shutil.rmtree(made)
    for name in workspace.params.merges:
        kept = load_file(tmp_path / "build/evaluations" / name / "predictions.safetensors")
        assert kept["test/pendulum"].shape == (3, 3) and kept["val/cartpole"].shape == (2, 3), name
    family.known.cache_clear()
