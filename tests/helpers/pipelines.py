"""Pipelines of diffusers: a tiny Stable Diffusion, and files that lie as those of one."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import save


def stable_diffusion(seed: int) -> Any:
    """A tiny Stable Diffusion with random weights."""
    import diffusers
    from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3}
    text = CLIPTextConfig(
        vocab_size=4, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8, attention_head_dim=4,
            norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[]),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(),
        requires_safety_checker=False,
    )  # fmt: skip


def pipeline_files(seed: int, width: int = 64) -> dict[str, bytes]:
    """A pipeline as it lies on the Hub: with shards, variants, and weights for other programs."""
    made = torch.Generator().manual_seed(seed)

    def weights(*names: str) -> dict[str, torch.Tensor]:
        return {name: torch.randn(width, width, generator=made) for name in names}

    layers = [f"down_blocks.{i}.attn.to_q.weight" for i in range(2)]
    unet, text = weights(*layers), weights("text_model.encoder.layers.0.mlp.fc1.weight")
    vae = {name: tensor.half() for name, tensor in weights("decoder.mid.weight").items()}
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    listed = {
        "_class_name": "StableDiffusionPipeline",
        **{name: ["diffusers", "X"] for name in ("unet", "vae", "scheduler")},
        **{name: ["transformers", "X"] for name in ("text_encoder", "tokenizer")},
        "safety_checker": [None, None],
    }
    described = json.dumps({"_class_name": "X", "_diffusers_version": "0.30.0"}).encode()
    index = {"metadata": {}, "weight_map": dict(zip(layers, shards))}
    return {
        "model_index.json": json.dumps(listed).encode(),
        "README.md": b"no",
        "v1-5-pruned.safetensors": b"all of it once more",
        "v1-5-pruned-emaonly.ckpt": b"all of it once more",
        "unet/config.json": described,
        **{f"unet/{file}": save({name: unet[name]}) for name, file in zip(layers, shards)},
        "unet/diffusion_pytorch_model.safetensors.index.json": json.dumps(index).encode(),
        "unet/diffusion_pytorch_model.fp16.safetensors": b"half of it",
        "unet/diffusion_pytorch_model.bin": b"a pickle",
        "unet/model.onnx": b"for another program",
        "vae/config.json": described,
        "vae/diffusion_pytorch_model.fp16.safetensors": save(vae),
        "text_encoder/config.json": b'{"model_type": "clip_text_model"}',
        "text_encoder/model.safetensors": save(text),
        "text_encoder/model.fp16.safetensors": b"half of it",
        "text_encoder/flax_model.msgpack": b"for another program",
        "tokenizer/vocab.json": b"{}",
        "tokenizer/merges.txt": b"",
        "scheduler/scheduler_config.json": b"{}",
        "safety_checker/model.safetensors": b"listed by nobody",
    }


PIPELINE_BROUGHT = {
    "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00002-of-00002.safetensors", "unet/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json",
    "text_encoder/model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt",
    "scheduler/scheduler_config.json", "provenance.json",
}  # fmt: skip
