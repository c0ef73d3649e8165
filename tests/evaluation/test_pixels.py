"""Images of bytes as models take them."""

import numpy as np
import torch

from mergeline.evaluation.pixels import Pixels


def test_channels_are_normalised_one_by_one():
    mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 7, 3), np.uint8)
    found = Pixels(mean, std, "cpu")(images)
    of_bytes = [255 * torch.tensor(values).view(3, 1, 1) for values in (mean, std)]
    assert torch.equal(found, (torch.from_numpy(images).permute(0, 3, 1, 2) - of_bytes[0]) / of_bytes[1])
    assert found.dtype == torch.float32 and found.is_contiguous(memory_format=torch.channels_last)
