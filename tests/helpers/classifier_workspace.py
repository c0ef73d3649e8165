"""Workspaces of tiny classifiers with a head each: of transformers, timm and torchvision, on a few drawn examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from ruamel.yaml import YAML
from safetensors.torch import save_file
from small_language_model import save_tokenizer

CLASSES = {"a": 3, "b": 4, "c": 2}  # of each task, and of its expert
SIZE, N = 16, 24  # pixels, and examples of a split
WORDS = [f"w{i}" for i in range(30)]

MERGES: dict[str, Any] = {
    "average": {"method": "average"},
    "cart": {"method": "cart", "params": {"rank": 0.5}, "search": {"scale": [0.5, 1.0]}},
}


_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_TOKENS = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]


def vit_of_transformers(folder: Path, classes: int | None, seed: int, **more: Any) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

    config = ViTConfig(**_SIZES, image_size=SIZE, patch_size=8, num_labels=classes or 2, **more)
    torch.manual_seed(0)
    trunk = ViTModel(config, add_pooling_layer=False)
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    _save(folder, classes, seed, trunk, ViTForImageClassification)


def resnet_of_transformers(folder: Path, classes: int | None, seed: int) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=classes or 7)
    torch.manual_seed(0)
    model = ResNetForImageClassification(config)
    _changed(model, seed if classes else None).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)


def vit_of_timm(folder: Path, classes: int | None, seed: int) -> None:
    _of_timm(
        folder, "vit_tiny_patch16_224", classes, seed, img_size=SIZE, patch_size=8, depth=2, embed_dim=24
    )


def convnext_of_timm(folder: Path, classes: int | None, seed: int) -> None:
    _of_timm(folder, "convnext_atto", classes, seed, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))


def _of_timm(folder: Path, name: str, classes: int | None, seed: int, **arguments: Any) -> None:
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **arguments)
    if classes is not None:
        model.reset_classifier(classes)
    save_for_hf(
        _changed(model, seed if classes else None), folder, model_args=arguments, safe_serialization=True
    )


def resnet_of_torchvision(folder: Path, classes: int | None, seed: int) -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(num_classes=7)
    if classes is not None:
        model.fc = torch.nn.Linear(512, classes)
    folder.mkdir(parents=True)
    save_file(_changed(model, seed if classes else None).state_dict(), folder / "model.safetensors")


def bert(folder: Path, classes: int | None, seed: int) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    labels = {i: f"c{i}" for i in reversed(range(classes or 1))}
    config = BertConfig(vocab_size=len(_TOKENS), **_SIZES, max_position_embeddings=32, id2label=labels)
    torch.manual_seed(0)
    save_tokenizer(folder, _TOKENS)
    _save(folder, classes, seed, BertForMaskedLM(config), BertForSequenceClassification)


def gpt2(folder: Path, classes: int | None, seed: int) -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2Model

    config = GPT2Config(
        vocab_size=len(_TOKENS), n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=classes or 2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    save_tokenizer(folder, _TOKENS)
    _save(folder, classes, seed, GPT2Model(config), GPT2ForSequenceClassification)


def roberta(folder: Path, classes: int | None, seed: int) -> None:
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaForSequenceClassification

    more = {"max_position_embeddings": 40, "pad_token_id": 0, "num_labels": classes or 2}
    config = RobertaConfig(vocab_size=len(_TOKENS), **_SIZES, **more)
    torch.manual_seed(0)
    save_tokenizer(folder, _TOKENS)
    _save(folder, classes, seed, RobertaForMaskedLM(config), RobertaForSequenceClassification)


def _save(folder: Path, classes: int | None, seed: int, base: Any, kind: Any) -> None:
    """The base, or a classifier of this kind with its trunk, moved at random."""
    if classes is None:
        base.save_pretrained(folder)
        return
    model = kind(base.config)
    model.base_model.load_state_dict(base.base_model.state_dict(), strict=False)
    _changed(model, seed).save_pretrained(folder)


def _changed(model: Any, seed: int | None) -> Any:
    """A model with its weights moved at random; None leaves them as they are."""
    if seed is None:
        return model
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor += 0.3 * tensor.abs().mean() * torch.randn(tensor.shape, generator=generator)
    return model


def save_images(folder: Path, fit: bool = False) -> None:
    """For each task, images that are noise."""
    folder.mkdir()
    for t, (task, classes) in enumerate(CLASSES.items()):
        rng = np.random.default_rng(t)
        splits = ("val", "test", *(["fit"] if fit else []))
        arrays = {f"{split}_x": rng.integers(0, 256, (N, SIZE, SIZE, 3), np.uint8) for split in splits}
        labels = {f"{split}_y": np.arange(N) % classes for split in ("val", "test")}
        np.savez(folder / f"{task}.npz", **arrays, **labels)


def save_texts(folder: Path, **more: Any) -> None:
    """For each task, a table of random words, whose labels are `c0` and so on; `more`: columns of every row."""
    for t, (task, classes) in enumerate(CLASSES.items()):
        rng = np.random.default_rng(t)
        (folder / task).mkdir(parents=True)
        for split in ("val", "test"):
            rows = [
                {"text": " ".join(rng.choice(WORDS, rng.integers(2, 9))), "label": f"c{i % classes}", **more}
                for i in range(N)
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / task / f"{split}.jsonl").write_text(text)


def made(
    root: Path, build: Callable[[Path, int | None, int], None], section: dict[str, Any], **changed: Any
) -> Path:
    """A workspace of a base and three experts that `build` makes; `section`: the modality's own of params.yaml."""
    root.mkdir(exist_ok=True)
    build(root / "in/base", None, 0)
    for seed, (name, classes) in enumerate(CLASSES.items(), 1):
        build(root / "in" / name, classes, seed)
    files = {name: f"in/{name}" for name in ("base", *CLASSES)}
    params = {
        "name": "classifiers",
        "seed": 0,
        "checkpoints": {"layout": "as_is", "files": files, "uris": {}},
        "base": "base",
        "experts": [*CLASSES],
        "merges": MERGES,
        **section,
        **changed,
    }
    with open(root / "params.yaml", "w") as file:
        YAML().dump(params, file)
    return root


def of_images(
    root: Path, build: Any, fit: bool = False, changed: dict[str, Any] | None = None, **more: Any
) -> Path:
    """A workspace of image classifiers; more: of the section, changed: of the rest of params.yaml."""
    root.mkdir(exist_ok=True)
    save_images(root / "data", fit)
    data = {"files": {task: f"data/{task}.npz" for task in CLASSES}, "uris": {}}
    section = {"heads": "auto", "image_size": SIZE, "data": data, **more}
    return made(root, build, {"image_classification": section}, **(changed or {}))


def of_texts(root: Path, build: Any, rows: dict[str, Any] | None = None, **more: Any) -> Path:
    """A workspace of text classifiers; rows: columns that every row has, more: of the section."""
    root.mkdir(exist_ok=True)
    save_texts(root / "data", **(rows or {}))
    data = {"files": {task: f"data/{task}" for task in CLASSES}, "uris": {}}
    section = {"heads": "auto", "data": data, "columns": {task: {"text": "text"} for task in CLASSES}, **more}
    return made(root, build, {"text_classification": section})
