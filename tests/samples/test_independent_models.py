"""Pairs of models that were trained independently: the script writes what `align` opens."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from places import REPOSITORY

from mergeline.merging.align import align, family_of, kind_of

sys.path.insert(0, str(REPOSITORY / "samples"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kinds"),
    [
        ("mlp", {"hidden"}),
        ("resnet", {"convolution", "residual"}),
        ("vit", {"hidden", "heads", "residual"}),
        ("llama", {"hidden", "heads", "residual"}),
    ],
)
def test_each_pair_is_trained_and_aligned(kind, kinds, tmp_path):
    from make.independent_models import NAMES, TASK, TEXTS, write_model

    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    images = {f"{split}_x": rng.integers(0, 256, (80, 36, 36, 3), np.uint8) for split in ("train", "test")}
    np.savez(tmp_path / "data" / f"{TASK}.npz", **images, train_y=np.arange(80) % 4, test_y=np.arange(80) % 4)
    texts = rng.integers(0, 256, 9000).astype(np.uint8)
    np.savez(tmp_path / "data" / f"{TEXTS}.npz", train_x=texts, test_x=texts)
    for name in NAMES:
        assert "loss" in write_model(kind, name, tmp_path, share=0.005)
    a, b = (tmp_path / kind / name for name in NAMES)
    assert {kind_of(group.name) for group in family_of(a, {"b": b}).groups} == kinds
    told = align(a, {"b": b}, tmp_path / "out")["b"]["aligned"]
    assert told["distance"]["after"] < told["distance"]["before"]
