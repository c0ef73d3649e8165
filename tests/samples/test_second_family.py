import sys
from pathlib import Path

import numpy as np
import pytest

SAMPLES = Path(__file__).parents[2] / "samples"
SIZES = {"train": 60, "val": 24, "test": 24, "fit": 24}


@pytest.fixture(autouse=True)
def programs(monkeypatch):
    """What makes the samples is no part of the package."""
    monkeypatch.syspath_prepend(str(SAMPLES))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "make"]:
        del sys.modules[name]


@pytest.mark.parametrize("task", ["counts", "directions", "segments", "polygons"])
def test_a_task_of_the_second_family_is_drawn_the_same_each_time_with_no_picture_in_two_splits(task):
    from make.catalogue import CLASSNAMES
    from make.second_tasks import task_arrays

    first, second = task_arrays(task, SIZES), task_arrays(task, SIZES)
    assert {name: array.tobytes() for name, array in first.items()} == {
        name: array.tobytes() for name, array in second.items()
    }
    assert "fit_y" not in first and set(first["train_y"]) == set(range(len(CLASSNAMES[task])))
    pictures = [
        picture.tobytes() for name, array in first.items() if name.endswith("_x") for picture in array
    ]
    assert len(set(pictures)) == sum(SIZES.values())
    assert first["test_x"].shape == (24, 36, 36, 3) and first["test_x"].dtype == np.uint8


def test_classes_of_figures_differ_in_what_is_drawn():
    """Seven segments show each digit by others, and polygons have as many corners as their names say."""
    from make import figures, segments

    assert len(set(segments._LIT)) == 10
    assert {name: corners for name, (corners, _) in figures._REGULAR.items()} == {
        "triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6, "octagon": 8,
        "five-pointed star": 5, "six-pointed star": 6, "eight-pointed star": 8,
    }  # fmt: skip


def test_the_suite_of_the_second_family_names_its_tasks_and_their_classes(tmp_path):
    from make.catalogue import CLASSNAMES, SECOND_TASKS
    from make.packaging import _suite

    from mergeline.evaluation.clip.suite import load_suite

    (tmp_path / "suite.yaml").write_text(_suite(SECOND_TASKS))
    suite = load_suite(tmp_path / "suite.yaml")
    assert {task: list(suite.tasks[task].classnames) for task in SECOND_TASKS} == {
        task: CLASSNAMES[task] for task in SECOND_TASKS
    }
