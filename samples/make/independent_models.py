"""Pairs of small models that were trained independently: other starts, other orders of the same examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from make.classifier_tasks import task_arrays
from make.hashing import stable_hash
from make.model import augmented, channels_first, normalised

TASK, TEXTS = "textures", "texts"
NAMES = ("a", "b")
_STEPS = {"mlp": 1000, "resnet": 300, "vit": 500, "llama": 300}
_RATES = {"mlp": 1e-3, "resnet": 2e-3, "vit": 1e-3, "llama": 2e-3}
_BATCH, _TEXTS, _CONTEXT = 64, 32, 64  # images, and texts of so many bytes
_TESTED = 400  # images
_SIDE = 12  # of the images that the MLP is shown


def _mlp(classes: int) -> nn.Module:
    widths = [3 * _SIDE * _SIDE, 512, 512, 512, classes]
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _resnet(classes: int) -> nn.Module:
    config = ResNetConfig(
        embedding_size=48,
        hidden_sizes=[48, 96, 192],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=classes,
    )
    return ResNetForImageClassification(config)


def _vit(classes: int) -> nn.Module:
    config = ViTConfig(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=384, image_size=36,
        patch_size=6, num_labels=classes,
    )  # fmt: skip
    return ViTForImageClassification(config)


def _llama(classes: int) -> nn.Module:
    config = LlamaConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=512,
        vocab_size=256, max_position_embeddings=_CONTEXT, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


KINDS: dict[str, Callable[[int], nn.Module]] = {"mlp": _mlp, "resnet": _resnet, "vit": _vit, "llama": _llama}


def texts(documents: Path) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of Markdown files, (N,) uint8: of all but each seventh to train on, of these to test on."""
    pages = [page.read_bytes() for page in sorted(documents.glob("*.md"))]
    test, train = pages[::7], [page for i, page in enumerate(pages) if i % 7]
    return tuple(np.frombuffer(b"".join(part), np.uint8) for part in (train, test))  # type: ignore[return-value]


def logits_of(kind: str, model: nn.Module, images: Tensor) -> Tensor:
    """(B, classes) of normalised images (B, 3, 36, 36)."""
    if kind == "mlp":
        return model(nn.functional.adaptive_avg_pool2d(images, _SIDE).flatten(1))
    return model(images).logits


def loss_of(kind: str, model: nn.Module, x: Any, y: Any) -> Tensor:
    """The mean cross entropy: of images and their classes, or of the next byte of texts (B, L)."""
    if kind == "llama":
        logits = model(input_ids=x[:, :-1]).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
    return nn.functional.cross_entropy(logits_of(kind, model, x), y)


def test_batches(kind: str, data: Path) -> list[tuple[Tensor, Tensor | None]]:
    """What models are measured on."""
    if kind == "llama":
        bytes_N = np.load(data / f"{TEXTS}.npz")["test_x"].astype(np.int64)
        count = min(128, len(bytes_N) // _CONTEXT)
        rows = torch.from_numpy(bytes_N[: count * _CONTEXT].reshape(count, _CONTEXT))
        return [(part, None) for part in rows.split(64)]
    held = np.load(data / f"{TASK}.npz")
    x, y = normalised(channels_first(held["test_x"][:_TESTED])), torch.from_numpy(held["test_y"][:_TESTED])
    return list(zip(x.split(100), y.split(100)))


def write_data(out: Path, documents: Path) -> None:
    """OUT/data: what models are trained and measured on."""
    (out / "data").mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / "data" / f"{TASK}.npz", **task_arrays(TASK))  # type: ignore[arg-type]
    train, test = texts(documents)
    np.savez_compressed(out / "data" / f"{TEXTS}.npz", train_x=train, test_x=test)


def write_model(kind: str, name: str, out: Path, share: float = 1.0) -> str:
    """OUT/KIND/NAME, trained from a start of its own; a line on it. share: of the steps."""
    seed = stable_hash(f"independent {kind} {name}") % 2**32
    torch.manual_seed(seed)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    held = np.load(out / "data" / f"{TEXTS if kind == 'llama' else TASK}.npz")
    x = held["train_x"]
    y = None if kind == "llama" else torch.from_numpy(held["train_y"])
    classes = 0 if y is None else int(y.max()) + 1
    model, steps = KINDS[kind](classes), max(5, round(share * _STEPS[kind]))
    optimiser = torch.optim.AdamW(model.parameters(), lr=_RATES[kind], weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, _RATES[kind], total_steps=steps, pct_start=max(0.1, 2 / steps)
    )
    model.train()
    for _ in range(steps):
        if y is None:
            starts = rng.integers(0, len(x) - _CONTEXT, _TEXTS)
            rows = torch.from_numpy(np.stack([x[s : s + _CONTEXT] for s in starts]).astype(np.int64))
            loss = loss_of(kind, model, rows, None)
        else:
            chosen = rng.integers(0, len(x), _BATCH)
            loss = loss_of(kind, model, augmented(x[chosen], generator), y[chosen])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.eval()
    folder = out / kind / name
    if kind == "mlp":
        folder.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    else:
        model.save_pretrained(folder)  # type: ignore[operator]
    with torch.no_grad():
        losses = [float(loss_of(kind, model, *batch)) for batch in test_batches(kind, out / "data")]
    return f"{kind} {name}: loss {sum(losses) / len(losses):.3f} on test"
