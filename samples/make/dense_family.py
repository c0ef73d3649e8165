"""The checkpoints of the dense family: a small SegFormer, and experts with a head each."""

from __future__ import annotations

import time
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
BASE_STEPS, EXPERT_STEPS = 700, 500
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
_BASE = Kind(3, lambda s: (s.images, s.albedo), _of_pictures)  # the scene without its light


def write_data(folder: Path, val: int = VAL, test: int = TEST) -> None:
    """`folder`/TASK.npz: scenes that no model was trained on, and what is right of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, kind in TASKS.items():
        (val_x, val_y), (test_x, test_y) = (
            kind.arrays(scenes(count, name, split)) for split, count in (("val", val), ("test", test))
        )
        np.savez_compressed(folder / f"{name}.npz", val_x=val_x, val_y=val_y, test_x=test_x, test_y=test_y)


def write_base(out: Path, steps: int = BASE_STEPS, config: Mapping[str, Any] = CONFIG) -> str:
    """The base: it takes the light out of scenes."""
    return _write(out, "base", _BASE, _new("base", _BASE, config), steps, _RATES["base"])


def write_expert(name: str, base: Path, out: Path, steps: int = EXPERT_STEPS) -> str:
    """An expert: the base under a new head, all of it trained on a task; a line on it."""
    kind = TASKS[name]
    start = SegformerForSemanticSegmentation.from_pretrained(base, trust_remote_code=False)
    model = _new(name, kind, start.config.to_dict())
    model.segformer.load_state_dict(start.segformer.state_dict())
    return _write(out, name, kind, model, steps, _RATES["expert"])


def _new(name: str, kind: Kind, config: Mapping[str, Any]) -> SegformerForSemanticSegmentation:
    torch.manual_seed(list(TASKS).index(name) + 1 if name in TASKS else 0)
    named = {key: value for key, value in config.items() if key not in ("id2label", "label2id", "num_labels")}
    return SegformerForSemanticSegmentation(SegformerConfig(**named, num_labels=kind.channels))


def _write(
    out: Path, name: str, kind: Kind, model: SegformerForSemanticSegmentation, steps: int, rate: float
) -> str:
    wall, cpu = time.time(), time.process_time()
    torch.set_num_threads(1)
    x, right = kind.arrays(scenes(TRAINED, name, "train"))
    images = (torch.from_numpy(x).movedim(-1, 1).float() / 255 - MEAN[0]) / STD[0]
    targets = torch.from_numpy(right)
    optimiser = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=max(steps, 10), pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    losses = []
    model.train()
    for _ in range(steps):
        which = torch.randint(len(images), (_BATCH,), generator=generator)
        maps = F.interpolate(model(images[which]).logits, (SIZE, SIZE), mode="bilinear", align_corners=False)
        loss = kind.loss(maps, targets[which])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    model.eval().save_pretrained(out)
    SegformerImageProcessor(
        size={"height": SIZE, "width": SIZE}, image_mean=MEAN, image_std=STD
    ).save_pretrained(out)
    last = float(np.mean(losses[-20:]))
    return f"{name}: loss {last:.4f}, {time.time() - wall:.0f} s, {time.process_time() - cpu:.0f} CPU-s"
