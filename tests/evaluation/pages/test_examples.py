"""Examples and confusion tables of the report: pictures in the page itself, within bounds."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from html_pages import HOSTILE, LOADS, Page
from made_up_results import made_up

from mergeline.evaluation.pages import examples as module
from mergeline.evaluation.pages.examples import (
    Example,
    TaskExamples,
    confusion,
    example,
    within_bounds,
)
from mergeline.evaluation.pages.report import render


def page(folder: Path, examples: list[TaskExamples] | str) -> Page:
    render(folder / "report.html", **made_up(), costs=[], verdict=None, examples=examples)
    return Page((folder / "report.html").read_text())


def picture(size: int = 100) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (size, 2 * size, 3), dtype=np.uint8)


def test_pictures_are_small_png_files_in_the_page(tmp_path):
    from PIL import Image

    shown = example(picture(), "cat; base: dog")
    head, _, data = shown.picture.partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == "data:image/png;base64" and image.format == "PNG" and image.size == (56, 28)
    small = example(picture(8), "")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(small.picture.partition(",")[2]))))
    assert np.array_equal(pixels, picture(8))
    found = page(tmp_path, [TaskExamples("digits", 3, 1, [shown], [small])])
    assert [attrs["src"] for tag, attrs in found.tags if tag == "img"] == [shown.picture, small.picture]
    loads = [value for _, attrs in found.tags for key, value in attrs.items() if key in LOADS]
    assert all(value.startswith(("#", "data:image/png;")) for value in loads)
    (policy,) = [attrs["content"] for _, attrs in found.tags if "http-equiv" in attrs]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "digits: 3 examples better than the base, 1 worse" in found.text
    assert "cart is better (1 of 3)" in found.text and "The base is better (" not in found.text


def test_texts_are_escaped_and_cut(tmp_path):
    found = page(tmp_path, [TaskExamples("digits", 1, 0, [example(HOSTILE, HOSTILE)], [])])
    assert HOSTILE not in found.html and HOSTILE.replace("\n", " ") in found.text
    assert example("x" * 601, "").text == "x" * 600 + " …" and example("x" * 600, "").text == "x" * 600


def test_why_there_are_none_is_said_and_nothing_where_none_were_asked_for(tmp_path):
    assert "No examples can be shown: data/x: is gone" in page(tmp_path, "data/x: is gone").text
    assert 'id="examples"' not in page(tmp_path, "").html and 'id="examples"' not in page(tmp_path, []).html


def test_a_page_has_room_for_so_many_pictures(monkeypatch):
    monkeypatch.setattr(module, "_BYTES", 4000)
    shown = [Example("x" * 400, "", str(i)) for i in range(6)]
    bounded = within_bounds(TaskExamples(task, 6, 6, shown, shown[:2]) for task in ("a", "b"))
    assert [[len(task.gained), len(task.lost)] for task in bounded] == [[2, 2], [2, 2]]
    assert bounded[0].gained == shown[:2]


def test_confusion_is_counted_by_class_and_coloured_by_shares():
    label_N, answer_N = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 0, 1])
    found = confusion(["cat", "dog"], label_N, answer_N)
    assert found and found.columns == ["cat", "dog"]
    assert [(name, [(c.text, c.heat) for c in cells]) for name, cells in found.rows] == [
        ("cat", [("3", 75), ("1", 25)]),
        ("dog", [("1", 50), ("1", 50)]),
    ]
    routed = confusion(["cat", "dog"], np.array([0, 1]), np.array([-1, 1]))
    assert routed and routed.columns == ["cat", "dog", "none of them"]
    assert [[c.text for c in cells] for _, cells in routed.rows] == [["", "", "1"], ["", "1", ""]]
    assert confusion([str(i) for i in range(31)], label_N, answer_N) is None


def test_confusion_tables_are_folded_away(tmp_path):
    found = confusion(["cat", HOSTILE], np.array([0, 1]), np.array([1, 1]))
    html = page(tmp_path, [TaskExamples("digits", 0, 0, [], [], found)]).html
    assert "<summary>What cart takes the classes for</summary>" in html and HOSTILE not in html
