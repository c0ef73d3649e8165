"""Tiny models of the real classes of transformers, timm, torchvision, open_clip and diffusers."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Mapping

if TYPE_CHECKING:
    import torch
    from torch import nn

_TEXT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_WIDE = {**_GROUPED, "head_dim": 4}
_VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
_GPT = {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 40,
    "n_positions": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 40}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_LATENT = {
    **_TEXT, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 6, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 4, "n_group": 2, "topk_group": 1,
}  # fmt: skip

# Name -> the class of the model, of its configuration, and the configuration.
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _WIDE),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _WIDE),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _WIDE),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _TEXT),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40}),
    "falcon": ("FalconForCausalLM", "FalconConfig", _TEXT),
    "falcon_grouped": (
        "FalconForCausalLM", "FalconConfig", {**_TEXT, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "opt": (
        "OPTForCausalLM", "OPTConfig",
        {**_TEXT, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 8},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "flan_t5": ("T5ForConditionalGeneration", "T5Config", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "bert": ("BertForSequenceClassification", "BertConfig", _TEXT),
    "bert_mlm": ("BertForMaskedLM", "BertConfig", _TEXT),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", _TEXT),
    "roberta_mlm": ("RobertaForMaskedLM", "RobertaConfig", _TEXT),
    "distilbert": (
        "DistilBertForSequenceClassification", "DistilBertConfig",
        {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4, "vocab_size": 40},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", _VISION),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", _VISION),
    "clip": (
        "CLIPModel", "CLIPConfig",
        {"text_config": {**_TEXT, "max_position_embeddings": 8}, "vision_config": _VISION, "projection_dim": 8},
    ),
    "siglip": (
        "SiglipModel", "SiglipConfig",
        {"text_config": {**_TEXT, "max_position_embeddings": 8}, "vision_config": _VISION},
    ),
    "llava": (
        "LlavaForConditionalGeneration", "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {"model_type": "clip_vision_model", **_VISION},
        },
    ),
    "whisper": (
        "WhisperForConditionalGeneration", "WhisperConfig",
        {
            "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 40,
            "max_source_positions": 8, "max_target_positions": 8, "num_mel_bins": 5, "pad_token_id": 0,
        },
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 4}),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", {**_GROUPED, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**_GROUPED, **_MOE, "shared_expert_intermediate_size": 12},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_WIDE, **_MOE}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", _LATENT),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", _LATENT),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**_WIDE, "num_local_experts": 4}),
    "openai_privacy_filter": (
        "OpenAIPrivacyFilterForTokenClassification", "OpenAIPrivacyFilterConfig", {**_WIDE, "num_local_experts": 4},
    ),
    "llama4": (
        "Llama4ForCausalLM", "Llama4TextConfig",
        {**_WIDE, "num_local_experts": 4, "intermediate_size_mlp": 20, "interleave_moe_layer_step": 2},
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig",
        {
            "text_config": {**_WIDE, **_MOE},
            "vision_config": {
                "hidden_size": 16, "intermediate_size": 24, "depth": 2, "num_heads": 4, "out_hidden_size": 16,
                "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
            },
        },
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig",
        {
            **{key: value for key, value in _WIDE.items() if key != "intermediate_size"}, **_MOE,
            "shared_expert_intermediate_size": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "linear_key_head_dim": 4, "linear_value_head_dim": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "aria": (
        "AriaTextForCausalLM", "AriaTextConfig",
        {**_GROUPED, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    ),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {**_GROUPED, "num_local_experts": 4}),
    "dbrx": (
        "DbrxForCausalLM", "DbrxConfig",
        {
            "d_model": 16, "n_heads": 4, "n_layers": 2, "max_seq_len": 8, "vocab_size": 40,
            "ffn_config": {"ffn_hidden_size": 10, "moe_num_experts": 4, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        },
    ),
    "resnet_hf": (
        "ResNetForImageClassification", "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "bottleneck"},
    ),
}  # fmt: skip
TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"depth": 2},
    "deit_tiny_distilled_patch16_224": {"depth": 2},
    "eva02_tiny_patch14_224": {"depth": 2},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1)},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "resnet18": {},
    "resnet26d": {},
    "efficientnet_b0": {},
}
TORCHVISION = ("resnet18", "resnet50", "resnext50_32x4d", "vit_b_32", "swin_t", "convnext_tiny", "vgg11_bn")
_CLIP_TEXT = {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 4, "layers": 2}
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "open_clip_vit": {"layers": 2, "width": 16, "head_width": 4, "patch_size": 4, "image_size": 8},
    "open_clip_resnet": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 32},
}
_DIT: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "in_channels": 4}
DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "unet": (
        "UNet2DConditionModel",
        {
            "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": 8,
            "attention_head_dim": 4, "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
    ),
    "dit": ("DiTTransformer2DModel", {**_DIT, "sample_size": 8, "out_channels": 8}),
    "sd3": (
        "SD3Transformer2DModel",
        {
            **_DIT, "sample_size": 8, "patch_size": 2, "joint_attention_dim": 8, "caption_projection_dim": 16,
            "pooled_projection_dim": 8, "out_channels": 4, "pos_embed_max_size": 8,
        },
    ),
    "flux": (
        "FluxTransformer2DModel",
        {
            **{key: value for key, value in _DIT.items() if key != "num_layers"}, "num_layers": 1,
            "num_single_layers": 1, "joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4),
            "guidance_embeds": True,
        },
    ),
}  # fmt: skip
NAMES = (
    *TRANSFORMERS,
    *(f"timm/{name}" for name in TIMM),
    *(f"torchvision/{name}" for name in TORCHVISION),
    *OPEN_CLIP,
    *DIFFUSERS,
)


def build(name: str, device: str = "cpu") -> nn.Module:
    """A model of the zoo with random weights, or none on the device `meta`."""
    import torch

    with torch.device(device):
        return _build(name).eval()


def _build(name: str) -> nn.Module:
    library, _, model = name.rpartition("/")
    if name in TRANSFORMERS:
        import transformers

        kind, config, settings = TRANSFORMERS[name]
        return getattr(transformers, kind)(getattr(transformers, config)(**settings))
    if library == "timm":
        import timm

        return timm.create_model(model, **TIMM[model])
    if library == "torchvision":
        import torchvision

        return torchvision.models.get_model(model)
    if name in OPEN_CLIP:
        from open_clip.model import CLIP

        return CLIP(embed_dim=8, vision_cfg=OPEN_CLIP[name], text_cfg=_CLIP_TEXT)
    import diffusers

    kind, settings = DIFFUSERS[name]
    return getattr(diffusers, kind)(**settings)


def config_of(model: nn.Module) -> dict[str, Any]:
    """The content of the config.json that a model of transformers is saved with; {} of other models."""
    config = getattr(model, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else {}


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of its tensors, by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def shaken_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Its tensors with noise: norms of ones and biases of zeros would hide a mistake."""
    import torch

    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            noise_X = torch.randn_like(tensor)
            state[name] = 1 + noise_X.abs() / 2 if name.endswith("running_var") else tensor + noise_X / 9
    return state


@cache
def described(name: str) -> tuple[Mapping[str, tuple[int, ...]], Mapping[str, Any]]:
    """Shapes and configuration of a model of the zoo, of which no weights are made."""
    model = build(name, device="meta")
    return shapes_of(model), config_of(model)


def run_on(name: str, model: nn.Module) -> torch.Tensor:
    """What a model of the zoo makes of a few fixed inputs: logits, or the likeness of images and texts."""
    import torch

    size = 224 if name.startswith("timm/vit") else 32
    if name in OPEN_CLIP or name in ("clip", "siglip", "vit"):
        size = 8
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    tokens_BL = torch.arange(3, 19).reshape(2, 8)
    if name in OPEN_CLIP:
        image_BD, text_BD, _ = model(images, tokens_BL)
        return image_BD @ text_BD.T
    if name in ("clip", "siglip"):
        return model(input_ids=tokens_BL, pixel_values=images).logits_per_image
    if "/" in name or name in ("resnet_hf", "vit", "dinov2"):
        found = model(images)
        return found if isinstance(found, torch.Tensor) else found.logits
    return model(input_ids=tokens_BL % 40).logits
