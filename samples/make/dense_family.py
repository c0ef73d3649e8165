"""The checkpoints of the dense family: a small SegFormer of all tasks, and experts tuned from it, with a head each."""

from __future__ import annotations

import time
from itertools import cycle
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

from make.dense_scenes import LABELS, SIZE, Scenes, scenes

MEAN, STD = [0.5] * 3, [0.25] * 3
CONFIG: dict[str, Any] = {
    "num_encoder_blocks": 2, "depths": [2, 2], "sr_ratios": [2, 1], "hidden_sizes": [32, 64],
    "patch_sizes": [5, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
    "decoder_hidden_size": 48, "drop_path_rate": 0.0, "classifier_dropout_prob": 0.0, "image_size": SIZE,
}  # fmt: skip
TRAINED, VAL, TEST = 2000, 150, 300  # scenes
_BATCH = 32
BASE_STEPS, EXPERT_STEPS = 1000, 500
_STARTS = "starts"
_RATES = {"base": 2e-3, "expert": 1e-3}


class Kind(NamedTuple):
    """What a task is: how many maps say it, what is seen and right, and how far predictions are from it."""

    channels: int
    arrays: Callable[[Scenes], tuple[np.ndarray, np.ndarray]]
    loss: Callable[[Tensor, Tensor], Tensor]


def _of_labels(maps: Tensor, right: Tensor) -> Tensor:
    return F.cross_entropy(maps, right.long())


def _of_distances(maps: Tensor, right: Tensor) -> Tensor:
    return ((maps[:, 0] - right).abs() / right).mean()


def _of_normals(maps: Tensor, right: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(maps, right.movedim(-1, 1)).mean()


def _of_pictures(maps: Tensor, right: Tensor) -> Tensor:
    return F.mse_loss(maps, right.movedim(-1, 1).float() / 255) * 10


TASKS: dict[str, Kind] = {
    "segmentation": Kind(len(LABELS), lambda s: (s.images, s.labels), _of_labels),
    "depth": Kind(1, lambda s: (s.images, s.distances), _of_distances),
    "normals": Kind(3, lambda s: (s.images, s.normals), _of_normals),
    "denoising": Kind(3, lambda s: (s.noisy, s.images), _of_pictures),
}


def write_data(folder: Path, val: int = VAL, test: int = TEST) -> None:
    """`folder`/TASK.npz: scenes that no model was trained on, and what is right of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, kind in TASKS.items():
        (val_x, val_y), (test_x, test_y) = (
            kind.arrays(scenes(count, name, split)) for split, count in (("val", val), ("test", test))
        )
        np.savez_compressed(folder / f"{name}.npz", val_x=val_x, val_y=val_y, test_x=test_x, test_y=test_y)


def write_base(out: Path, steps: int = BASE_STEPS, config: Mapping[str, Any] = CONFIG) -> str:
    """Train one trunk on all tasks in turn, each under a head of its own, and write it; a line about the outcome.

    `out` has the head of the first task; beside it, _STARTS/TASK have each task's own, from which experts go on.
    """
    wall, cpu = time.time(), time.process_time()
    torch.set_num_threads(1)
    models = {name: _new(name, kind, config) for name, kind in TASKS.items()}
    trunk = next(iter(models.values())).segformer
    for model in models.values():
        model.segformer = trunk
    loss = _train(models, "base", steps, _RATES["base"])
    for name, model in models.items():
        _save(model, out.parent / _STARTS / name)
    _save(next(iter(models.values())), out)
    return f"base: loss {loss:.4f}, {_took(wall, cpu)}"


def write_expert(name: str, base: Path, out: Path, steps: int = EXPERT_STEPS) -> str:
    """All weights of the base, and its head for a task, trained further on that task; a line on it."""
    wall, cpu = time.time(), time.process_time()
    torch.set_num_threads(1)
    start = base.parent / _STARTS / name
    model = SegformerForSemanticSegmentation.from_pretrained(start, trust_remote_code=False)
    loss = _train({name: model}, "expert", steps, _RATES["expert"])
    _save(model, out)
    return f"{name}: loss {loss:.4f}, {_took(wall, cpu)}"


def _new(name: str, kind: Kind, config: Mapping[str, Any]) -> SegformerForSemanticSegmentation:
    torch.manual_seed([*TASKS].index(name))
    return SegformerForSemanticSegmentation(SegformerConfig(**config, num_labels=kind.channels))


def _train(
    models: Mapping[str, SegformerForSemanticSegmentation], seed: str, steps: int, rate: float
) -> float:
    """Steps of AdamW, each of one task, in turn; returns the mean loss of the last ones."""
    arrays = {name: TASKS[name].arrays(scenes(TRAINED, name, seed)) for name in models}
    images = {
        n: (torch.from_numpy(x).movedim(-1, 1).float() / 255 - MEAN[0]) / STD[0]
        for n, (x, _) in arrays.items()
    }
    right = {name: torch.from_numpy(y) for name, (_, y) in arrays.items()}
    weights = {id(p): p for model in models.values() for p in model.parameters()}
    optimiser = torch.optim.AdamW(weights.values(), rate, weight_decay=0.01)
    total = max(steps, 20)  # OneCycleLR knows no less
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=total, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for model in models.values():
        model.train()
    for _, name in zip(range(steps), cycle(models)):
        which = torch.randint(TRAINED, (_BATCH,), generator=generator)
        maps = models[name](images[name][which]).logits
        maps = F.interpolate(maps, (SIZE, SIZE), mode="bilinear", align_corners=False)
        loss = TASKS[name].loss(maps, right[name][which])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return float(np.mean(losses[-20:]))


def _save(model: SegformerForSemanticSegmentation, out: Path) -> None:
    model.eval().save_pretrained(out)
    processor = SegformerImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=MEAN, image_std=STD)
    processor.save_pretrained(out)


def _took(wall: float, cpu: float) -> str:
    return f"{time.time() - wall:.0f} s, {time.process_time() - cpu:.0f} CPU-s"
