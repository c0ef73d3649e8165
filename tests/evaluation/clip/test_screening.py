"""Features in bfloat16 beside those in float32: no class differs, whatever the tower and wherever the boundaries."""

import numpy as np
import open_clip
import pytest
import torch
from places import SAMPLES
from torch.nn.functional import normalize

from mergeline.evaluation import datasets
from mergeline.evaluation.clip import zero_shot
from mergeline.evaluation.clip.screening import Screen, _of_patches, to_boundary
from mergeline.evaluation.clip.suite import load_suite
from mergeline.evaluation.clip.zero_shot import Evaluator, build_heads, load_config
from mergeline.evaluation.pixels import Pixels
from mergeline.evaluation.state import load_state

BASE = SAMPLES / "base"
PIXELS = Pixels([0.5] * 3, [0.25] * 3, "cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (300, 36, 36, 3), np.uint8)


def tower(seed=0, quick_gelu=False, **change):
    torch.manual_seed(seed)
    config = load_config(BASE)["model_cfg"]
    config = {**config, "vision_cfg": {**config["vision_cfg"], **change}, "quick_gelu": quick_gelu}
    visual = open_clip.CLIP(**config).eval().requires_grad_(False).visual
    zero_shot._skip_unused_tokens(visual)
    return visual


def features_of(visual, images=IMAGES):
    with torch.inference_mode():
        return normalize(visual(PIXELS(images)), dim=-1)


def screened(visual, head, images=IMAGES):
    """The features that a screen finds, how many images float32 was run on, and the screen."""
    screen, seen = Screen(visual, PIXELS, 100), []
    hook = visual.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    with torch.inference_mode():
        found = screen.features({"task": images}, {"task": head}, lambda count: None)["task"]
    hook.remove()
    return found, sum(seen), screen


def classes(features, head):
    return (features @ head.T).argmax(1)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"quick_gelu": True},
        {"ls_init_value": 0.5},
        {"pool_type": "avg"},
        {"attentional_pool": True},
        {"qk_norm": True},
        {"patch_size": 7},
        {"image_size": 32, "width": 16, "layers": [1, 1, 1, 1]},
        {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear"},
        {"timm_model_name": "convnext_atto", "timm_pool": "avg", "timm_proj": "linear"},
    ],
    ids=str,
)
def test_classes_of_random_towers_are_those_of_float32(change):
    visual, size = tower(**change), change.get("image_size", 36)
    images = IMAGES[:, :size, :size]
    exact = features_of(visual, images)
    head = exact[::20]  # where images are, so that there are boundaries between them
    found, _, _ = screened(visual, head, images)
    assert torch.equal(classes(found, head), classes(exact, head))
    torch.testing.assert_close(found, exact, atol=0.02, rtol=0)


def test_images_at_a_boundary_are_run_again():
    """The boundary goes through the middle of the images, so that bfloat16 alone errs."""
    visual = tower()
    exact = features_of(visual)
    normal = exact.std(0) * torch.randn(128, generator=torch.Generator().manual_seed(1))
    normal -= (exact @ normal).median() * exact.mean(0) / exact.mean(0).square().sum()
    head = normalize(torch.stack([exact.mean(0) + normal, exact.mean(0) - normal]), dim=-1)
    found, again, screen = screened(visual, head)
    rough = normalize(screen._rough(PIXELS(IMAGES).bfloat16()).float(), dim=-1)
    assert not torch.equal(classes(rough, head), classes(exact, head))
    assert torch.equal(classes(found, head), classes(exact, head))
    moved = (rough - exact).norm(dim=1).mean()
    assert again >= (to_boundary(exact, head) < moved / 2).sum() > 16
    assert screen.pays == (3 * again <= len(IMAGES))


def test_few_images_are_run_again_where_classes_lie_apart():
    visual = tower()
    exact = features_of(visual)
    head = normalize(torch.stack([exact.mean(0), -exact.mean(0)]), dim=-1)
    _, again, screen = screened(visual, head)
    assert again == 16 and screen.pays


