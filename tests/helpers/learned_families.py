"""Tiny models of open_clip, timm and transformers, and experts of them on disk, as networks for examples."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Callable, Mapping

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mergeline.merging.learning.network import Examples, Network

# What is added to the stream, or looked up, but not multiplied by it.
_ADDED = (
    "embed",
    "wte",
    "wpe",
    "class_embedding",
    "cls_token",
    "positional",
    "norm",
    "ln_",
    "bn",
    "LayerNorm",
    "downsample.1",
)


def _open_clip() -> tuple[nn.Module, str, dict[str, Any]]:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(16, 8, 32, 2, 2, 2.0, output_dim=12), "visual.", {}


def _timm() -> tuple[nn.Module, str, dict[str, Any]]:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(16, 8, embed_dim=32, depth=2, num_heads=2, num_classes=5), "", {}


def _resnet() -> tuple[nn.Module, str, dict[str, Any]]:
    """Named as torchvision's, and narrow."""
    from timm.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5, stem_width=8, channels=(8, 8, 12, 12)), "", {}


def _transformers(kind: str) -> tuple[nn.Module, str, dict[str, Any]]:
    import transformers as t

    size: dict[str, Any] = {
        "vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip
    if kind == "bert":
        return t.BertModel(t.BertConfig(**size)), "", {"model_type": "bert"}
    if kind == "gpt2":
        small = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 8}
        return t.GPT2Model(t.GPT2Config(**small, use_cache=False)), "", {"model_type": "gpt2", **small}
    if kind == "mixtral":
        config: Any = t.MixtralConfig(num_key_value_heads=1, num_local_experts=3, **size)
        config._experts_implementation = "eager"
        return t.MixtralModel(config), "model.", {"model_type": "mixtral"}
    config = t.LlamaConfig(num_key_value_heads=1, use_cache=False, **size)
    return t.LlamaModel(config), "model.", {"model_type": "llama"}


KINDS: dict[str, Callable[[], tuple[nn.Module, str, dict[str, Any]]]] = {
    "open_clip": _open_clip,
    "timm": _timm,
    "resnet": _resnet,
    "bert": lambda: _transformers("bert"),
    "llama": lambda: _transformers("llama"),
    "gpt2": lambda: _transformers("gpt2"),
    "mixtral": lambda: _transformers("mixtral"),
}


@dataclass(frozen=True)
class LearnedFamily:
    """A base and experts on disk, and their network. inputs: of a seed, a count of random examples."""

    folder: Path
    network: Network
    experts: list[str]
    inputs: Callable[[int, int], Tensor]

    def recipe(self, method: str, **params: Any) -> dict[str, Any]:
        experts = {name: str(self.folder / name) for name in self.experts}
        return {"method": method, "params": params, "base": str(self.folder / "base"), "experts": experts}

    def examples(self, count: int, **more: Any) -> Examples:
        """So many examples for each expert, each expert its own task."""
        drawn = {name: self.inputs(t, count) for t, name in enumerate(self.experts)}
        return examples_of(drawn, **more)

    def features(self, checkpoint: Path, x: Tensor) -> Tensor:
        self.network.load(load_file(checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint))
        with torch.no_grad():
            return self.network.features({"images": x})


def learned_family(
    kind: str, folder: Path, experts: int = 2, everything: bool = True, noise: float = 0.3
) -> LearnedFamily:
    """A family of a kind of models. everything: whether experts differ in all tensors, or in linear maps alone."""
    torch.manual_seed(0)
    module, prefix, config = KINDS[kind]()
    module.eval().requires_grad_(False)
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if not value.is_floating_point():
            continue
        if name.endswith(("running_var", "norm.weight", "bn1.weight", "bn2.weight", "downsample.1.weight")):
            value.uniform_(0.5, 1.5)
        elif value.ndim < 2 or "position" in name or "pos_embed" in name:
            value.normal_(0, 0.1)
            value += float(name.endswith("weight"))
    base = {prefix + name: value.clone() for name, value in module.state_dict().items()}
    states = {"base": base}
    for t in range(experts):
        generator = torch.Generator().manual_seed(t + 1)
        states[f"e{t}"] = {
            name: value + noise * float(value.std()) * torch.randn(value.shape, generator=generator)
            if value.is_floating_point() and value.ndim > 0 and "running" not in name
            and (everything or _is_linear(name, base)) else value.clone()
            for name, value in base.items()
        }  # fmt: skip
    for name, state in states.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in state.items()}, folder / name / "model.safetensors")
        if config:
            (folder / name / "config.json").write_text(json.dumps(config))

    def run(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        found = model(batch["images"])
        return found if isinstance(found, Tensor) else found.last_hidden_state.flatten(0, 1)

    def inputs(seed: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed + 100)
        if config:
            return torch.randint(1, 40, (count, 6), generator=generator)
        return torch.randn(count, 3, *((32, 32) if kind == "resnet" else (16, 16)), generator=generator)

    return LearnedFamily(folder, Network(module, run, prefix=prefix), list(states)[1:], inputs)


def _is_linear(name: str, base: Mapping[str, Tensor]) -> bool:
    weight = name.removesuffix("bias") + "weight" if name.endswith("bias") else name
    return base.get(weight, base[name]).ndim > 1 and not any(part in name for part in _ADDED)


def examples_of(inputs: Mapping[str, Tensor], size: int = 32, key: str = "images") -> Examples:
    """Examples of tasks that are named as their experts."""
    return Examples(
        batches={
            task: lambda task=task, x=x: [{"task": task, key: part} for part in x.split(size)]  # type: ignore[misc]
            for task, x in inputs.items()
        },
        counts={task: len(x) for task, x in inputs.items()},
        owners={task: task for task in inputs},
        digests={task: "sha256:" + sha256(x.numpy().tobytes()).hexdigest() for task, x in inputs.items()},
        split="fit",
    )
