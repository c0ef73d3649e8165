import json

import pytest
import torch

from mergeline.evaluation.clip.layouts import is_transformers, open_clip_config, to_open_clip
from mergeline.merging.errors import UserError

WIDTHS = dict(num_hidden_layers=2, projection_dim=16)


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def clip(request):
    from transformers import CLIPConfig, CLIPModel

    act = {"hidden_act": request.param}
    text = WIDTHS | act | dict(hidden_size=32, intermediate_size=80, num_attention_heads=2)
    text |= dict(vocab_size=99, max_position_embeddings=12, bos_token_id=97, eos_token_id=98)
    vision = WIDTHS | act | dict(hidden_size=48, intermediate_size=96, num_attention_heads=3)
    vision |= dict(image_size=24, patch_size=8, layer_norm_eps=1e-6)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    for parameter in model.parameters():  # the initial values would hide swapped biases and norms
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_both_towers_give_the_same_features(clip):
    from open_clip import CLIP

    model = CLIP(**open_clip_config(clip.config.to_dict())["model_cfg"]).eval()
    model.load_state_dict(to_open_clip(clip.state_dict()))
    images, tokens = torch.randn(4, 3, 24, 24), torch.randint(1, 97, (4, 12))
    tokens[:, 0], tokens[range(4), [4, 7, 9, 11]] = 97, 98
    with torch.inference_mode():
        pairs = [
            (model.encode_image(images), clip.get_image_features(images).pooler_output),
            (model.encode_text(tokens), clip.get_text_features(tokens).pooler_output),
        ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_configuration_on_disk_leaves_out_nothing_that_matters(clip, tmp_path):
    clip.config.save_pretrained(tmp_path)
    assert open_clip_config(json.loads((tmp_path / "config.json").read_text())) == open_clip_config(
        clip.config.to_dict()
    )


def test_defaults_are_those_of_vit_b_32():
    from open_clip import get_model_config
    from transformers import CLIPConfig

    ours = open_clip_config({"model_type": "clip"})
    assert ours == open_clip_config(CLIPConfig().to_dict())
    theirs = get_model_config("ViT-B-32-quickgelu")
    for tower in ("vision_cfg", "text_cfg"):
        assert theirs[tower].items() <= ours["model_cfg"][tower].items()
    assert ours["model_cfg"]["embed_dim"] == theirs["embed_dim"] and ours["model_cfg"]["quick_gelu"]
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    assert ours["preprocess_cfg"]["mean"] == list(OPENAI_DATASET_MEAN)
    assert ours["preprocess_cfg"]["std"] == list(OPENAI_DATASET_STD)


def test_pixel_statistics_come_from_the_preprocessor():
    config = open_clip_config({"model_type": "clip"}, {"image_mean": [0.5] * 3, "image_std": [0.25] * 3})
    assert config["preprocess_cfg"]["mean"] == [0.5] * 3 and config["preprocess_cfg"]["std"] == [0.25] * 3


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPVisionModelWithProjection"])
def test_an_image_tower_alone_gets_the_names_of_the_whole(clip, kind, tmp_path):
    import transformers
    from safetensors.torch import load_file

    tower = getattr(transformers, kind)(clip.config.vision_config)
    tower.load_state_dict(clip.state_dict(), strict=False)
    tower.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    ours, whole = to_open_clip(saved), to_open_clip(clip.state_dict())
    projection = {"visual.proj"} if kind == "CLIPVisionModel" else set()
    assert is_transformers(saved) and ours.keys() | projection == {
        n for n in whole if n.startswith("visual.")
    }
    assert all(ours[name].shape == whole[name].shape for name in ours)


def test_old_checkpoints_hold_position_ids(clip):
    old = {"vision_model.embeddings.position_ids": torch.arange(10)[None]} | clip.state_dict()
    assert to_open_clip(old).keys() == to_open_clip(clip.state_dict()).keys()


def test_the_two_layouts_are_told_apart(clip):
    assert is_transformers(clip.state_dict()) and not is_transformers(to_open_clip(clip.state_dict()))


def test_what_is_not_clip_is_refused(clip):
    state = clip.state_dict()
    with pytest.raises(UserError, match="did you mean 'logit_scale'"):
        to_open_clip(state | {"logit_scal": torch.zeros(1)})
    with pytest.raises(
        UserError, match="'vision_model.encoder.layers.0.self_attn.rotary.weight' is no tensor"
    ):
        to_open_clip({"vision_model.encoder.layers.0.self_attn.rotary.weight": torch.zeros(1)})
    del state["vision_model.encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(UserError, match="resblocks.1.attn.in_proj_bias: .* has q, v"):
        to_open_clip(state)
    with pytest.raises(UserError, match="'clip_vision_model', not 'clip'"):
        open_clip_config({"model_type": "clip_vision_model"})
    with pytest.raises(UserError, match="gelu_new and quick_gelu"):
        open_clip_config({"model_type": "clip", "text_config": {"hidden_act": "gelu_new"}})
