"""Images with a target of every pixel are read from arrays and folders, and what is none is refused in a line."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import refused
from PIL import Image

from mergeline.evaluation.dense_prediction.data import load, prepare
from mergeline.evaluation.dense_prediction.pictures import beside
from mergeline.evaluation.dense_prediction.settings import Task

SIZE = (8, 12)
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (3, *SIZE, 3), dtype=np.uint8)
LABELS = RANDOM.integers(0, 4, (3, *SIZE)).astype(np.int64)


def saved(path, y, x=IMAGES, **more):
    np.savez(path, **{"val_x": x, "val_y": y, "test_x": x, "test_y": y, **more})
    return str(path)


def prepared(tmp_path, y, metric, x=IMAGES, size=SIZE):
    prepare(saved(tmp_path / "images.npz", y, x), tmp_path / "out", Task(metric=metric), size)
    return load(tmp_path / "out")


def test_arrays_that_have_the_size_are_taken_as_they_are(tmp_path):
    y = LABELS.copy()
    y[0, 0], y[1, 1] = -1, 255
    own = prepared(tmp_path, y, "miou")
    found_x, found_y = own.split("test")
    assert np.array_equal(found_x, IMAGES) and own.classes == 4
    assert (found_y[0, 0] == 255).all() and (found_y[1, 1] == 255).all()
    assert np.array_equal(found_y[2], LABELS[2])


def test_numbers_that_say_nothing_become_0(tmp_path):
    depth = RANDOM.random((3, *SIZE)) + 1
    depth[0, 0], depth[0, 1], depth[0, 2] = np.nan, -3, np.inf
    found = prepared(tmp_path, depth, "relative_error").split("val")[1]
    assert found.dtype == np.float32 and (found[0, :3] == 0).all() and (found[0, 3:] > 1).all()
    normals = RANDOM.normal(size=(3, *SIZE, 3))
    normals[0, 0, 0, 1] = np.nan
    found = prepared(tmp_path, normals, "angle").split("val")[1]
    assert (found[0, 0, 0] == 0).all() and np.allclose(found[1:], normals[1:])


def test_a_mask_is_0_and_all_else(tmp_path):
    of_bytes = prepared(tmp_path, (LABELS > 1) * 255, "f_measure").split("val")[1]
    assert np.array_equal(of_bytes, LABELS > 1)
    of_truth = prepared(tmp_path, LABELS > 1, "f_measure").split("val")[1]
    assert np.array_equal(of_truth, of_bytes)
    with_unknown = np.where(LABELS == 3, 255, LABELS > 1)
    found = prepared(tmp_path, with_unknown, "f_measure").split("val")[1]
    assert np.array_equal(found, with_unknown)


def test_targets_take_the_nearest_pixel_and_images_are_interpolated(tmp_path):
    small = prepared(tmp_path, LABELS, "miou", size=(8, 12)).split("val")[1]
    large = prepared(tmp_path, LABELS, "miou", size=(16, 24)).split("val")
    assert np.array_equal(large[1][:, ::2, ::2], small) and np.array_equal(large[1][:, 1::2, 1::2], small)
    assert large[0].shape == (3, 16, 24, 3)


@pytest.mark.parametrize("target", ("labels", "distances", "images"))
def test_folders_of_images_and_targets(tmp_path, target):
    for split in ("train", "test"):
        for part in ("images", "targets"):
            (tmp_path / split / part).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(IMAGES[i % 3]).save(tmp_path / split / "images" / f"{i:02}.png")
            place = tmp_path / split / "targets" / f"{i:02}"
            if target == "labels":  # of colours that have numbers
                picture = Image.fromarray(LABELS[i % 3].astype(np.uint8), mode="P")
                picture.putpalette([*range(256)] * 3)
                picture.save(place.with_suffix(".png"))
            elif target == "images":
                Image.fromarray(IMAGES[(i + 1) % 3]).save(place.with_suffix(".png"))
            else:
                np.save(place.with_suffix(".npy"), LABELS[i % 3] + 0.5)
    metric = {"labels": "miou", "distances": "absolute_error", "images": "psnr"}[target]
    prepare(str(tmp_path), tmp_path / "out", Task(metric=metric), SIZE)
    own = load(tmp_path / "out")
    x, y = own.split("test")
    wanted = {"labels": LABELS, "distances": LABELS + 0.5, "images": IMAGES[[1, 2, 0]]}[target]
    assert len(x) == 20 and np.array_equal(x[:3], IMAGES) and np.array_equal(y[:3], wanted)
    assert len(own.split("val")[0]) == 2  # a tenth of train
    picture = beside(x[0], y[0], own.task.target)
    assert picture.shape == (SIZE[0], 2 * SIZE[1], 3) and picture.dtype == np.uint8
    (tmp_path / "test/targets/03.png").unlink(missing_ok=True)
    (tmp_path / "test/targets/03.npy").unlink(missing_ok=True)
    with refused("'03' has an image and no target"):
        prepare(str(tmp_path), tmp_path / "out", Task(metric=metric), SIZE)


@pytest.mark.parametrize(
    "y, metric, said",
    [
        (LABELS / 2, "miou", "test image 0: its target is float64, and labels is of integers"),
        (LABELS + 300, "miou", "they must lie in 0 to 254"),
        (LABELS[:, 0], "miou", "and labels are (H, W)"),
        (LABELS, "angle", "and normals are (H, W, 3)"),
        (LABELS * 0, "absolute_error", "no pixel of it has a right answer"),
        (LABELS, "psnr", "is no image of bytes"),
    ],
)
def test_targets_of_another_kind_are_refused(tmp_path, y, metric, said):
    with refused("images.npz", said.replace("test image", "val image")):
        prepared(tmp_path, y, metric)
    assert not (tmp_path / "out").exists()


def test_sources_that_lack_something_are_refused(tmp_path):
    np.savez(tmp_path / "half.npz", val_x=IMAGES, val_y=LABELS, test_x=IMAGES)
    for source, said in {
        "half.npz": "'test_y' is missing",
        "none.npz": "no such file or folder",
        "empty": "no such folder",
    }.items():
        (tmp_path / "empty").mkdir(exist_ok=True)
        with refused(said):
            prepare(str(tmp_path / source), tmp_path / "out", Task(metric="miou"), SIZE)
    with refused("unknown scheme 'torchvision'"):
        prepare("torchvision://VOC", tmp_path / "out", Task(metric="miou"), SIZE)
    with refused("not a prepared dataset"):
        load(tmp_path)
