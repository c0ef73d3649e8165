"""Training of the base model.

First the text tower, from text alone: two prompts of a class shall agree. It is then locked. After that the
image tower, as a classifier over the prompts of all classes; two processes train it, each on batches of its
own, and average their parameters every few steps (local SGD). Schedules depend on the step only.
"""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

from make.catalogue import PRETRAINING_SETS, prompts
from make.model import VISUAL, augmented, checksum, new_model, save, tokenize
from make.muon import Muon
from make.patches import patch_filters

STEPS = 2000
_PROCESSES = 2
_BATCH = 64  # images a process
_AVERAGE_EVERY = 8  # steps
_WARMUP = 40  # steps
_LEARNING_RATE = 1.5e-3  # AdamW: all but the matrices of the blocks
_MUON_LEARNING_RATE = 6e-3  # the matrices of the blocks
_WEIGHT_DECAY = 0.05  # AdamW's, of what has two dimensions or more
_LARGEST_SCALE = 50  # of the logits
_EMBEDDING_GAIN = 7.0  # of the initial positional and class embeddings
_REPORT_EVERY = 100  # steps

_TEXT_STEPS = 100
_TEXT_BATCH = 72  # classes
_TEXT_LEARNING_RATE = 2e-3
_TEXT_SCALE = 14  # of the logits

_TEMPLATES = 3  # a class


def pretrain(work: Path, steps: int = STEPS, stop: int | None = None) -> None:
    """Write work/base.safetensors from work/pretraining.npz.

    stop: end after this step of the schedule and write nothing, to compare checksums of the parameters.
    """
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{folder}/rendezvous"
        torch.multiprocessing.spawn(_process, (rendezvous, work, steps, stop), nprocs=_PROCESSES)


def _process(rank: int, rendezvous: str, work: Path, steps: int, stop: int | None) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # both processes are on this machine
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=_PROCESSES)
    model = new_model()
    with np.load(work / "pretraining.npz") as file:
        images, labels = file["x"], file["y"]
    texts = _train_text(model, rank)
    _initialise_image_tower(model, images)
    _train_images(model, images, labels, texts, rank, steps, last=stop or steps)
    if rank == 0 and stop is None:
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(_LARGEST_SCALE))
        save(model.state_dict(), work / "base.safetensors")
    dist.destroy_process_group()


def _train_text(model: Module, rank: int) -> Tensor:
    """Train the text tower with InfoNCE between two templates of a class; embeddings (classes, 3, 128)."""
    tokens = torch.stack([tokenize(texts) for name in PRETRAINING_SETS for texts in prompts(name)])
    named = [(name, p) for name, p in model.named_parameters() if name != "logit_scale"]
    tower = [p for name, p in named if not name.startswith(VISUAL)]
    generator = torch.Generator().manual_seed(5)
    optimiser = torch.optim.AdamW(tower, lr=_TEXT_LEARNING_RATE, weight_decay=0.0, fused=True)
    for _ in range(_TEXT_STEPS):
        classes = torch.randperm(len(tokens), generator=generator)[:_TEXT_BATCH]
        template = torch.randint(0, _TEMPLATES, (_TEXT_BATCH,), generator=generator)
        pairs = torch.cat([tokens[classes, template], tokens[classes, (template + 1) % _TEMPLATES]])
        first, second = model.encode_text(pairs, normalize=True).split(_TEXT_BATCH)
        loss = F.cross_entropy(_TEXT_SCALE * first @ second.t(), torch.arange(_TEXT_BATCH))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    if rank == 0:
        print(f"text: loss {loss.item():.3f}, {len(tokens)} classes, checksum {checksum(tower)}", flush=True)
    with torch.no_grad():
        return torch.stack([model.encode_text(tokens[:, i], normalize=True) for i in range(_TEMPLATES)], 1)


@torch.no_grad()
def _initialise_image_tower(model: Module, images: np.ndarray) -> None:
    tower = model.visual
    tower.conv1.weight.copy_(patch_filters(images))
    tower.positional_embedding.mul_(_EMBEDDING_GAIN)
    tower.class_embedding.mul_(_EMBEDDING_GAIN)


def _train_images(
    model: Module, images: np.ndarray, labels: np.ndarray, texts: Tensor, rank: int, steps: int, last: int
) -> None:
    """Train the image tower and the logit scale on images (N, 36, 36, 3) of classes (N)."""
    parameters = [*model.visual.parameters(), model.logit_scale]
    _share(parameters)
    adamw, muon = _optimisers(model)
    generator = torch.Generator().manual_seed(1 + rank)
    batches = _batches(len(images), np.random.default_rng(1 + rank))
    for step in range(1, last + 1):
        factor = min(1, step / _WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in adamw.param_groups:
            group["lr"] = _LEARNING_RATE * factor
        batch = next(batches)
        logits = _logits(model, images[batch], texts, generator)
        loss = F.cross_entropy(logits, torch.from_numpy(labels[batch]))
        loss.backward()
        clip_grad_norm_(parameters, 1.0)
        adamw.step()
        muon.step(factor)
        model.zero_grad()
        if step % _AVERAGE_EVERY == 0 or step == steps:
            _average(parameters)
        if rank == 0 and (step % _REPORT_EVERY == 0 or step == last):
            print(f"step {step}: loss {loss.item():.3f}, checksum {checksum(parameters)}", flush=True)


def _optimisers(model: Module) -> tuple[torch.optim.Optimizer, Muon]:
    """Muon for the matrices of the image tower's blocks; AdamW for all else that is trained."""
    named = [*model.visual.named_parameters(), ("logit_scale", model.logit_scale)]
    matrices = [p for name, p in named if p.ndim == 2 and "resblocks" in name]
    others = [p for name, p in named if not (p.ndim == 2 and "resblocks" in name)]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": _WEIGHT_DECAY},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=_LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    return adamw, Muon(matrices, _MUON_LEARNING_RATE)


def _batches(n: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless batches (64) of indices; a pass over the images leaves out what fills no batch."""
    while True:
        order = rng.permutation(n)
        for start in range(0, n - _BATCH + 1, _BATCH):
            yield order[start : start + _BATCH]


def _logits(model: Module, images: np.ndarray, texts: Tensor, generator: torch.Generator) -> Tensor:
    """(N, classes), each class in a random template; the image tower runs in bfloat16."""
    template = torch.randint(0, _TEMPLATES, (len(texts),), generator=generator)
    heads = texts[torch.arange(len(texts)), template]
    with torch.autocast("cpu", torch.bfloat16):
        features = model.visual(augmented(images, generator))
    scale = model.logit_scale.exp().clamp(max=_LARGEST_SCALE)
    return scale * F.normalize(features.float(), dim=-1) @ heads.t()


@torch.no_grad()
def _share(parameters: list[Tensor]) -> None:
    """Begin with the first process's parameters everywhere."""
    vector = parameters_to_vector(parameters).clone()
    dist.broadcast(vector, 0)
    vector_to_parameters(vector, parameters)


@torch.no_grad()
def _average(parameters: list[Tensor]) -> None:
    vector = parameters_to_vector(parameters)
    dist.all_reduce(vector)
    vector_to_parameters(vector / _PROCESSES, parameters)
