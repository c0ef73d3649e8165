"""Random numbers that depend on (seed, expert, tensor, element) alone, not on who draws them, when or in what order."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_PER_COUNT = 8  # 32-bit numbers that one step of the Philox counter yields


def uniform(seed: int, expert: str, tensor: str, start: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1) for elements [start, start + count) of a tensor: (count,) float32, 24 random bits each.

    The counter-based generator Philox4x64-10 (Salmon et al. 2011), as numpy has it; its key is a hash of the first
    three arguments, its counter the element.
    """
    import numpy as np

    key = hashlib.sha256(f"{seed}\0{expert}\0{tensor}".encode()).digest()[:16]
    generator = np.random.Philox(key=np.frombuffer(key, dtype="<u8"))
    first = start // _PER_COUNT
    generator.advance(first)
    words = -(-(start + count) // _PER_COUNT) - first
    drawn = generator.random_raw(words * _PER_COUNT // 2).view(np.uint32)
    offset = start - first * _PER_COUNT
    drawn >>= 8
    return torch.from_numpy(drawn.view(np.int32)[offset : offset + count]).float().mul_(2.0**-24)
