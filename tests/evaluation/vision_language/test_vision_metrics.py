"""Scores of what models write to images, beside values that are worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mergeline.evaluation.vision_language.boxes import Box, Size, iou, read_box
from mergeline.evaluation.vision_language.metrics import answers, plain, vqa
from mergeline.evaluation.vision_language.settings import Task

SIZE = Size(200, 100)
PIXELS, THOUSAND = Box(scale="pixels"), Box(scale=1000)


def score(metric, written, *targets, **settings):
    [found] = answers(metric, [written], [targets], [SIZE], **settings)
    return float(found)


@pytest.mark.parametrize(
    ("metric", "written", "targets", "expected"),
    [
        ("exact_match", " red\n", ["blue", "red"], 1),
        ("exact_match", "Red", ["red"], 0),
        ("contains", "it reads STOP here", ["STOP"], 1),
        ("contains", "it reads stop here", ["STOP"], 0),
        ("choice", "(B) a dog", ["B"], 1),
        ("choice", "b.", ["B"], 1),
        ("choice", "Yes, there is", ["yes"], 1),
        ("choice", "The answer is B", ["B"], 0),
        ("choice", "!", ["B"], 0),
        # 105 is 5 % from 100, 106 is 6 %; signs and percents are numbers, too.
        ("relaxed_accuracy", "105", ["100"], 1),
        ("relaxed_accuracy", "106", ["100"], 0),
        ("relaxed_accuracy", "-95", ["-100"], 1),
        ("relaxed_accuracy", "12%", ["0.12"], 1),
        ("relaxed_accuracy", "0.01", ["0"], 0),
        ("relaxed_accuracy", "0", ["0"], 1),
        ("relaxed_accuracy", "nan", ["100"], 0),
        ("relaxed_accuracy", "Germany", ["germany"], 1),
        # One letter of five is wrong: 1 - 1/5. Two of four are: a half, which counts. Three of four: nothing.
        ("anls", "hallo", ["Hello"], 0.8),
        ("anls", "abxx", ["abcd"], 0.5),
        ("anls", "axxx", ["abcd"], 0),
        ("anls", "New   york", ["paris", "new York"], 1),
        ("anls", "", ["a"], 0),
    ],
)
def test_texts_are_scored_beside_the_best_right_answer(metric, written, targets, expected):
    assert score(metric, written, *targets) == pytest.approx(expected)


def test_case_is_passed_over_where_the_task_says_so():
    assert score("exact_match", "Red", "red", lower=True) == 1
    assert score("contains", "a STOP sign", "stop", lower=True) == 1


def test_vqa_leaves_each_of_ten_people_out():
    people = ["two"] + 2 * ["2"] + 7 * ["4"]
    # Three of ten agree. Without one of them two are left, in three of ten cases; else three, which is enough.
    assert vqa("2", people) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert vqa("4.", people) == 1 and vqa("five", people) == 0
    # One alone agrees: nobody where that one is left out, else a third.
    assert score("vqa", "yes", "Yes", *(9 * ["no"])) == pytest.approx(9 * (1 / 3) / 10)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog.", "dog"),
        ("  two   cats, a bird", "2 cats bird"),
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("black/white", "black white"),
        ("don't", "dont"),
    ],
)
def test_answers_are_compared_as_vqav2_does(text, expected):
    assert plain(text) == expected


@pytest.mark.parametrize(
    ("text", "how", "expected"),
    [
        ("[20, 10, 100, 50]", PIXELS, (0.1, 0.1, 0.5, 0.5)),
        ("it is at (100,200),(300,400)", THOUSAND, (0.1, 0.2, 0.3, 0.4)),
        ('{"bbox_2d": [100, 200.5, 300, 4e2]}', THOUSAND, (0.1, 0.2005, 0.3, 0.4)),
        ("<loc0256><loc0512><loc0768><loc1024> cat", Box(form="yxyx", scale=1024), (0.5, 0.25, 1.0, 0.75)),
        ("20 10 80 40", Box(form="xywh", scale="pixels"), (0.1, 0.1, 0.5, 0.5)),
        ("0.1 .2 0.3 0.4", Box(scale=1), (0.1, 0.2, 0.3, 0.4)),
        ("1, 2 and 3, 4", THOUSAND, None),
        ("nowhere", THOUSAND, None),
    ],
)
def test_a_box_is_the_first_four_numbers_side_by_side(text, how, expected):
    found = read_box(text, how, SIZE)
    assert (found is None) == (expected is None)
    if expected is not None:
        np.testing.assert_allclose(found, expected)


def test_boxes_overlap_by_their_common_area_over_all():
    a = np.array([0, 0, 0.5, 0.5])
    # A quarter of each is common: 1/16 of the image of 1/4 + 1/4 - 1/16.
    assert iou(a, a + 0.25) == pytest.approx(1 / 7) and iou(a, a) == 1 and iou(a, a + 0.5) == 0
    assert iou(a, np.array([0.5, 0.5, 0, 0])) == 0 and iou(np.zeros(4), np.zeros(4)) == 0


def test_grounding_counts_overlaps_of_a_half():
    boxes = {"target_box": Box(form="xywh", scale="pixels"), "written_box": THOUSAND}
    target = "[0, 0, 100, 100]"  # the left half of 200 x 100 pixels
    assert score("iou", "0 0 500 1000", target, **boxes) == 1
    assert score("iou", "0 0 250 1000", target, **boxes) == pytest.approx(0.5)
    assert score("grounding", "0 0 250 1000", target, **boxes) == 1
    assert score("grounding", "0 0 249 1000", target, **boxes) == 0
    assert score("grounding", "here", target, **boxes) == 0
    assert score("iou", "0 0 0 0", target, "[0, 0, 0, 0]", **boxes) == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"metric": "iou"}, "iou compares boxes; say how"),
        ({"metric": "grounding", "target_box": {"scale": 1}}, "grounding compares boxes; say how"),
        ({"metric": "anls", "written_box": {"scale": 1}}, "anls compares no boxes"),
        ({"metric": "iou", "target_box": {"scale": 0}, "written_box": {"scale": 1}}, "greater than 0"),
    ],
)
def test_what_boxes_are_must_be_declared(settings, said):
    with pytest.raises(ValueError, match=said):
        Task(**settings)
