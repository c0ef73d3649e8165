"""CLIP checkpoints of Hugging Face transformers, by the names and shapes of open_clip.

transformers keeps query, key and value apart where open_clip packs them into attn.in_proj, and transposes the
projections. Sources: CLIPModel in transformers, CLIP in open_clip.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Iterable, Mapping

from mergeline.merging.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

# What transformers leaves out of config.json is the default of CLIPTextConfig and CLIPVisionConfig.
_TEXT = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
    "max_position_embeddings": 77, "vocab_size": 49408, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
_VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip

_OPENAI_MEAN = [0.48145466, 0.4578275, 0.40821073]
_OPENAI_STD = [0.26862954, 0.26130258, 0.27577711]

_NAMES = {
    "logit_scale": "logit_scale",
    "text_projection.weight": "text_projection",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
}
_TOWERS = {"text_model": "transformer", "vision_model": "visual.transformer"}
_IN_BLOCK = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_TRANSPOSED = ("text_projection.weight", "visual_projection.weight")
_BLOCK = re.compile(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def is_transformers(names: Iterable[str]) -> bool:
    """Whether tensor names are those of transformers' CLIPModel, or of one of its towers."""
    return any("encoder.layers.0.self_attn.q_proj.weight" in name for name in names)


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a CLIPModel, CLIPVisionModelWithProjection or CLIPVisionModel as open_clip has them.

    A CLIPVisionModel has no projection; visual.proj is then absent from the result, too.

    Raises:
        UserError: a tensor that CLIP has not, or a query, key or value without the other two.
    """
    # CLIPVisionModel is saved without the name of its tower since transformers 5.
    prefix = "vision_model." if "embeddings.class_embedding" in state else ""
    packed: dict[str, dict[str, Tensor]] = {}
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        full = prefix + name
        if full.endswith("embeddings.position_ids"):  # 0, 1, 2, ...: no weight
            continue
        target, part = _rename(full)
        if part:
            packed.setdefault(target, {})[part] = value
        else:
            result[target] = value.T.contiguous() if full in _TRANSPOSED else value
    for target, parts in packed.items():
        result[target] = _pack(target, parts)
    return result


def open_clip_config(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """open_clip_config.json of a CLIPModel, from its config.json and preprocessor_config.json.

    Raises:
        UserError: not the configuration of a whole CLIPModel, or one that open_clip cannot express.
    """
    if config.get("model_type") != "clip":
        raise UserError(
            f"config.json: model_type is '{config.get('model_type')}', not 'clip' (a whole CLIPModel)"
        )
    text, vision = _TEXT | (config.get("text_config") or {}), _VISION | (config.get("vision_config") or {})
    activations = {text["hidden_act"], vision["hidden_act"]}
    if len(activations) > 1 or not activations <= {"gelu", "quick_gelu"}:
        raise UserError(
            f"config.json: open_clip has no model with hidden_act {' and '.join(sorted(activations))}"
        )
    preprocessor = preprocessor or {}
    return {
        "model_cfg": {
            "embed_dim": config.get("projection_dim", 512),
            "quick_gelu": activations == {"quick_gelu"},
            "vision_cfg": {
                **_tower(vision),
                "head_width": vision["hidden_size"] // vision["num_attention_heads"],
                "image_size": vision["image_size"],
                "patch_size": vision["patch_size"],
            },
            "text_cfg": {
                **_tower(text),
                "heads": text["num_attention_heads"],
                "context_length": text["max_position_embeddings"],
                "vocab_size": text["vocab_size"],
            },
        },
        "preprocess_cfg": {
            "size": vision["image_size"],
            "mean": preprocessor.get("image_mean", _OPENAI_MEAN),
            "std": preprocessor.get("image_std", _OPENAI_STD),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def _tower(config: Mapping[str, Any]) -> dict[str, Any]:
    tower = {
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
    }
    if config["layer_norm_eps"] != 1e-5:  # open_clip's own
        tower["norm_kwargs"] = {"eps": config["layer_norm_eps"]}
    return tower


def _rename(name: str) -> tuple[str, str]:
    """open_clip's name, and for a part of in_proj which part it is: "q", "k" or "v"."""
    stem, _, kind = name.rpartition(".")
    if name in _NAMES:
        return _NAMES[name], ""
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{kind}", ""
    if found := _BLOCK.fullmatch(name):
        tower, layer, module, kind = found.groups()
        block = f"{_TOWERS[tower]}.resblocks.{layer}"
        if module in _IN_BLOCK:
            return f"{block}.{_IN_BLOCK[module]}.{kind}", ""
        if module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            return f"{block}.attn.in_proj_{kind}", module[10]
    raise UserError(f"'{name}' is no tensor of transformers' CLIPModel{did_you_mean(name, _NAMES)}")


def _pack(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    import torch

    if len(parts) < 3:
        raise UserError(
            f"{name}: needs the projections of query, key and value, but has {', '.join(sorted(parts))}"
        )
    return torch.cat([parts["q"], parts["k"], parts["v"]])
