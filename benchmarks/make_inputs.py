"""Write the checkpoints that the benchmarks merge: a base and fine-tunes of it, shaped like real models.

    python make_inputs.py llama OUT --experts 4        # a Llama of 340 M parameters, bf16, 256 MiB shards
    python make_inputs.py clip  OUT --experts 8        # CLIP ViT-B/32 vision towers, fp32, one file each

A fine-tune is base + low-rank signal + dense noise, which is what a full fine-tune looks like to a merger.
Every tensor has a seed of its own (family, checkpoint, name), so a tensor is the same whatever else is
written. Tensors are made one by one; a shard is in memory at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Shape = tuple[int, ...]
NOISE = 3e-4  # standard deviation of the dense part of a fine-tune
SIGNAL = 1e-3  # and of its low-rank part
BASE_SPREAD = 0.02  # standard deviation of the base's matrices


@dataclass(frozen=True)
class Family:
    """A model's tensors and what lies beside them."""

    name: str
    shapes: dict[str, Shape]
    dtype: torch.dtype
    config: dict[str, object]
    shard_bytes: int
    vocab: int = 0
    rank: int = field(default=16, kw_only=True)

    @property
    def parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())


def llama(
    *, layers: int = 16, hidden: int = 1024, inter: int = 4864, kv: int = 1024, vocab: int = 16384,
    dtype: torch.dtype = torch.bfloat16, rank: int = 16, shard_mib: int = 256,
) -> Family:  # fmt: skip
    """A Llama decoder, by default of 340 M parameters."""
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        block = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inter, hidden),
            "mlp.up_proj": (inter, hidden),
            "mlp.down_proj": (hidden, inter),
        }
        shapes |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in block.items()}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    heads = 16
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": inter, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads * kv // hidden, "vocab_size": vocab, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
        "torch_dtype": str(dtype).removeprefix("torch."), "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    return Family("llama", shapes, dtype, config, shard_mib << 20, vocab, rank=rank)


def clip(
    *, layers: int = 12, width: int = 768, inter: int = 3072, patch: int = 32, positions: int = 50, heads: int = 12,
    dtype: torch.dtype = torch.float32, rank: int = 16,
) -> Family:  # fmt: skip
    """The vision tower of a CLIP, by default ViT-B/32 (87 M parameters), named as transformers names it."""
    shapes: dict[str, Shape] = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.position_embedding.weight": (positions, width),
        "pre_layrnorm.weight": (width,),  # so spelt there
        "pre_layrnorm.bias": (width,),
        "post_layernorm.weight": (width,),
        "post_layernorm.bias": (width,),
    }
    for layer in range(layers):
        block = f"encoder.layers.{layer}."
        linear = {f"self_attn.{p}_proj": (width, width) for p in ("q", "k", "v", "out")}
        linear |= {"mlp.fc1": (inter, width), "mlp.fc2": (width, inter)}
        for part, shape in linear.items():
            shapes |= {f"{block}{part}.weight": shape, f"{block}{part}.bias": shape[:1]}
        for part in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{block}{part}.weight": (width,), f"{block}{part}.bias": (width,)}
    config = {
        "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_size": width,
        "intermediate_size": inter, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_channels": 3, "patch_size": patch, "image_size": 224, "projection_dim": 512,
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "torch_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    return Family("clip", shapes, dtype, config, 1 << 40, rank=rank)


def generator(*key: object) -> torch.Generator:
    """A generator that depends on the key alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def tensor(family: Family, name: str, expert: int | None) -> Tensor:
    """One tensor of the base (None) or of an expert."""
    shape = family.shapes[name]
    if "norm" in name:
        base = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    elif name.endswith("bias"):
        base = torch.zeros(shape)
    else:
        base = torch.randn(shape, generator=generator(family.name, "base", name)) * BASE_SPREAD
    if expert is None:
        return base.to(family.dtype)
    g = generator(family.name, expert, name)
    base += torch.randn(shape, generator=g) * NOISE
    if len(shape) == 2:
        left = torch.randn(shape[0], family.rank, generator=g)
        right = torch.randn(family.rank, shape[1], generator=g)
        base += (left @ right) * (SIGNAL / family.rank**0.5)
    return base.to(family.dtype)


def shards(family: Family) -> Iterator[list[str]]:
    """Names, in order, cut where a shard would grow over its size."""
    names: list[str] = []
    size = 0
    for name, shape in family.shapes.items():
        count = torch.Size(shape).numel() * family.dtype.itemsize
        if names and size + count > family.shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += count
    yield names


def write(family: Family, folder: Path, expert: int | None) -> None:
    """Write one checkpoint, shard by shard."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = list(shards(family))
    index: dict[str, str] = {}
    for i, names in enumerate(plan, 1):
        file = "model.safetensors" if len(plan) == 1 else f"model-{i:05d}-of-{len(plan):05d}.safetensors"
        save_file({n: tensor(family, n, expert) for n in names}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    if len(plan) > 1:
        total = family.parameters * family.dtype.itemsize
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
        (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text(json.dumps(family.config, indent=1))
    if family.vocab:
        _write_tokenizer(folder, family.vocab)


def _write_tokenizer(folder: Path, vocab: int) -> None:
    """A word-level tokenizer: mergekit copies one, so there has to be one."""
    special = ["<s>", "</s>", "<unk>"]
    words = {word: i for i, word in enumerate(special + [f"w{i}" for i in range(len(special), vocab)])}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    parts = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
             "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
             "model": model}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
                "unk_token": "<unk>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def make(family: Family, out: Path, experts: int) -> None:
    """Write OUT/base and OUT/expert0, ...; a checkpoint that is there is left alone."""
    for expert in (None, *range(experts)):
        folder = out / ("base" if expert is None else f"expert{expert}")
        if (folder / "config.json").exists():
            continue
        write(family, folder, expert)
        print(f"{folder}  {family.parameters / 1e6:.1f} M parameters", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", choices=["llama", "clip"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--experts", type=int, help="default: 4 (llama), 8 (clip)")
    parser.add_argument("--layers", type=int, help="default: 16 (llama), 12 (clip)")
    parser.add_argument("--hidden", type=int, default=1024, help="llama only")
    parser.add_argument("--inter", type=int, default=4864, help="llama only")
    parser.add_argument("--kv", type=int, default=1024, help="llama only: width of keys and values")
    parser.add_argument("--vocab", type=int, default=16384, help="llama only")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rank", type=int, default=16, help="rank of the signal of a fine-tune")
    a = parser.parse_args()
    if a.family == "llama":
        family = llama(
            layers=a.layers or 16, hidden=a.hidden, inter=a.inter, kv=a.kv, vocab=a.vocab,
            dtype=getattr(torch, a.dtype or "bfloat16"), rank=a.rank,
        )  # fmt: skip
    else:
        family = clip(layers=a.layers or 12, dtype=getattr(torch, a.dtype or "float32"), rank=a.rank)
    make(family, a.out, a.experts or (4 if a.family == "llama" else 8))


if __name__ == "__main__":
    main()
