"""Tables with images are prepared with the images' files beside, or refused in a line that names the row."""

from __future__ import annotations

import io
import json
import zlib

import numpy as np
import pytest
from checkpoints import refused
from PIL import Image
from small_vision_language import image, save_image_table

from mergeline.evaluation.tables import load_table
from mergeline.evaluation.vision_language import images as module
from mergeline.evaluation.vision_language.images import open_image, prepare_images
from mergeline.evaluation.vision_language.questions import questions
from mergeline.evaluation.vision_language.settings import Task

ROWS = [
    {"image": image("red"), "question": "what ?", "target": "red"},
    {"image": image("blue"), "question": "which ?", "target": ["blue", "dark blue"]},
    {"image": image("red"), "question": "how ?", "target": 3},
]


def png(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def test_images_lie_beside_the_rows_once_each(tmp_path):
    save_image_table(tmp_path / "in", ROWS)
    prepare_images(str(tmp_path / "in"), tmp_path / "out", "image")
    found = questions(Task(), load_table(tmp_path / "out"), "test")
    assert len(list((tmp_path / "out/images").iterdir())) == 2 and found.images[0] == found.images[2]
    assert found.asked == ["what ?", "which ?", "how ?"]
    assert found.targets == [["red"], ["blue", "dark blue"], ["3"]] and found.sizes == 3 * [(8, 8)]
    for row, path in zip(ROWS, found.images):
        assert np.array_equal(np.asarray(open_image(path)), row["image"])
    prepare_images(str(tmp_path / "in"), tmp_path / "again", "image")
    files = [sorted(p.relative_to(f) for p in f.rglob("*")) for f in (tmp_path / "out", tmp_path / "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize("source", ["parquet", "hub"])
def test_images_that_are_in_the_table_itself_become_files(tmp_path, monkeypatch, source):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    cells = [{"bytes": png(row["image"]), "path": None} for row in ROWS]
    features = datasets.Features({
        "image": datasets.Image(), "second": datasets.Image(), "question": datasets.Value("string"),
        "answers": [{"answer": datasets.Value("string")}],
    })  # fmt: skip
    rows = [
        {"image": cell, "second": cell, "question": "what ?", "answers": [{"answer": "a"}, {"answer": "b"}]}
        for cell in cells
    ]
    made = datasets.Dataset.from_list(rows, features=features)
    if source == "parquet":
        (tmp_path / "in").mkdir()
        for split in ("val", "test"):
            made.to_parquet(tmp_path / f"in/{split}.parquet")
        where = str(tmp_path / "in")
    else:
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
        where = "hf-dataset://org/name?val=validation"
    prepare_images(where, tmp_path / "out", "image")
    table = load_table(tmp_path / "out")
    found = questions(Task(target="answers"), table, "val")
    assert found.targets == 3 * [["a", "b"]] and "second" not in table.rows("val")[0]
    assert np.array_equal(np.asarray(open_image(found.images[1])), ROWS[1]["image"])


def test_images_are_shown_upright_and_in_colour(tmp_path):
    (tmp_path / "in").mkdir()
    turned = Image.new("L", (4, 6), 7)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned.save(tmp_path / "in/a.jpg", exif=exif)
    for split in ("val", "test"):
        (tmp_path / f"in/{split}.jsonl").write_text(json.dumps({"image": "a.jpg"}) + "\n")
    prepare_images(str(tmp_path / "in"), tmp_path / "out", "image")
    [cell] = load_table(tmp_path / "out").column("val", "image")
    assert (cell["width"], cell["height"]) == (6, 4)
    assert np.asarray(open_image(tmp_path / "out" / cell["file"])).shape == (4, 6, 3)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("png/9.png", "row 1 of val: there is no image"),
        ("/etc/passwd", "row 1 of val: the image '/etc/passwd' must be a path below"),
        ("png/../../x.png", "row 1 of val: the image 'png/../../x.png' must be a path below"),
        ("val.jsonl", "row 1 of val: the image does not open as BMP, GIF, JPEG, PNG, TIFF, WEBP"),
        ("half.png", "row 1 of val: the image does not open ("),
        ("large.png", "row 1 of val: the image has more than 0 Mi pixels; make it smaller"),
        (7, "row 1 of val: the image is no path, and no struct of bytes"),
        (None, "row 1 of val has no 'image'; known: question, target"),
    ],
)
def test_an_image_that_cannot_be_used_is_refused_by_its_row(tmp_path, monkeypatch, value, said):
    save_image_table(tmp_path / "in", [ROWS[0], {**ROWS[1], "image": value}])
    noise = png(np.random.default_rng(0).integers(0, 255, (24, 24, 3)).astype(np.uint8))
    (tmp_path / "in/half.png").write_bytes(noise[: len(noise) // 2])
    (tmp_path / "in/large.png").write_bytes(png(np.zeros((40, 40, 3), np.uint8)))
    monkeypatch.setattr(module, "_MOST_PIXELS", 1000)
    with refused(said):
        prepare_images(str(tmp_path / "in"), tmp_path / "out", "image")
    assert not (tmp_path / "out").exists()


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    # A header that says 60 000 x 60 000 pixels, and next to nothing behind it.
    small = png(np.zeros((2, 2, 3), np.uint8))
    header = bytearray(small)
    header[16:24] = (60000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    save_image_table(tmp_path / "in", [{**ROWS[0], "image": "bomb.png"}])
    (tmp_path / "in/bomb.png").write_bytes(bytes(header))
    with refused("row 0 of val: the image has more than 64 Mi pixels"):
        prepare_images(str(tmp_path / "in"), tmp_path / "out", "image")


@pytest.mark.parametrize(
    ("row", "settings", "said"),
    [
        ({"target": "  "}, {}, "row 0 of val has an empty target"),
        ({"target": []}, {}, "row 0 of val has an empty target"),
        ({"target": "a"}, {"target": "answer"}, "row 0 of val has no 'answer'"),
        ({"target": "a"}, {"template": "{text} ?"}, "row 0 of val has no 'text'"),
        ({"target": ["a", "b"]}, {"metric": "vqa"}, "vqa compares with the answers of 4 people or more, here are 2"),
        (
            {"target": "the left"},
            {"metric": "grounding", "target_box": {"scale": 1}, "written_box": {"scale": 1}},
            "the target 'the left' is no box of four numbers, which grounding compares",
        ),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_blamed(tmp_path, row, settings, said):
    save_image_table(tmp_path / "in", [{**ROWS[0], **row}])
    prepare_images(str(tmp_path / "in"), tmp_path / "out", "image")
    with refused("out: row 0 of val", said):
        questions(Task(**settings), load_table(tmp_path / "out"), "val")


def test_a_list_of_four_numbers_is_one_box_and_a_list_of_lists_several(tmp_path):
    rows = [{**ROWS[0], "target": [1, 2, 3, 4]}, {**ROWS[1], "target": [[1, 2, 3, 4], [0, 0, 1, 1]]}]
    save_image_table(tmp_path / "in", rows)
    prepare_images(str(tmp_path / "in"), tmp_path / "out", "image")
    boxes = {"target_box": {"scale": "pixels"}, "written_box": {"scale": 1000}}
    found = questions(Task(metric="iou", **boxes), load_table(tmp_path / "out"), "val")
    assert [len(targets) for targets in found.targets] == [1, 2]
