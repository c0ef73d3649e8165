"""Scores of every pixel are those of their formulas, and images that have no right answer somewhere do not suffer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeline.evaluation.dense_prediction.metrics import IGNORED, METRICS, answers, outcomes
from mergeline.evaluation.dense_prediction.settings import Task

SIZE = 16


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(seed: int, count: int, classes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(classes, (count, SIZE, SIZE), generator=generator)
    ignored = torch.rand(found.shape, generator=generator) < 0.2
    return torch.where(ignored, IGNORED, found).to(torch.uint8)


def score(metric, predicted, right) -> float:
    found = outcomes(metric, answers(metric, predicted, right)).mean()
    return METRICS[metric].measure.turned(float(found))


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 5))
def test_miou_is_that_of_all_pixels_together(seed, count, classes):
    predicted, right = drawn(seed, count, classes, SIZE, SIZE), labels(seed, count, classes)
    counted = right != IGNORED
    found, wanted = predicted.argmax(1)[counted].numpy(), right[counted].numpy()
    matrix = np.zeros((classes, classes))
    np.add.at(matrix, (wanted, found), 1)
    union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    occurs = union > 0
    iou = np.diag(matrix)[occurs] / union[occurs]
    assert score("miou", predicted, right) == pytest.approx(iou.mean(), abs=1e-9)
    accuracy = np.mean(
        [(f == w)[w != IGNORED].mean() for f, w in zip(predicted.argmax(1).numpy(), right.numpy())]
    )
    assert score("pixel_accuracy", predicted, right) == pytest.approx(accuracy, abs=1e-9)


def test_intervals_of_miou_are_those_of_resampled_images():
    count, classes = 400, 3
    right = labels(0, count, classes)
    right = torch.where(drawn(1, count)[:, None, None] > 0.5, right, (right // 2).to(torch.uint8))
    sure = torch.rand(count, generator=torch.Generator().manual_seed(2))[:, None, None, None] * 3
    one_hot = torch.nn.functional.one_hot(right.long().clamp(max=classes - 1), classes).movedim(-1, 1)
    kept = answers("miou", one_hot * sure + drawn(3, count, classes, SIZE, SIZE), right)
    random = np.random.default_rng(0)
    scores = [outcomes("miou", kept[random.integers(0, count, count)]).mean() for _ in range(400)]
    assert np.std(scores) == pytest.approx(outcomes("miou", kept).std() / np.sqrt(count), rel=0.1)


def test_what_is_measured_does_not_depend_on_batches():
    right = labels(4, 6, 3)
    predicted = drawn(5, 6, 3, SIZE, SIZE)
    whole = answers("miou", predicted, right)
    parts = [answers("miou", predicted[i : i + 1], right[i : i + 1]) for i in range(6)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_f_measure_is_that_of_each_image():
    right = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    right[0, :4], right[1, 0, 0] = 1, IGNORED
    maps = -torch.ones(3, 1, SIZE, SIZE)
    maps[0, 0, 2:6] = 1  # half of what is there, and as much that is not
    maps[1, 0, 0, 0] = 1  # where nothing is asked
    found = answers("f_measure", maps, right)
    assert found.tolist() == [0.5, 1.0, 1.0]
    two = torch.cat([-maps, maps], 1)
    assert np.array_equal(answers("f_measure", two, right), found)


def test_distances_and_directions():
    right = drawn(6, 2, SIZE, SIZE).abs() + 1
    right[:, 0] = 0  # not measured
    predicted = (right + 0.5)[:, None]
    assert score("absolute_error", predicted, right) == pytest.approx(0.5)
    assert score("relative_error", predicted, right) == pytest.approx(
        float((0.5 / right[:, 1:]).mean()), rel=1e-6
    )
    directions = torch.zeros(1, SIZE, SIZE, 3)
    directions[..., 1:, 2] = 1.0
    turned = torch.zeros(1, 3, SIZE, SIZE)
    turned[:, 0], turned[:, 2] = 5.0, 5.0  # 45 degrees, whatever its length
    assert score("angle", turned, directions) == pytest.approx(45.0, abs=1e-6)


def test_psnr_and_ssim():
    right = torch.randint(
        256, (2, SIZE, SIZE, 3), generator=torch.Generator().manual_seed(7), dtype=torch.uint8
    )
    same = right.movedim(-1, 1) / 255
    assert score("psnr", same, right) == 100.0 and score("ssim", same, right) == pytest.approx(1.0)
    grey = torch.full_like(right, 128)
    assert score("psnr", grey.movedim(-1, 1) / 255 + 0.1, grey) == pytest.approx(20.0, abs=1e-5)
    # Computed with scikit-image 0.26: structural_similarity(gaussian_weights=True, sigma=1.5,
    # use_sample_covariance=False, data_range=1, channel_axis=-1), the border of five pixels left out.
    ramp = torch.arange(SIZE).repeat(SIZE, 1) * 10
    bent = torch.stack([ramp, ramp.T, (ramp + ramp.T) // 2], -1)[None].to(torch.uint8)
    shifted = (bent.float() / 255 * 0.7 + 0.1).movedim(-1, 1)
    assert score("ssim", shifted, bent) == pytest.approx(0.9470232764, abs=1e-6)


def test_zero_and_one_make_scores_comparable():
    kept = np.array([30.0, 45.0])
    assert Task(metric="angle", zero=60, one=15).outcomes(kept) == pytest.approx([2 / 3, 1 / 3])
    assert Task(metric="psnr", zero=20, one=30).outcomes(kept) == pytest.approx([1.0, 2.5])
    assert Task(metric="angle").outcomes(kept).tolist() == [-30.0, -45.0]
    assert Task(metric="angle", zero=60, one=15).measure.better == "higher"
    for wrong in ({"zero": 1.0}, {"zero": 2.0, "one": 2.0}, {"zero": float("nan"), "one": 2.0}):
        with pytest.raises(ValueError):
            Task(metric="psnr", **wrong)
