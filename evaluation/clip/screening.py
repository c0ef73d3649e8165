"""Features whose classes are those of float32, found in bfloat16 wherever that leaves no doubt.

Processors that multiply bfloat16 take half as long for it. Rounding moves an image's features, and its class changes
only if they cross the boundary to another one: of unit features f and class embeddings h, the boundary between the
classes a and b is (f h_a - f h_b) / |h_a - h_b| away. Images are run again in float32, the nearest to a boundary first,
until the next is farther from it than rounding moved those in the mean. To have another class, it would have to be
moved straight towards the boundary, of all directions: none was, of all points of the demo (benchmarks/evaluation.py).

Shape suffixes: N images, B of them at a time, C classes, D the width of features.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Callable, Mapping

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_BATCH = 200
_FIRST = 16  # images that are run again in any case, and say how far rounding moves
_MOST = 1 / 3  # the share of images that may be run again before bfloat16 saves too little


def has_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are faster than those of float32 there."""
    import torch

    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


class Screen:
    """An image tower in float32 on the CPU, and beside it the same in bfloat16.

    pixels: gives images (B, H, W, 3) of bytes as the tower takes them, in float32. batch_size: of float32.
    """

    def __init__(self, tower: nn.Module, pixels: Callable[[np.ndarray], Tensor], batch_size: int):
        self._tower, self._rough = tower, _in_bfloat16(tower)
        self._pixels, self._batch_size = pixels, batch_size
        self._images = self._again = 0

    @property
    def pays(self) -> bool:
        """Whether few images had to be run again."""
        return self._again <= _MOST * self._images

    def load(self) -> None:
        """Take the weights of the tower."""
        self._rough.load_state_dict(self._tower.state_dict())

    def features(
        self, images: Mapping[str, np.ndarray], heads: Mapping[str, Tensor], more: Callable[[int], None]
    ) -> dict[str, Tensor]:
        """The unit features (N, D) of each task's images (N, H, W, 3); those near a boundary are float32's.

        heads: (C, D), a unit vector for each class of a task. more: is told how many images were done.
        """
        import torch

        found, distances = [], []
        for task, x in images.items():
            own = [self._roughly(x[i : i + _BATCH], more) for i in range(0, len(x), _BATCH)]
            found.append(torch.cat([heads[task][:0], *own]))  # of no images, none
            distances.append(to_boundary(found[-1], heads[task]))
        found_ND = torch.cat(found)
        distance_N, order_N = torch.cat(distances).sort()
        where = [(x, i) for x in images.values() for i in range(len(x))]
        moved_N, done, end = torch.empty(len(where)), 0, min(_FIRST, len(where))
        while done < end:
            again = order_N[done : min(end, done + self._batch_size)]
            pixels = self._pixels(np.stack([x[i] for x, i in (where[n] for n in again.tolist())]))
            exact_BD = _unit(self._tower(pixels))
            moved_N[done : done + len(again)] = (exact_BD - found_ND[again]).norm(dim=1)
            found_ND[again] = exact_BD
            done += len(again)
            end = int(torch.searchsorted(distance_N, moved_N[:done].mean()))
        self._images, self._again = self._images + len(where), self._again + done
        return dict(zip(images, found_ND.split([len(x) for x in images.values()])))

    def _roughly(self, x: np.ndarray, more: Callable[[int], None]) -> Tensor:
        features_BD = _unit(self._rough(self._pixels(x).bfloat16()).float())
        more(len(x))
        return features_BD


def to_boundary(features_ND: Tensor, head_CD: Tensor) -> Tensor:
    """How far (N) unit features are from the nearest boundary of their class; 0 where they are no numbers."""
    import torch

    cosines_NC = features_ND @ head_CD.T
    best_N1, classes_N1 = cosines_NC.max(1, keepdim=True)
    apart_CC = torch.cdist(head_CD, head_CD, compute_mode="donot_use_mm_for_euclid_dist")
    distance_NC = (best_N1 - cosines_NC) / apart_CC[classes_N1[:, 0]]
    return distance_NC.scatter(1, classes_N1, torch.inf).amin(1).nan_to_num(0, posinf=torch.inf)


def _unit(features_BD: Tensor) -> Tensor:
    from torch.nn.functional import normalize

    return normalize(features_BD, dim=-1)


def _in_bfloat16(tower: nn.Module) -> nn.Module:
    """A copy; convolutions whose windows tile the image are products, which take half as long."""
    from torch.nn import Conv2d

    rough = deepcopy(tower).bfloat16()
    for module in rough.modules():
        if isinstance(module, Conv2d) and module.kernel_size == module.stride != (1, 1):
            if (module.padding, module.dilation, module.groups) == ((0, 0), (1, 1), 1):
                module.forward = partial(_of_patches, module)  # type: ignore[method-assign]
    return rough


def _of_patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What it makes of images (B, channels, H, W)."""
    from torch.nn.functional import linear

    (p, q), (_, _, height, width) = conv.kernel_size, x.shape
    rows, columns = height // p, width // q
    tiles = (
        x.permute(0, 2, 3, 1)[:, : rows * p, : columns * q].unflatten(2, (columns, q)).unflatten(1, (rows, p))
    )
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
    return linear(tiles.transpose(2, 3).flatten(3), weight, conv.bias).permute(0, 3, 1, 2)
