"""The texts of the text classifiers: labels are right, and no text of a split is in another."""

from __future__ import annotations

import sys

import pytest
from places import SAMPLES

sys.path.insert(0, str(SAMPLES))
from make import text_classifier_family as family  # noqa: E402


@pytest.mark.parametrize("task", family.TASKS)
def test_splits_share_no_text_and_every_class_is_trained(task):
    rows = {split: list(family.TASKS[task](split)) for split in family.SPLITS}
    assert rows == {split: list(family.TASKS[task](split)) for split in family.SPLITS}
    assert len(rows["test"]) == 300 and len(rows["train"]) > 1000
    trained = {row["text"] for row in rows["train"]}
    tested = [row["text"] for row in rows["test"]]
    assert sum(text in trained for text in tested) < len(tested) / 5
    assert {row["label"] for row in rows["test"]} <= {row["label"] for row in rows["train"]}


def test_labels_are_right():
    parity = {row["text"]: row["label"] for row in family.TASKS["parity"]("test")}
    assert all((label == "odd") == text.endswith(ODD) for text, label in parity.items())
    for row in family.TASKS["larger"]("test"):
        assert (family._NUMBERS[row["text"]] > int(row["pair"])) == (row["label"] == "larger")
    months = list(family.TASKS["months"]("test"))
    said = [row for row in months if any(month in row["text"] for month in MONTHS)]
    assert len(said) > 100
    assert all(MONTHS[row["label"]] in row["text"] for row in said)
    places = {row["text"]: row["label"] for row in family.TASKS["places"]("test")}
    assert places["Áustria"] == "territories" and set(places.values()) == {"territories", "languages"}


ODD = ("one", "three", "five", "seven", "nine", "eleven", "thirteen", "fifteen", "seventeen", "nineteen")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
