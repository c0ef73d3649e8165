"""The run before: kept when another is published, and still the one before when nothing changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from judged_workspace import JudgedWorkspace, N

from mergeline.tasks import history
from mergeline.tasks.history import keep, since_before


@pytest.fixture
def workspace(tmp_path: Path) -> JudgedWorkspace:
    workspace = JudgedWorkspace(tmp_path)
    workspace.add("ties", {"digits": 200, "shapes": 200})
    return workspace


def test_the_first_run_has_none_before_it(workspace):
    assert since_before(workspace.root) is None
    keep(workspace.root)
    assert since_before(workspace.root) is None


def test_a_run_is_compared_with_the_one_before_it_however_often_it_is_published(workspace):
    keep(workspace.root)
    workspace.add("ties", {"digits": 300, "shapes": 200})
    expected = since_before(workspace.root)  # results that are not published yet
    (ties,) = expected["merges"]
    assert ties["pair"]["difference"] == pytest.approx(100 / N / 2) and ties["pair"]["p"] < 1e-9
    for _ in range(2):
        keep(workspace.root)
        assert since_before(workspace.root) == expected


def test_predictions_of_merges_that_were_overwritten_are_still_there(workspace):
    workspace.add("cart", {"digits": 250, "shapes": 250})
    keep(workspace.root)
    workspace.remove("cart")
    keep(workspace.root)
    shutil.rmtree(workspace.root / "build/evaluations/cart")
    workspace.add("cart", {"digits": 250, "shapes": 300})
    keep(workspace.root)
    assert since_before(workspace.root)["added"] == ["cart"]
    workspace.add("cart", {"digits": 260, "shapes": 300})
    keep(workspace.root)
    (cart,) = since_before(workspace.root)["merges"]
    assert cart["pair"]["difference"] == pytest.approx(10 / N / 2)


def test_other_data_are_not_compared(workspace):
    keep(workspace.root)
    workspace.change_data()
    workspace.add("ties", {"digits": 300, "shapes": 200})
    (ties,) = since_before(workspace.root)["merges"]
    assert ties["pair"] is None and ties["means"] == [0.5, 0.625]


def test_a_kill_between_the_two_loses_neither(workspace, monkeypatch):
    keep(workspace.root)
    workspace.add("ties", {"digits": 300, "shapes": 200})

    def killed(partial: Path, out: Path) -> None:
        os.rename(partial, out)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(history, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            keep(workspace.root)
    expected = since_before(workspace.root)
    assert [merge["name"] for merge in expected["merges"]] == ["ties"]
    keep(workspace.root)
    assert since_before(workspace.root) == expected
