"""The model, its input, its heads and its files. https://github.com/mlfoundations/open_clip"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Iterable

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from make.catalogue import prompts
from make.drawing import IMAGE_SIZE

PATCH = 12  # pixels a side
WIDTH = 192  # of the image tower
CONTEXT = 16  # tokens of a prompt
CONFIG = {
    "embed_dim": 128,
    "vision_cfg": dict(image_size=IMAGE_SIZE, layers=4, width=WIDTH, patch_size=PATCH, head_width=32),
    "text_cfg": dict(context_length=CONTEXT, vocab_size=49408, width=64, heads=2, layers=2),
}
MEAN, STD = 0.5, 0.25  # of pixels from 0 to 1, on each channel

VISUAL = "visual."  # what the names of the image tower's tensors begin with
_CHUNK = 200  # images at a time where no gradient is needed


def new_model() -> open_clip.CLIP:
    """With the initial weights of PyTorch's seed 0."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return open_clip.CLIP(**CONFIG)


def load_model(path: Path) -> open_clip.CLIP:
    """A saved model, in float32."""
    model = new_model()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return model


def save(state: dict[str, Tensor], path: Path) -> None:
    """Tensors as float16."""
    save_file({name: tensor.half().contiguous() for name, tensor in state.items()}, path)


@cache
def _tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=CONTEXT)


def tokenize(texts: list[str]) -> Tensor:
    """Tokens (N, 16) int64."""
    return _tokenizer()(texts)


def normalised(images: Tensor) -> Tensor:
    """Pixels from 0 to 255, of any shape, as the model wants them."""
    return (images / 255 - MEAN) / STD


def channels_first(images: np.ndarray) -> Tensor:
    """(N, 36, 36, 3) uint8 -> (N, 3, 36, 36) float32."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float()


def augmented(images: np.ndarray, generator: torch.Generator) -> Tensor:
    """Training input (N, 3, 36, 36): the batch moved by up to a pixel, each image's tone changed."""
    x = F.pad(channels_first(images), [1] * 4, mode="replicate")
    right, down = torch.randint(0, 3, (2,), generator=generator).tolist()
    x = x[:, :, down : down + IMAGE_SIZE, right : right + IMAGE_SIZE]
    contrast = torch.rand(len(x), 1, 1, 1, generator=generator) * 0.5 + 0.75
    brightness = (torch.rand(len(x), 1, 1, 1, generator=generator) - 0.5) * 40
    return normalised((x - 127) * contrast + 127 + brightness)


@torch.no_grad()
def head(model: open_clip.CLIP, task: str) -> Tensor:
    """The zero-shot classifier (classes, 128): each class's prompts embedded, averaged and normalised."""
    means = [model.encode_text(tokenize(texts), normalize=True).mean(0) for texts in prompts(task)]
    return torch.stack([mean / mean.norm() for mean in means])


@torch.no_grad()
def accuracy(tower: torch.nn.Module, head: Tensor, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of images (N, 36, 36, 3) whose class (N) has the largest score."""
    right = 0
    for start in range(0, len(images), _CHUNK):
        features = F.normalize(tower(normalised(channels_first(images[start : start + _CHUNK]))), dim=-1)
        right += int(((features @ head.t()).argmax(1).numpy() == labels[start : start + _CHUNK]).sum())
    return right / len(images)


def checksum(parameters: Iterable[Tensor]) -> str:
    """Equal if and only if the parameters are, bit for bit."""
    return hashlib.sha256(parameters_to_vector(parameters).detach().numpy().tobytes()).hexdigest()[:16]
