"""The images of the classifiers' tasks, and those that their base is trained on; all but the digits are drawn."""

from __future__ import annotations

from typing import Callable

import numpy as np

from make.drawing import paint
from make.figures import counts, directions, polygons, shapes
from make.hashing import stable_hash
from make.photographs import digits, enlarged
from make.segments import segments
from make.textures import textures

Examples = tuple[np.ndarray, np.ndarray]  # images (N, 36, 36, 3) uint8, classes (N) int64

TASKS = ("digits", "segments", "polygons", "textures")
_SIZES = {"train": 2400, "val": 400, "test": 800, "fit": 400}
_DIGITS = {"train": 800, "val": 250, "test": 500, "fit": 247}
_PRETRAINING: tuple[Callable[..., Examples], ...] = (shapes, counts, directions, textures)
_A_SET = 2400  # images of pre-training

_DRAWN = {"segments": segments, "polygons": polygons, "textures": textures}


def task_arrays(task: str) -> dict[str, np.ndarray]:
    """train_x, train_y, val_x, val_y, test_x, test_y, and fit_x without labels; each in an order of its own."""
    rng = np.random.default_rng(stable_hash("classifiers" + task) % 2**32)
    arrays: dict[str, np.ndarray] = {}
    if task == "digits":
        small, labels = digits()
        order = rng.permutation(len(labels))
        parts = np.split(order, np.cumsum([*_DIGITS.values()])[:-1])
        images = paint(enlarged(small), rng, "paper")
        found = {split: (images[part], labels[part]) for split, part in zip(_DIGITS, parts)}
    else:
        found = {split: _DRAWN[task](n, rng) for split, n in _SIZES.items()}
    for split, (images, labels) in found.items():
        order = rng.permutation(len(labels))
        arrays[f"{split}_x"] = images[order]
        if split != "fit":
            arrays[f"{split}_y"] = labels[order].astype(np.int64)
    return arrays


def pretraining() -> Examples:
    """Images of sets that are drawn otherwise than the tasks are; their classes are counted through."""
    rng = np.random.default_rng(stable_hash("classifiers") % 2**32)
    images, labels, first = [], [], 0
    for drawn in _PRETRAINING:
        x, y = drawn(_A_SET, rng, pretraining=True)
        images.append(x)
        labels.append(y + first)
        first += int(y.max()) + 1
    order = rng.permutation(_A_SET * len(_PRETRAINING))
    return np.concatenate(images)[order], np.concatenate(labels)[order].astype(np.int64)