def test_a_model_that_is_no_numbers_is_told_as_in_float32():
    visual = tower()
    visual.proj.fill_(torch.nan)
    head = normalize(torch.randn(3, 128), dim=-1)
    found, again, screen = screened(visual, head)
    assert torch.equal(classes(found, head), classes(features_of(visual), head))
    assert again == len(IMAGES) and not screen.pays


def test_the_boundary_is_where_the_class_changes():
    torch.manual_seed(0)
    head, features = (normalize(torch.randn(n, 16, dtype=torch.float64), dim=-1) for n in (5, 40))
    own, distance = classes(features, head), to_boundary(features, head)
    towards = torch.stack([normalize(head - head[a], dim=-1) for a in own])  # every other class, (N, C, D)
    for share, changes in ((0.999, False), (1.001, True)):
        moved = features[:, None] + share * distance[:, None, None] * towards
        assert ((moved @ head.T).argmax(2) != own[:, None]).any(1).eq(changes).all()
    assert to_boundary(features, head[:1]).isinf().all()
    assert (to_boundary(features, head[[0, 0]]) == 0).all()


@pytest.mark.parametrize("size", [(36, 36), (40, 31)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_of_tiles_is_a_product(size, bias):
    torch.manual_seed(0)
    conv, images = torch.nn.Conv2d(3, 8, (12, 6), (12, 6), bias=bias), torch.randn(2, 3, *size)
    torch.testing.assert_close(_of_patches(conv, images), conv(images), atol=1e-5, rtol=1e-5)


# The evaluator


@pytest.fixture(scope="module")
def evaluators(tmp_path_factory):
    """With and without a screen, on two tasks."""
    root, suite, tasks = (
        tmp_path_factory.mktemp("data"),
        load_suite(SAMPLES / "suite.yaml"),
        ["digits", "shapes"],
    )
    for task in tasks:
        datasets.prepare(str(SAMPLES / f"data/{task}.npz"), root / task, 36)
    data, heads = {task: datasets.load(root / task) for task in tasks}, build_heads(BASE, suite, {})
    found = []
    for screen in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(zero_shot, "has_bfloat16", lambda device, screen=screen: screen)
            found.append(Evaluator(BASE, heads, data))
    return found


def digits():
    return load_state(SAMPLES / "experts/digits.safetensors")


@pytest.mark.parametrize("state", [dict, digits])
def test_predictions_are_the_same_with_and_without(evaluators, state):
    assert evaluators[0]._screen and not evaluators[1]._screen
    one, other = (evaluator.predict(state(), "val", ["digits", "shapes"]) for evaluator in evaluators)
    assert one.keys() == other.keys() and all(np.array_equal(one[task], other[task]) for task in one)
    assert all(own.dtype == np.int32 for own in one.values())


def test_of_no_tasks_nothing_is_predicted(evaluators):
    assert [evaluator.predict({}, "val", []) for evaluator in evaluators] == [{}, {}]


def test_where_it_does_not_pay_float32_is_all(evaluators, monkeypatch):
    monkeypatch.setattr(Screen, "pays", False)
    monkeypatch.setattr(Screen, "features", lambda *_: pytest.fail("it runs bfloat16"))
    one, other = (evaluator.predict({}, "val", ["digits"])["digits"] for evaluator in evaluators)
    assert np.array_equal(one, other)


def test_parts_may_be_empty(evaluators):
    part = {"digits": np.array([3, 1]), "shapes": np.array([], np.int64)}
    counts = []
    one, other = (evaluator.predict({}, "val", [*part], counts.append, part=part) for evaluator in evaluators)
    assert all(np.array_equal(one[task], other[task]) for task in part) and sum(counts) == 4


def test_what_is_added_to_the_tower_is_there_for_every_image(evaluators):
    from contextlib import contextmanager

    counted = []

    @contextmanager
    def around(visual, task):
        hook = visual.register_forward_hook(lambda _module, inputs, _output: counted.append(len(inputs[0])))
        yield
        hook.remove()

    evaluators[0].predict({}, "val", ["digits"], around=around)
    assert sum(counted) == len(evaluators[0].data["digits"].split("val")[1])
