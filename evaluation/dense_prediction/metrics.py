"""How good a prediction of every pixel is: what is kept of each image, and the score of each.

miou               labels: intersection over union of each class, of all images together, the mean over classes
pixel_accuracy     labels: share of the pixels whose likeliest class is the label
f_measure          mask: 2 TP / (2 TP + FP + FN) of an image, 1 where there is nothing and nothing is found (DIBCO)
absolute_error     distances: mean of |predicted - right|, in the data's unit; lower is better, as the next two
relative_error     distances: mean of |predicted - right| / right
angle              normals: mean angle between predicted and right directions, in degrees
psnr               images from 0 to 1: -10 log10 of the mean squared error, in dB, 100 at most
ssim               images: mean structural similarity (Wang et al., 2004), Gaussian window, 11 pixels, deviation 1.5

Pixels that have no right answer do not count (evaluation/dense_prediction/data.py says which). miou is of all images
together: of each image intersections and unions are kept, and `outcomes` makes of all what each image adds.

Shape suffixes: B images of a batch, N of all, K channels of the predictions, H x W pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Literal, Mapping, NamedTuple

import numpy as np

from mergeline.evaluation.measures import Measure

if TYPE_CHECKING:
    from torch import Tensor

Target = Literal["labels", "mask", "distances", "normals", "images"]
MetricName = Literal[
    "miou", "pixel_accuracy", "f_measure", "absolute_error", "relative_error", "angle", "psnr", "ssim"
]
IGNORED = 255  # among labels

_MOST_DB = 100.0
_SSIM_WINDOW, _SSIM_DEVIATION, _SSIM_C1, _SSIM_C2 = 11, 1.5, 0.01**2, 0.03**2


class Metric(NamedTuple):
    """target: what it compares with. measure: what its score is."""

    target: Target
    measure: Measure


METRICS: Mapping[MetricName, Metric] = {
    "miou": Metric("labels", Measure("mIoU")),
    "pixel_accuracy": Metric("labels", Measure("pixel accuracy")),
    "f_measure": Metric("mask", Measure("F-measure")),
    "absolute_error": Metric("distances", Measure("absolute error", better="lower")),
    "relative_error": Metric("distances", Measure("relative error", better="lower")),
    "angle": Metric("normals", Measure("angle", "°", better="lower")),
    "psnr": Metric("images", Measure("PSNR", "dB")),
    "ssim": Metric("images", Measure("SSIM")),
}


def answers(metric: MetricName, predicted_BKHW: Tensor, right: Tensor) -> np.ndarray:
    """What is kept of a batch: scores, float64 (B), or of miou intersections and unions by class, float64 (B, K, 2).

    right: (B, H, W), of normals and images (B, H, W, 3), as evaluation/dense_prediction/data.py keeps it.
    """
    return _KEPT[metric](predicted_BKHW.double(), right).cpu().numpy()


def outcomes(metric: MetricName, answers: np.ndarray) -> np.ndarray:
    """How good each of N images is, (N), larger is better; of errors the negated ones.

    Of miou with intersections I and unions U: the mean over the classes that occur of IoU + (I_n - IoU U_n) / mean U,
    the score and its influence function at an image, so that intervals for the mean are those of the score for large N.
    """
    if metric == "miou":
        inter_NK, union_NK = np.moveaxis(answers.astype(np.float64), -1, 0)
        occurs_K = union_NK.sum(0) > 0
        inter_NK, union_NK = inter_NK[:, occurs_K], union_NK[:, occurs_K]
        iou_K = inter_NK.sum(0) / union_NK.sum(0)
        return (iou_K + (inter_NK - iou_K * union_NK) / union_NK.mean(0)).mean(1)
    turned = METRICS[metric].measure.turned
    return np.array([turned(value) for value in answers], np.float64)


def _miou(predicted_BKHW: Tensor, right_BHW: Tensor) -> Tensor:
    import torch

    found_BHW, counted_BHW = predicted_BKHW.argmax(1), right_BHW != IGNORED
    kept = []
    for k in range(predicted_BKHW.shape[1]):
        found, right = (found_BHW == k) & counted_BHW, right_BHW == k
        kept.append(torch.stack([(found & right).sum((1, 2)), (found | right).sum((1, 2))], 1))
    return torch.stack(kept, 1).double()


def _pixel_accuracy(predicted_BKHW: Tensor, right_BHW: Tensor) -> Tensor:
    return _mean((predicted_BKHW.argmax(1) == right_BHW).double(), right_BHW != IGNORED)


def _f_measure(predicted_BKHW: Tensor, right_BHW: Tensor) -> Tensor:
    import torch

    found = predicted_BKHW[:, 0] > 0 if predicted_BKHW.shape[1] == 1 else predicted_BKHW.argmax(1) == 1
    found, right = found & (right_BHW != IGNORED), right_BHW == 1
    both, either = 2.0 * (found & right).sum((1, 2)), (found.sum((1, 2)) + right.sum((1, 2))).double()
    return torch.where(either == 0, 1.0, both / either.clamp(min=1))


def _absolute_error(predicted_BKHW: Tensor, right_BHW: Tensor) -> Tensor:
    return _mean((predicted_BKHW[:, 0] - right_BHW).abs(), right_BHW > 0)


def _relative_error(predicted_BKHW: Tensor, right_BHW: Tensor) -> Tensor:
    right = right_BHW.double()
    return _mean((predicted_BKHW[:, 0] - right).abs() / right.clamp(min=1e-9), right > 0)


def _angle(predicted_BKHW: Tensor, right_BHW3: Tensor) -> Tensor:
    import torch
    import torch.nn.functional as F

    right = right_BHW3.double().movedim(-1, 1)
    cosine = (F.normalize(predicted_BKHW, dim=1) * F.normalize(right, dim=1)).sum(1)
    return _mean(torch.rad2deg(cosine.clamp(-1, 1).arccos()), right.norm(dim=1) > 0)


def _psnr(predicted_BKHW: Tensor, right_BHW3: Tensor) -> Tensor:
    right = right_BHW3.double().movedim(-1, 1) / 255
    error = (predicted_BKHW.clamp(0, 1) - right).square().mean((1, 2, 3))
    return (-10 * error.clamp(min=1e-30).log10()).clamp(max=_MOST_DB)


def _ssim(predicted_BKHW: Tensor, right_BHW3: Tensor) -> Tensor:
    import torch
    import torch.nn.functional as F

    x, y = predicted_BKHW.clamp(0, 1), right_BHW3.double().movedim(-1, 1) / 255
    place = torch.arange(_SSIM_WINDOW, dtype=x.dtype, device=x.device) - _SSIM_WINDOW // 2
    line = torch.exp(-place.square() / (2 * _SSIM_DEVIATION**2))
    weight = ((line[:, None] * line) / line.sum() ** 2).expand(x.shape[1], 1, -1, -1)

    def local(z: Tensor) -> Tensor:
        return F.conv2d(z, weight, groups=z.shape[1])

    mx, my = local(x), local(y)
    vx, vy, covariance = local(x * x) - mx * mx, local(y * y) - my * my, local(x * y) - mx * my
    above = (2 * mx * my + _SSIM_C1) * (2 * covariance + _SSIM_C2)
    below = (mx * mx + my * my + _SSIM_C1) * (vx + vy + _SSIM_C2)
    return (above / below).mean((1, 2, 3))


def _mean(values_BHW: Tensor, counted_BHW: Tensor) -> Tensor:
    """Mean over the pixels of each image that count; prepared data have some in each."""
    return values_BHW.where(counted_BHW, 0.0).sum((1, 2)) / counted_BHW.sum((1, 2))


_KEPT: Mapping[MetricName, Callable[[Tensor, Tensor], Tensor]] = {
    "miou": _miou,
    "pixel_accuracy": _pixel_accuracy,
    "f_measure": _f_measure,
    "absolute_error": _absolute_error,
    "relative_error": _relative_error,
    "angle": _angle,
    "psnr": _psnr,
    "ssim": _ssim,
}
