"""Classifiers with a head each: a small ViT of timm and a small ResNet of transformers, pre-trained and fine-tuned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from timm.models import save_for_hf
from transformers import ResNetConfig, ResNetForImageClassification

from make.classifier_tasks import pretraining, task_arrays
from make.hashing import stable_hash
from make.model import augmented, channels_first, normalised

MEAN, STD = [0.5] * 3, [0.25] * 3
_BATCH = 64
_VIT = {"img_size": 36, "patch_size": 9, "embed_dim": 96, "depth": 4, "num_heads": 4}
_RESNET = {"embedding_size": 24, "hidden_sizes": [24, 48, 96], "depths": [1, 2, 2], "layer_type": "basic"}


def _vit(classes: int) -> Any:
    config = {"mean": MEAN, "std": STD, "input_size": (3, 36, 36)}
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=classes, pretrained_cfg_overlay=config, **_VIT
    )


def _resnet(classes: int) -> Any:
    return ResNetForImageClassification(
        ResNetConfig(**_RESNET, downsample_in_first_stage=False, num_labels=classes)
    )


ARCHITECTURES: dict[str, Callable[[int], Any]] = {"vit": _vit, "resnet": _resnet}
_STEPS = {"vit": (1200, 600), "resnet": (900, 200)}  # of pre-training, of fine-tuning
_RATES = {"vit": (1e-3, 6e-4), "resnet": (3e-3, 1e-3)}


def write_base(architecture: str, family: Path, share: float = 1.0) -> None:
    """The base: trained on images of other sets, whose classes its head tells; share: of the steps."""
    x, y = pretraining()
    model = _new(architecture, int(y.max()) + 1, "base")
    _train(model, x, y, round(share * _STEPS[architecture][0]), _RATES[architecture][0], "base")
    _save(architecture, model, family / "base")


def write_expert(architecture: str, task: str, family: Path, share: float = 1.0) -> str:
    """An expert: the base with a new head, trained on a task; a line on it. share: of the steps."""
    arrays = task_arrays(task)
    classes = int(arrays["train_y"].max()) + 1
    model, base = _new(architecture, classes, task), _load(family / "base")
    own = model.state_dict()
    trunk = {name: tensor for name, tensor in base.items() if own[name].shape == tensor.shape}
    model.load_state_dict({**own, **{name: t for name, t in trunk.items() if not _is_head(name)}})
    steps, rate = round(share * _STEPS[architecture][1]), _RATES[architecture][1]
    _train(model, arrays["train_x"], arrays["train_y"], steps, rate, task)
    _save(architecture, model, family / task)
    return f"{architecture} {task}: {accuracy(model, arrays['test_x'], arrays['test_y']):.3f} of test images"


def _is_head(name: str) -> bool:
    return name.startswith(("head.", "classifier."))


def _new(architecture: str, classes: int, seed: str) -> Any:
    torch.manual_seed(stable_hash(architecture + seed) % 2**32)
    return ARCHITECTURES[architecture](classes)


def _train(model: Any, x: np.ndarray, y: np.ndarray, steps: int, rate: float, seed: str) -> None:
    """AdamW with a cosine schedule, images moved and toned."""
    generator = torch.Generator().manual_seed(stable_hash(seed) % 2**32)
    rng = np.random.default_rng(stable_hash(seed) % 2**32)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, rate, total_steps=steps, pct_start=max(0.1, 2 / steps)
    )
    model.train()
    for _ in range(steps):
        chosen = rng.integers(0, len(y), _BATCH)
        logits = _logits(model, augmented(x[chosen], generator))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y[chosen]))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.eval()


def _logits(model: Any, images: torch.Tensor) -> torch.Tensor:
    found = model(images)
    return getattr(found, "logits", found)


@torch.no_grad()
def accuracy(model: Any, x: np.ndarray, y: np.ndarray) -> float:
    """The share of images (N, 36, 36, 3) whose class (N) is the likeliest."""
    found = [
        _logits(model, normalised(channels_first(x[start : start + 200]))).argmax(1)
        for start in range(0, len(x), 200)
    ]
    return float((torch.cat(found).numpy() == y).mean())


def _save(architecture: str, model: Any, folder: Path) -> None:
    """As the library writes it, with what says how images are taken."""
    if architecture == "vit":
        save_for_hf(model, folder, model_args=_VIT, safe_serialization=True)
        return
    model.save_pretrained(folder)
    processor = {
        "image_mean": MEAN,
        "image_std": STD,
        "do_normalize": True,
        "size": {"height": 36, "width": 36},
    }
    told = {"image_processor_type": "ConvNextImageProcessor", **processor}
    (folder / "preprocessor_config.json").write_text(json.dumps(told, indent=2) + "\n")


def _load(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
