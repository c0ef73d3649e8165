"""Images of bytes as models take them: float32, normalised channel by channel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Sequence

import numpy as np

from mergeline.merging.checkpoints.companions import CONFIG
from mergeline.merging.errors import UserError
from mergeline.merging.files import read_object

if TYPE_CHECKING:
    import torch
    from torch import Tensor


_PROCESSOR = "preprocessor_config.json"
_IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

Channels = Sequence[float]  # a number for each


def normalisation(
    folders: Sequence[Path], model: str, mean: Channels | None, std: Channels | None, section: str
) -> tuple[Channels, Channels]:
    """Means and standard deviations of channels: the given ones, else what the first folder that says them says.

    folders: of the base, and of the experts. model: what they are, where they do not say it; `torchvision/NAME` has
    ImageNet's. section: of params.yaml, which may give them.

    Raises:
        UserError: nothing is said.
    """
    if mean and std:
        return mean, std
    found = _IMAGENET if model.startswith("torchvision/") else next(filter(None, map(_told, folders)), None)
    if found is None:
        raise UserError(
            f"{folders[0]}: has no {_PROCESSOR}, nor has any expert; copy it there, or say mean and std in {section}"
        )
    return mean or found[0], std or found[1]


def _told(folder: Path) -> tuple[Channels, Channels] | None:
    """Mean and standard deviation of pixels, as the files beside a checkpoint say them."""
    of_timm = read_object(folder / CONFIG).get("pretrained_cfg")
    if isinstance(of_timm, dict) and {"mean", "std"} <= of_timm.keys():
        return list(of_timm["mean"]), list(of_timm["std"])
    told = read_object(folder / _PROCESSOR)
    if told and not told.get("do_normalize", True):
        return [0.0] * 3, [1.0] * 3
    if {"image_mean", "image_std"} <= told.keys():
        return list(told["image_mean"]), list(told["image_std"])
    return None


class Pixels:
    """Normalises with the mean and standard deviation of each channel, given for pixels from 0 to 1."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str):
        import torch

        def of_bytes(values: Sequence[float]) -> Tensor:
            """A setting for each channel (3), from the unit interval to the scale of bytes."""
            return 255 * torch.tensor(values, dtype=torch.float32, device=device)

        self._device = device
        self._mean, self._std = of_bytes(mean), of_bytes(std)

    def __call__(self, x: np.ndarray) -> Tensor:
        """Images (B, H, W, 3) of bytes, maybe of a memory map: float32 (B, 3, H, W)."""
        import torch

        width = x.shape[2]
        # By rows: operations over three channels at a time are several times slower.
        rows = torch.from_numpy(np.array(x)).to(self._device).float().flatten(2)
        rows = rows.sub_(self._mean.repeat(width)).div_(self._std.repeat(width))
        return rows.unflatten(2, (width, -1)).permute(0, 3, 1, 2)
