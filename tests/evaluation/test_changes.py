"""What changed from one run to the next."""

from __future__ import annotations

import numpy as np
import pytest
from made_up_results import made_up

from mergeline.evaluation.changes import changes
from mergeline.evaluation.metrics import paired


def outcomes(right: int, n: int = 400) -> dict[str, np.ndarray]:
    return {task: (np.arange(n) < right).astype(float) for task in ("digits", "shapes")}


@pytest.fixture
def boards() -> tuple[dict, dict]:
    """Now and before: cart was searched on, ties is as it was, average came, slerp went, an expert is another one."""
    now, before = made_up()["leaderboard"], made_up(merges=("slerp", "ties", "cart"))["leaderboard"]
    for board, mean in ((now, 0.75), (before, 0.5)):
        rows = {row["name"]: row for row in board["rows"]}
        rows["cart"]["mean"] = mean
        rows["ties"] |= {"mean": 0.4, "tasks": {}, "digest": "sha256:ties"}
    before["candidate"] = "slerp"
    before["lineage"]["experts"]["digits"]["digest"] = "sha256:other"
    return now, before


def test_what_came_went_and_stayed(boards):
    found = changes(*boards, lambda name: outcomes(300), lambda name: outcomes(200))
    assert found["candidates"] == ["slerp", "cart"]
    assert (found["added"], found["removed"], found["same"]) == (["average"], ["slerp"], ["ties"])
    assert found["inputs"] == ["digits"]
    (cart,) = found["merges"]
    assert cart["name"] == "cart" and cart["means"] == [0.5, 0.75]


def test_scores_are_compared_example_by_example_now_minus_before(boards):
    found = changes(*boards, lambda name: outcomes(300), lambda name: outcomes(200))
    (cart,) = found["merges"]
    assert cart["pair"] == paired(outcomes(300), outcomes(200))._asdict()
    assert cart["pair"]["difference"] == 0.25 and cart["pair"]["lower"] > 0


@pytest.mark.parametrize("earlier", [{}, outcomes(200, n=300)], ids=["other tasks", "other examples"])
def test_what_was_measured_on_other_examples_is_not_compared(earlier, boards):
    found = changes(*boards, lambda name: outcomes(300), lambda name: earlier)
    assert found["merges"][0]["pair"] is None
    assert changes(*boards, lambda name: {}, lambda name: {})["merges"][0]["pair"] is None
