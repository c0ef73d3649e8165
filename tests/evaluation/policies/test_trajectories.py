"""Files of trajectories: what is believed of them, and how they are cut into windows."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import refused
from small_policies import trajectories

from mergeline.evaluation.policies.environments import Facts
from mergeline.evaluation.policies.trajectories import NAMES, read_trajectories, windows

DISCRETE, NUMBERS = Facts(2, 3, True, 0, 9), Facts(2, 3, False, 0, 9)


def test_actions_are_one_hot_or_numbers_and_nothing_is_left_where_no_step_counts(tmp_path):
    for facts in (DISCRETE, NUMBERS):
        given = trajectories(2, 3, facts.discrete)
        given["observations"][-1, 1:] = np.nan
        np.savez(tmp_path / "some.npz", **given)
        read = read_trajectories(tmp_path / "some.npz", facts)
        mask = given["mask"]
        wanted = np.eye(3)[given["actions"]] if facts.discrete else given["actions"]
        np.testing.assert_array_equal(read["actions"][mask], wanted[mask].astype(np.float32))
        assert {*read} == {*NAMES} and not any(array[~mask].any() for array in read.values())
        assert read["actions"].shape == (3, 7, 3) and read["timesteps"].dtype == np.int64


def test_windows_follow_one_another_and_those_without_a_step_are_left_out(tmp_path):
    np.savez(tmp_path / "some.npz", **trajectories(2, 3, True))
    read = read_trajectories(tmp_path / "some.npz", DISCRETE)
    found = windows(read, 3)
    # Of 7 steps each there are three windows, of the last trajectory, which has one step, one.
    assert found["observations"].shape == (7, 3, 2) and found["mask"].sum(1).tolist() == [3, 3, 1, 3, 3, 1, 1]
    np.testing.assert_array_equal(found["observations"][1], read["observations"][0, 3:6])
    assert found["timesteps"][2].tolist() == [6, 0, 0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mask": None}, "has no array 'mask'; trajectories have observations, actions"),
        (
            {"observations": np.zeros((3, 7, 5))},
            "observations are (3, 7, 5); N trajectories of T steps have (N, T, 2)",
        ),
        ({"observations": np.full((3, 7, 2), np.inf)}, "observations have NaN or Inf"),
        ({"returns_to_go": np.zeros((3, 6))}, "returns_to_go are (3, 6), and must be (3, 7)"),
        ({"actions": np.full((3, 7), 3)}, "actions must be whole numbers from 0 to 2"),
        ({"actions": np.zeros((3, 7))}, "actions must be whole numbers from 0 to 2"),
        ({"timesteps": np.full((3, 7), -1)}, "timesteps must be whole numbers from 0 to "),
        ({"actions": np.array([["a"] * 7] * 3)}, "actions are no numbers"),
        ({"actions": np.array([[{}] * 7] * 3)}, "no file of trajectories (Object arrays cannot be loaded"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, changes, said):
    arrays = {**trajectories(2, 3, True), **changes}
    np.savez(tmp_path / "some.npz", **{name: array for name, array in arrays.items() if array is not None})
    with refused(f"{tmp_path}/some.npz: {said}"):
        read_trajectories(tmp_path / "some.npz", DISCRETE)


def test_what_is_no_file_of_arrays_is_refused(tmp_path):
    with refused("none.npz: no such file"):
        read_trajectories(tmp_path / "none.npz", DISCRETE)
    (tmp_path / "text.npz").write_text("nothing")
    with refused("text.npz: no file of trajectories"):
        read_trajectories(tmp_path / "text.npz", DISCRETE)
