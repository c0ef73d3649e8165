"""Where tensors lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def on_cpu(tensor: Tensor) -> bool:
    """Whether NumPy and SciPy can take it, which sort and decompose faster than torch there."""
    return tensor.device.type == "cpu"
