"""Names on disk and in memory, beside what transformers calls the tensors of the models that it makes of files."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from model_zoo import TRANSFORMERS
from safetensors import safe_open

from mergeline.merging.architecture.renames import in_memory, memory_name, on_disk

transformers = pytest.importorskip("transformers")

_TEXT = {**TRANSFORMERS["llama"][2]}
_SEEN = {**TRANSFORMERS["vit"][2]}
# Beside those of the zoo
MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TRANSFORMERS["gpt_neox"][2]),
    "gemma3_vlm": (
        "Gemma3ForConditionalGeneration", "Gemma3Config",
        {"text_config": {**_TEXT, "head_dim": 4}, "vision_config": _SEEN, "mm_tokens_per_image": 4},
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration", "Mistral3Config",
        {
            "text_config": {"model_type": "mistral", **_TEXT},
            "vision_config": {"model_type": "pixtral", **_SEEN, "head_dim": 4},
        },
    ),
    "llava_next": (
        "LlavaNextForConditionalGeneration", "LlavaNextConfig",
        {
            "text_config": {"model_type": "mistral", **_TEXT},
            "vision_config": {"model_type": "clip_vision_model", **_SEEN},
        },
    ),
    "llava_qwen_moe": (
        "LlavaForConditionalGeneration", "LlavaConfig",
        {
            "text_config": {"model_type": "mixtral", **_TEXT, "num_local_experts": 4},
            "vision_config": {"model_type": "siglip_vision_model", **_SEEN},
        },
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
        {
            "text_config": _TEXT,
            "vision_config": {
                "depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 1, "patch_size": 2,
            },
        },
    ),
    "beit": ("BeitForImageClassification", "BeitConfig", {**_SEEN, "use_relative_position_bias": True}),
    "deit": ("DeiTForImageClassification", "DeiTConfig", _SEEN),
    "vit_mae": (
        "ViTMAEForPreTraining", "ViTMAEConfig",
        {
            **_SEEN, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4,
            "decoder_intermediate_size": 24,
        },
    ),
    "vit_model": ("ViTModel", "ViTConfig", _SEEN),
    "clip_vision": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", _SEEN),
    "dinov2_registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", _SEEN),
    "swin": (
        "SwinForImageClassification", "SwinConfig",
        {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "image_size": 8, "patch_size": 2, "window_size": 2},
    ),
    "segformer": (
        "SegformerForSemanticSegmentation", "SegformerConfig",
        {
            "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8], "num_attention_heads": [1, 1, 2, 2],
            "decoder_hidden_size": 8,
        },
    ),
}  # fmt: skip
MODELS = {**TRANSFORMERS, **MORE}


@cache
def made(name: str) -> Any:
    kind, config, settings = MODELS[name]
    return getattr(transformers, kind)(getattr(transformers, config)(**settings))


@cache
def saved(name: str, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """The names of a model's file, and its configuration."""
    made(name).save_pretrained(folder / name)
    with safe_open(folder / name / "model.safetensors", "pt") as file:
        return list(file.keys()), json.loads((folder / name / "config.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.mark.parametrize("name", MODELS)
def test_tensors_of_files_are_called_in_memory_as_transformers_calls_them(name, folder):
    names, config = saved(name, folder)
    held = made(name).state_dict()
    kept = {n: t for n, t in held.items() if n not in (made(name).all_tied_weights_keys or {})}
    found = on_disk(names, config)
    assert set(found) <= set(held)
    assert set(kept) <= set(found)


@pytest.mark.parametrize("name", MODELS)
def test_a_name_in_memory_is_left_as_it_is(name, folder):
    _, config = saved(name, folder)
    assert {n: memory_name(n, config) for n in made(name).state_dict()} == {
        n: n for n in made(name).state_dict()
    }


@pytest.mark.parametrize("name", MODELS)
def test_packed_experts_are_made_of_their_parts_in_order(name, folder):
    """The bytes of each part are found in the place that is named."""
    names, config = saved(name, folder)
    held = made(name).state_dict()
    with safe_open(folder / name / "model.safetensors", "pt") as file:
        for part in names:
            place = in_memory(part, config)
            whole, found = held[place.name], file.get_tensor(part)
            whole = whole if place.expert is None else whole[place.expert]
            if place.parts > 1:
                whole = whole.chunk(place.parts)[place.part]
            assert whole.equal(found), part


# Names that files of the hub have, written by older versions, and what transformers 5 makes of them.
PUBLISHED = [
    ("llava", "language_model.model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
    ("llava", "language_model.lm_head.weight", "lm_head.weight"),
    ("llava", "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight",
     "model.vision_tower.encoder.layers.1.mlp.fc1.weight"),
    ("llava", "model.vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight",
     "model.vision_tower.encoder.layers.1.mlp.fc1.weight"),
    ("gemma3_vlm", "vision_tower.vision_model.embeddings.patch_embedding.bias",
     "model.vision_tower.embeddings.patch_embedding.bias"),
    ("llava_qwen_moe", "language_model.model.layers.1.block_sparse_moe.gate.weight",
     "model.language_model.layers.1.mlp.gate.weight"),
    ("qwen2_vl", "visual.blocks.0.attn.qkv.weight", "model.visual.blocks.0.attn.qkv.weight"),
    ("qwen2_vl", "model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
    ("bert", "bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "published", "name"), PUBLISHED)
def test_names_of_older_files(model, published, name, folder):
    _, config = saved(model, folder)
    assert name in made(model).state_dict()
    assert memory_name(published, config) == name


def test_nothing_is_supposed_of_models_that_no_row_knows():
    for config in (
        {},
        {"model_type": "new"},
        {"architectures": "x", "model_type": 3},
        {"architectures": [None]},
    ):
        assert (
            memory_name("language_model.model.layers.0.weight", config)
            == "language_model.model.layers.0.weight"
        )
