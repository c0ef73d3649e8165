"""The two sets that are not drawn: Fashion-MNIST and scikit-learn's handwritten digits.

Fashion-MNIST is read where Debian's package dataset-fashion-mnist puts it.
https://github.com/zalandoresearch/fashion-mnist
https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from PIL import Image

from make.drawing import IMAGE_SIZE

_FASHION = Path("/usr/share/datasets/fashion-mnist")
_IMAGE_HEADER, _LABEL_HEADER = 16, 8  # bytes, of the IDX format


def fashion(part: str) -> tuple[np.ndarray, np.ndarray]:
    """`train` (60,000) or `t10k` (10,000): images (N, 28, 28) uint8 and classes (N) int64."""
    images = np.frombuffer(_read(f"{part}-images-idx3-ubyte"), np.uint8, offset=_IMAGE_HEADER)
    labels = np.frombuffer(_read(f"{part}-labels-idx1-ubyte"), np.uint8, offset=_LABEL_HEADER)
    return images.reshape(-1, 28, 28), labels.astype(np.int64)


def _read(name: str) -> bytes:
    file = next(file for file in sorted(_FASHION.rglob(f"{name}*")) if file.name in (name, f"{name}.gz"))
    return gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()


def digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 images (N, 8, 8) uint8 and classes (N) int64."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.images / 16 * 255).astype(np.uint8), found.target


def enlarged(images: np.ndarray) -> np.ndarray:
    """Grey (N, h, w) uint8 -> (N, 36, 36) uint8."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.BILINEAR)) for image in images])
