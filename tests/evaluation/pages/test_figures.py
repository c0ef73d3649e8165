"""Pictures, and the curves behind them."""

import os

import pytest
from made_up_results import made_up, search

from mergeline.evaluation.pages.figures import curve, draw_all, searched
from mergeline.merging.errors import UserError


def test_every_picture_is_drawn_with_the_same_bytes_again(tmp_path):
    first = draw_all(tmp_path / "a", **made_up())
    second = draw_all(tmp_path / "b", **made_up())
    assert [path.name for path in first] == [
        "heatmap.png",
        "leaderboard.png",
        "rank_curve.png",
        "scale_curve.png",
        "similarity.png",
    ]
    for a, b in zip(first, second):
        assert a.read_bytes().startswith(b"\x89PNG") and a.read_bytes() == b.read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [path.name for path in first]


def test_pictures_without_content_are_left_out_and_old_ones_removed(tmp_path):
    draw_all(tmp_path, **made_up())
    drawn = draw_all(tmp_path, **made_up(tasks=("digits",), merges=("average",)))
    assert [path.name for path in drawn] == sorted(os.listdir(tmp_path)) == ["heatmap.png", "leaderboard.png"]


@pytest.mark.parametrize("tasks", [("only",), tuple(f"task-{i}" for i in range(20))])
def test_names_that_mean_something_to_matplotlib_are_drawn_as_they_are(tmp_path, tasks):
    merges = ("$\\frac{", "_hidden", "cart", "long" * 40)
    assert draw_all(tmp_path, **made_up(tasks, merges, experts=tasks[:1]))


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="heatmap.png: cannot be written"):
        draw_all(tmp_path / "file", **made_up())
    assert os.listdir(tmp_path) == ["file"]


def test_a_curve_takes_the_best_over_other_parameters():
    found = curve(search("cart"), "rank")
    assert [rank for rank, _ in found.best] == [0.04, 0.16, 0.64]
    assert [mean for _, mean in found.best] == pytest.approx([0.688, 0.7, 0.652])
    assert found.other == "scale" and list(found.lines) == ["1", "2"]
    assert found.lines["2"] == found.best and found.chosen == (0.16, found.best[1][1])
    assert curve(search("ties"), "scale").lines == {}


def test_only_numbers_that_varied_have_a_curve():
    values = [{"mode": "a", "scale": 1, "weights": [1, 2]}, {"mode": "b", "scale": 1, "weights": [2, 1]}]
    found = {"points": [{"params": v, "mean": 0.5} for v in values], "chosen": values[0]}
    assert searched(found) == ["mode", "weights"]
    assert [curve(found, name) for name in ("mode", "scale", "weights", "rank")] == [None] * 4
    assert curve({"points": [], "chosen": {}}, "scale") is None
