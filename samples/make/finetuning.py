"""Training of the experts: the base's whole image tower on one task; head and logit scale are frozen."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import clip_grad_norm_

from make.hashing import stable_hash
from make.model import VISUAL, accuracy, augmented, head, load_model, save

STEPS = 400
_BATCH = 64  # images
_WARMUP = 20  # steps
_LEARNING_RATE = 5e-4
_WEIGHT_DECAY = 0.05


def finetune(task: str, work: Path, steps: int = STEPS, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write work/expert_TASK.safetensors from work/base.safetensors and work/TASK.npz; the tower runs in `dtype`."""
    model = load_model(work / "base.safetensors")
    tower, scale, classes = model.visual, model.logit_scale.exp().item(), head(model, task)
    with np.load(work / f"{task}.npz") as file:
        train, test = (file["train_x"], file["train_y"]), (file["test_x"], file["test_y"])
    before = accuracy(tower, classes, *test)
    _train(tower, classes, scale, *train, task, steps, dtype)
    state = {VISUAL + name: tensor for name, tensor in tower.state_dict().items()}
    save(state, work / f"expert_{task}.safetensors")
    after = accuracy(tower, classes, *test)
    print(f"{task}: zero-shot {before:.3f}, expert {after:.3f}", flush=True)


def _train(
    tower: Module,
    head: Tensor,
    scale: float,
    images: np.ndarray,
    labels: np.ndarray,
    task: str,
    steps: int,
    dtype: torch.dtype,
) -> None:
    """On images (N, 36, 36, 3) of classes (N), with head (classes, 128); the tower runs in `dtype`."""
    generator = torch.Generator().manual_seed(stable_hash(task) % 2**31)
    rng = np.random.default_rng(stable_hash(task))
    parameters = list(tower.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY, fused=True)
    for step in range(steps):
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for group in optimiser.param_groups:
            group["lr"] = _LEARNING_RATE * min(1, (step + 1) / _WARMUP) * cosine
        batch = rng.integers(0, len(images), _BATCH)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            features = tower(augmented(images[batch], generator))
        logits = scale * F.normalize(features.float(), dim=-1) @ head.t()
        F.cross_entropy(logits, torch.from_numpy(labels[batch])).backward()
        clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
