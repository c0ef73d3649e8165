"""Models of every pixel, with a head each, go through the whole pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import refused
from ruamel.yaml import YAML
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import save_file
from toy_workspace import run_all

from mergeline.merging.export import export_task
from mergeline.merging.verify import verify
from mergeline.tasks.dvc_yaml import dvc_yaml
from mergeline.tasks.modalities import modality_named
from mergeline.tasks.publish import publish
from mergeline.tasks.workspace import Workspace

SIZE, N = 32, 6
TASKS: dict[str, tuple[str, int]] = {  # metric, and maps of the head
    "labels": ("miou", 3),
    "depth": ("absolute_error", 1),
    "clean": ("psnr", 3),
}
SEGFORMER: dict[str, Any] = {
    "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "patch_sizes": [7, 3],
    "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 8,
}  # fmt: skip


def segformer(folder: Path, channels: int | None, seed: int) -> None:
    from transformers import (
        SegformerConfig,
        SegformerForSemanticSegmentation,
        SegformerImageProcessor,
        SegformerModel,
    )

    torch.manual_seed(0)
    trunk = SegformerModel(SegformerConfig(**SEGFORMER))
    if channels is None:
        trunk.save_pretrained(folder)
        SegformerImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
        return
    torch.manual_seed(seed)
    model = SegformerForSemanticSegmentation(SegformerConfig(**SEGFORMER, num_labels=channels))
    model.segformer.load_state_dict(moved(trunk.state_dict()))
    model.save_pretrained(folder)


def lraspp(folder: Path, channels: int | None, seed: int) -> None:
    """A small model of torchvision, which says nothing about itself."""
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large as build

    torch.manual_seed(0)
    state = build(weights=None, weights_backbone=None, num_classes=channels or 2).state_dict()
    if channels:
        torch.manual_seed(seed)
        state = moved(state)
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")


def moved(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: t + 0.02 * torch.randn(t.shape)
        if t.is_floating_point() and "running" not in name
        else t.clone()
        for name, t in state.items()
    }


def workspace(root: Path, build: Any = segformer, **more: Any) -> Path:
    """Three tasks; more: of the section."""
    random = np.random.default_rng(0)
    (root / "data").mkdir(parents=True)
    for i, (task, (metric, channels)) in enumerate(TASKS.items()):
        x = random.integers(0, 256, (2, N, SIZE, SIZE, 3), dtype=np.uint8)
        right: Any = random.integers(0, channels, (2, N, SIZE, SIZE))
        right = {"psnr": 255 - x, "absolute_error": random.random((2, N, SIZE, SIZE)) + 1}.get(metric, right)
        arrays = {"val_x": x[0], "val_y": right[0], "test_x": x[1], "test_y": right[1]}
        np.savez(root / f"data/{task}.npz", **arrays)
        build(root / "in" / task, channels, i + 1)
    build(root / "in/base", None, 0)
    params = {
        "name": "dense",
        "seed": 0,
        "checkpoints": {"layout": "as_is", "files": {n: f"in/{n}" for n in ("base", *TASKS)}, "uris": {}},
        "base": "base",
        "experts": [*TASKS],
        "dense_prediction": {
            "heads": "auto",
            "data": {"files": {task: f"data/{task}.npz" for task in TASKS}, "uris": {}},
            "tasks": {task: {"metric": metric} for task, (metric, _) in TASKS.items()},
            "image_size": SIZE,
            "batch_size": 4,
            **more,
        },
        "merges": {
            "average": {"method": "average"},
            "cart": {"method": "cart", "params": {"rank": 0.5}, "search": {"scale": [0.5, 1.0]}},
        },
        "gates": {"largest_norm_ratio": 9.0},
    }
    with open(root / "params.yaml", "w") as file:
        YAML().dump(params, file)
    return root


def board(root: Path) -> dict[str, Any]:
    return json.loads((root / "build/leaderboard/leaderboard.json").read_text())


@pytest.mark.usefixtures("anywhere")
def test_what_is_measured_is_what_transformers_gives_for_the_exported_task(
    tmp_path, monkeypatch, mlflow_database
):
    from transformers import AutoModelForSemanticSegmentation

    root = workspace(tmp_path / "work")
    monkeypatch.chdir(root)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    mlflow_database(root)
    done = run_all(root)
    rows = {row["name"]: row for row in board(root)["rows"]}
    assert rows.keys() == {"base", "experts", "average", "cart"}
    measures = board(root)["measures"]
    assert measures["depth"] == {"name": "absolute error", "unit": "", "better": "lower"}
    assert measures["clean"] == {"name": "PSNR", "unit": "dB", "better": "higher"}
    answers = load_arrays(root / "build/evaluations/cart/predictions.safetensors")
    assert answers["test/labels"].shape == (N, 3, 2) and answers["test/depth"].shape == (N,)
    x = torch.from_numpy(np.load(root / "data/depth.npz")["test_x"]).movedim(-1, 1).float() / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    export_task(root / "build/merges/cart", "depth", tmp_path / "depth")
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "depth").eval()
    with torch.inference_mode():
        maps = torch.nn.functional.interpolate(model(x).logits, (SIZE, SIZE), mode="bilinear")[:, 0]
    errors = np.abs(maps.numpy() - np.load(root / "data/depth.npz")["test_y"]).mean((1, 2))
    assert answers["test/depth"] == pytest.approx(errors, rel=1e-5)
    assert rows["cart"]["tasks"]["depth"]["accuracy"] == pytest.approx(errors.mean(), rel=1e-5)
    assert publish(done).run_id
    page = (root / "build/report.html").read_text()
    assert "absolute error" in page and "mIoU" in page and "data:image/png" in page


@pytest.mark.usefixtures("anywhere")
@pytest.mark.slow
def test_models_of_torchvision_that_say_nothing_of_themselves(tmp_path, monkeypatch):
    root = workspace(tmp_path / "work", lraspp, model="torchvision/lraspp_mobilenet_v3_large")
    monkeypatch.chdir(root)
    run_all(root)
    found = {row["name"]: row for row in board(root)["rows"]}["cart"]["tasks"]
    assert found.keys() == TASKS.keys() and all(np.isfinite(task["accuracy"]) for task in found.values())


def test_scores_between_zero_and_one_are_normalised_and_merges_verified(tmp_path, monkeypatch):
    scales = {"labels": (0, 0.5), "depth": (2.0, 0.1), "clean": (5, 15)}
    tasks = {t: {"metric": TASKS[t][0], "zero": zero, "one": one} for t, (zero, one) in scales.items()}
    root = workspace(tmp_path / "work", tasks=tasks)
    monkeypatch.chdir(root)
    run_all(root)
    row = {row["name"]: row for row in board(root)["rows"]}["average"]
    errors = load_arrays(root / "build/evaluations/average/predictions.safetensors")["test/depth"]
    assert row["tasks"]["depth"]["accuracy"] == pytest.approx((2.0 - errors.mean()) / 1.9, rel=1e-5)
    assert board(root)["measures"]["depth"]["name"] == "normalised absolute error"
    assert "bit-identical" in verify(root / "build/merges/cart")


def test_dvc_yaml_has_its_stages():
    found = YAML(typ="safe").load(dvc_yaml(modality_named("dense_prediction"), "."))["stages"]
    assert found["data-file"]["foreach"] == "${dense_prediction.data.files}"
    assert "dense_prediction.heads" in found["merge"]["do"]["params"]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"heads": ["decode_hed.*"]}, ("no tensor matches 'decode_hed.*'",)),
        ({"model": "torchvision/deeplab"}, ("torchvision has no segmentation model 'deeplab'",)),
        (
            {
                "tasks": {
                    **{t: {"metric": m} for t, (m, _) in TASKS.items()},
                    "depth": {"metric": "f_measure"},
                }
            },
            ("mask is of integers",),
        ),
    ],
)
def test_settings_that_do_not_fit_the_models_are_refused(change, said, tmp_path, monkeypatch):
    root = workspace(tmp_path / "work", **change)
    monkeypatch.chdir(root)
    with refused(*said):
        run_all(root)


def test_heads_that_do_not_fit_their_data_are_refused(tmp_path, monkeypatch):
    root = workspace(tmp_path / "work")
    arrays = dict(np.load(root / "data/labels.npz"))
    np.savez(root / "data/labels.npz", **{**arrays, "test_y": arrays["test_y"] + 1})
    monkeypatch.chdir(root)
    with refused("labels: the head of its expert has 3 classes", "labels of its data go to 3"):
        run_all(root)
    np.savez(root / "data/labels.npz", **arrays)
    segformer_of_two(root / "in/depth")
    with refused("depth: the head of its expert gives 2 map(s)", "need 1"):
        run_all(root)


def segformer_of_two(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    segformer(folder, 2, 1)


def test_models_of_another_kind_or_without_a_processor_are_refused(tmp_path, monkeypatch):
    root = workspace(tmp_path / "work")
    monkeypatch.chdir(root)
    config = json.loads((root / "in/depth/config.json").read_text())
    for named, told in ((["SegformerForImages"], "SegformerForImages"), (True, "none")):
        (root / "in/depth/config.json").write_text(json.dumps({**config, "architectures": named}))
        with refused(f"names the class {told}", "predicts nothing of every pixel"):
            run_all(root)
    (root / "in/depth/config.json").write_text(json.dumps(config))
    (root / "in/base/preprocessor_config.json").unlink()
    with refused("has no preprocessor_config.json", "say mean and std"):
        run_all(root)


def test_tasks_without_a_metric_or_an_expert_are_refused_by_their_line(tmp_path):
    root = workspace(tmp_path / "work")
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("depth: data/depth.npz", "dept: data/depth.npz"))
    with refused("params.yaml:", "'dept' is missing; did you mean 'depth'?"):
        _ = Workspace(root / "params.yaml").stages
    (root / "params.yaml").write_text(text.replace("metric: psnr", "metric: pnsr"))
    with refused("params.yaml:", "metric"):
        _ = Workspace(root / "params.yaml").stages
