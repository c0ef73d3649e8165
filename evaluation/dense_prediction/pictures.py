"""Targets of every pixel, as pictures for people."""

from __future__ import annotations

import numpy as np

from mergeline.evaluation.dense_prediction.metrics import IGNORED, Target


def beside(image: np.ndarray, right: np.ndarray, target: Target) -> np.ndarray:
    """An image, uint8 (H, W, 3), and right of it its target as a picture: (H, 2 W, 3)."""
    return np.concatenate([image, _picture(right, target)], axis=1)


def _picture(right: np.ndarray, target: Target) -> np.ndarray:
    if target == "images":
        return right
    if target == "normals":  # -1 to 1 become colours, as usual; no direction is black
        shown = (right / np.linalg.norm(right, axis=-1, keepdims=True).clip(1e-9) + 1) * 127.5
        return np.where(np.any(right != 0, axis=-1, keepdims=True), shown, 0).astype(np.uint8)
    if target == "distances":  # near is bright; none is black
        counted = right > 0
        low, high = right[counted].min(), right[counted].max()
        grey = np.where(counted, 255 - 200 * (right - low) / max(high - low, 1e-9), 0)
        return np.repeat(grey[..., None], 3, axis=-1).astype(np.uint8)
    return np.where(right[..., None] == IGNORED, np.uint8(128), _colours()[right])


def _colours() -> np.ndarray:
    """Of each number, a colour that its neighbours do not have: the palette of PASCAL VOC, (256, 3) uint8."""
    numbers = np.arange(256)[:, None] >> np.array([0, 3, 6])
    bits = (numbers[:, None, :] >> np.arange(3)[None, :, None]) & 1  # (256, bit of colour, place)
    return (bits << np.array([7, 6, 5])).sum(-1).astype(np.uint8)
