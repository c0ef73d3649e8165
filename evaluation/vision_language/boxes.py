"""Boxes in images, as tables have them and models write them."""

from __future__ import annotations

import re
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_BETWEEN = r"(?:[\s,;:()\[\]<>|]|loc)+"  # PaliGemma writes <loc0012><loc0345>
_BOX = re.compile(rf"(?<![\d.])({_NUMBER}){3 * f'{_BETWEEN}({_NUMBER})'}(?![\d.]*\d)")


class Size(NamedTuple):
    """Of an image, in pixels."""

    width: int
    height: int


class Box(BaseModel):
    """How four numbers are a box.

    form: corners `xyxy` or `yxyx`, or a corner and the extent, `xywh`. scale: the number that stands for the whole
    width and the whole height of an image, such as 1 or 1000; or `pixels` of the image as the table has it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    form: Literal["xyxy", "yxyx", "xywh"] = "xyxy"
    scale: Literal["pixels"] | Annotated[float, Field(gt=0, allow_inf_nan=False)]


def read_box(text: str, how: Box, size: Size) -> np.ndarray | None:
    """The first four numbers that stand side by side in a text, as (left, top, right, bottom) in parts of the image.

    None where there are none. size: of the image.
    """
    found = _BOX.search(text)
    if found is None:
        return None
    a, b, c, d = map(float, found.groups())
    if how.form == "yxyx":
        a, b, c, d = b, a, d, c
    elif how.form == "xywh":
        c, d = a + c, b + d
    width, height = size if how.scale == "pixels" else (how.scale, how.scale)
    return np.array([a / width, b / height, c / width, d / height])


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes; 0 of such as have no area."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    common = sides.clip(0).prod()
    union = (a[2:] - a[:2]).clip(0).prod() + (b[2:] - b[:2]).clip(0).prod() - common
    return float(common / union) if union > 0 and np.isfinite(union) else 0.0
