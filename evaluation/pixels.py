"""Images of bytes as models take them: float32, normalised channel by channel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Sequence

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Pixels:
    """Normalises with the mean and standard deviation of each channel, given for pixels from 0 to 1."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str):
        import torch

        def of_bytes(values: Sequence[float]) -> Tensor:
            """A setting for each channel (3, 1, 1), from the unit interval to the scale of bytes."""
            return 255 * torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)

        self._device = device
        self._mean, self._std = of_bytes(mean), of_bytes(std)

    def __call__(self, x: np.ndarray) -> Tensor:
        """Images (B, H, W, 3) of bytes, maybe of a memory map: float32 (B, 3, H, W)."""
        import torch

        pixels = torch.from_numpy(np.array(x)).to(self._device).permute(0, 3, 1, 2).float()
        return pixels.sub_(self._mean).div_(self._std)
