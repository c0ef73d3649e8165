"""Models of every pixel open by the class that made them, and their maps are as large as the images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import refused
from safetensors.torch import save_file

from mergeline.evaluation.dense_prediction.models import open_predictor, refuse_channels
from mergeline.evaluation.state import load_state

SIZE = 32
SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 8,
}  # fmt: skip
WIDE = {**SMALL, "intermediate_size": 32}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
SLIM: dict[str, Any] = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}


def dpt(t: Any) -> Any:
    return t.DPTConfig(**WIDE, **SLIM, backbone_out_indices=[0, 1, 2, 3], num_labels=5)


TRANSFORMERS = {
    "dpt_depth": (1, lambda t: t.DPTForDepthEstimation(dpt(t))),
    "dpt_labels": (5, lambda t: t.DPTForSemanticSegmentation(dpt(t))),
    "glpn": (1, lambda t: t.GLPNForDepthEstimation(t.GLPNConfig(
        depths=[1] * 4, hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=8,
    ))),
    "swin2sr": (3, lambda t: t.Swin2SRForImageSuperResolution(t.Swin2SRConfig(
        image_size=SIZE, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4, upscale=1, upsampler="",
    ))),
    "beit": (5, lambda t: t.BeitForSemanticSegmentation(t.BeitConfig(
        **WIDE, num_labels=5, out_indices=[1, 2, 3, 4], pool_scales=[1, 2],
    ))),
    "upernet": (5, lambda t: t.UperNetForSemanticSegmentation(t.UperNetConfig(
        backbone_config=t.ConvNextConfig(depths=[1] * 4, hidden_sizes=[8, 8, 16, 16], out_features=STAGES),
        hidden_size=8, num_labels=5, pool_scales=[1, 2], auxiliary_channels=8, auxiliary_in_channels=16,
    ))),
    "depth_anything": (1, lambda t: t.DepthAnythingForDepthEstimation(t.DepthAnythingConfig(
        backbone_config=t.Dinov2Config(**SMALL, out_features=STAGES, reshape_hidden_states=False),
        **SLIM, reassemble_hidden_size=16, head_hidden_size=8, patch_size=8,
    ))),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_models_of_transformers(name, tmp_path):
    import transformers

    channels, make = TRANSFORMERS[name]
    torch.manual_seed(0)
    model = make(transformers).eval()
    model.save_pretrained(tmp_path)
    predictor = open_predictor(tmp_path, "auto", {}, "cpu")
    predictor.load(load_state(tmp_path), tmp_path)
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.inference_mode():
        maps, own = predictor.predicted(images), model(images)
    assert maps.shape == (2, channels, SIZE, SIZE)
    found = own.logits if "logits" in own else own.get("predicted_depth", own.get("reconstruction"))
    found = found[:, None] if found.ndim == 3 else found
    assert torch.allclose(
        maps, torch.nn.functional.interpolate(found, (SIZE, SIZE), mode="bilinear"), atol=1e-5
    )


@pytest.mark.parametrize("aux", [True, False])
@pytest.mark.parametrize(
    "name", ["fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"]
)
def test_models_of_torchvision(name, aux, tmp_path):
    from torchvision import models

    more = {} if name.startswith("lraspp") else {"aux_loss": aux}
    model = models.get_model(name, weights=None, weights_backbone=None, num_classes=4, **more).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    state = load_state(tmp_path)
    heads = ("classifier.", "aux_classifier.")
    head = {key: tensor for key, tensor in state.items() if key.startswith(heads)}
    images = torch.randn(1, 3, SIZE, SIZE)
    with torch.inference_mode():
        maps = open_predictor(tmp_path, f"torchvision/{name}", head, "cpu").predicted(images)
        assert torch.equal(maps, model(images)["out"])
    with refused("is not among its heads"):
        open_predictor(tmp_path, f"torchvision/{name}", {}, "cpu")


def test_channels_must_be_able_to_say_what_is_asked_for():
    refuse_channels("rooms", "labels", 5, 5)
    refuse_channels("ink", "mask", 1, 0)
    for target, channels, classes, said in [
        ("labels", 4, 5, "has 4 classes, and the labels of its data go to 4"),
        ("mask", 3, 0, "gives 3 map(s), and mask need 1 or 2"),
        ("normals", 1, 0, "gives 1 map(s), and normals need 3"),
    ]:
        with refused(said):
            refuse_channels("task", target, channels, classes)
