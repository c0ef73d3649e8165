"""The images of the second family's four tasks, all of them drawn."""

from __future__ import annotations

from typing import Mapping

import numpy as np

from make.figures import counts, directions, polygons
from make.hashing import stable_hash
from make.segments import segments

SIZES = {"train": 3000, "val": 400, "test": 800, "fit": 400}

_DRAWN = {"counts": counts, "directions": directions, "segments": segments, "polygons": polygons}


def task_arrays(task: str, sizes: Mapping[str, int] = SIZES) -> dict[str, np.ndarray]:
    """train_x, train_y, val_x, val_y, test_x, test_y, and fit_x without labels; each in an order of its own."""
    rng = np.random.default_rng(stable_hash("second" + task) % 2**32)
    arrays: dict[str, np.ndarray] = {}
    for split, n in sizes.items():
        images, labels = _DRAWN[task](n, rng)
        order = rng.permutation(n)
        arrays[f"{split}_x"] = images[order]
        if split != "fit":
            arrays[f"{split}_y"] = labels[order].astype(np.int64)
    return arrays
