"""Inputs and targets, made from rows of tables."""

from __future__ import annotations

from dataclasses import replace

import pytest
from checkpoints import refused
from pydantic import ValidationError
from small_text2text import save_table

from mergeline.evaluation.tables import load_table, prepare_table
from mergeline.evaluation.text2text.settings import Task
from mergeline.evaluation.text2text.texts import Texts, sources, texts

ROWS = [
    {"first": "a {x}", "second one": "b", "label": 1, "score": 2.5},
    {"first": "c", "second one": "d", "label": 0, "score": 0},
]


@pytest.fixture
def table(tmp_path):
    save_table(tmp_path / "source", ROWS)
    prepare_table(str(tmp_path / "source"), tmp_path / "pairs")
    return load_table(tmp_path / "pairs")


def test_columns_are_taken_as_they_are(table):
    assert texts(Task(source="first", target="score"), table, "test") == Texts(["a {x}", "c"], ["2.5", "0"])


def test_templates_take_the_values_of_columns(table):
    task = Task(template="{{1}} {first} and {second one}?", target="<{label}>")
    assert texts(task, table, "val") == Texts(["{1} a {x} and b?", "{1} c and d?"], ["<1>", "<0>"])


def test_numbers_of_classes_have_the_names_of_the_table_and_then_answers(table):
    named = replace(table, classnames={"label": ["bad", "good"]})
    task = Task(template="{label}: {first}", target="label")
    assert texts(task, named, "test") == Texts(["good: a {x}", "bad: c"], ["good", "bad"])
    by_number = Task(source="first", target="label", answers={1: "yes", 0: "no"})
    assert texts(by_number, table, "test").targets == ["yes", "no"]
    said = Task(source="first", target="label", answers={"good": "yes", "bad": "no"})
    assert texts(said, named, "test").targets == ["yes", "no"]


def test_inputs_need_no_targets(table):
    assert sources(Task(source="first", target="nowhere"), table, "test") == ["a {x}", "c"]


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"source": "frist", "target": "label"}, "row 0 of test has no 'frist'; did you mean 'first'"),
        ({"template": "{first}{thrid}", "target": "label"}, "row 0 of test has no 'thrid'"),
        (
            {"source": "first", "target": "{second} one"},
            "row 0 of test has no 'second'; did you mean 'second one'",
        ),
        (
            {"source": "first", "target": "first", "metric": "spearman"},
            "row 0 of test: the target 'a .* is no number",
        ),
        (
            {"source": "first", "target": "label", "answers": {1: "yes"}},
            "row 1 of test: `answers` has none for .* '0'",
        ),
        (
            {"source": "first", "target": "label", "answers": {1: "yes", 0: " "}},
            "row 1 of test has an empty target",
        ),
    ],
)
def test_what_rows_lack_is_named(table, settings, wrong):
    with pytest.raises(Exception, match="pairs: " + wrong.replace("{", r"\{")) as raised:
        texts(Task(**settings), table, "test")
    assert type(raised.value).__name__ == "UserError" and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"template": "{first"}, "expected '}'"),
        ({"template": "{first:>9}"}, "write the name of a column in braces"),
        ({"target": "{first!r}"}, "write the name of a column in braces"),
        ({"template": "{}"}, "write the name of a column in braces"),
        ({"answers": {0: False}}, "False is no text; put it into quotes"),
        ({"metric": "accuracy"}, "exact_match"),
        ({"max_new_tokens": 0}, "greater than 0"),
    ],
)
def test_settings_that_make_no_texts_are_refused(settings, wrong):
    with pytest.raises(ValidationError, match=wrong):
        Task(**settings)


def test_an_empty_target_is_refused(tmp_path):
    save_table(tmp_path / "source", [{"source": "a", "target": " "}])
    prepare_table(str(tmp_path / "source"), tmp_path / "pairs")
    with refused("pairs: row 0 of test has an empty target"):
        texts(Task(), load_table(tmp_path / "pairs"), "test")
