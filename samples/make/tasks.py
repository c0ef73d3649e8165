"""The images of the eight tasks, and those that the base model is trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from make.catalogue import CLASSNAMES, PRETRAINING_SETS, SCRIPTS
from make.drawing import paint
from make.figures import counts, directions, shapes
from make.glyphs import Geometry, glyphs
from make.hashing import stable_hash
from make.packaging import write_npz
from make.photographs import digits, enlarged, fashion
from make.textures import textures

Examples = tuple[np.ndarray, np.ndarray]  # images (N, 36, 36, 3) uint8, classes (N) int64

_FIT = 400  # unlabelled images a task
_SIZES = {"train": 6000, "val": 400, "test": 800}

# What sets a letter task apart from pre-training: its colours, and how its letters are drawn.
_DOMAINS = {
    "latin": ("blotches", Geometry(slant=0.3)),
    "hiragana": ("paper", Geometry(scale=0.64)),
    "arabic": ("board", Geometry(outlined=True)),
    "cyrillic": ("duo", Geometry(turn=24)),
}

_FASHION_SEED = 11  # Fashion-MNIST's train set: the first images of this order train, choose and pre-train
_PRETRAINING_SEED = 7
_LETTERS_A_CLASS, _DRAWINGS_A_CLASS = 130, 120  # images of pre-training


def make_task(task: str, work: Path) -> None:
    """Write work/TASK.npz: train_x, train_y, val_x, val_y, test_x, test_y."""
    rng = np.random.default_rng(stable_hash("task9" + task) % 2**32)  # the text only names a seed
    arrays: dict[str, np.ndarray] = {}
    for split, (images, labels) in _examples(task, rng, work).items():
        order = rng.permutation(len(labels))
        arrays |= {f"{split}_x": images[order], f"{split}_y": labels[order].astype(np.int64)}
    np.savez(work / f"{task}.npz", **arrays)
    print(task, {split: len(arrays[f"{split}_y"]) for split in _SIZES})


def make_fit(task: str, work: Path, out: Path) -> None:
    """Add fit_x to out/data/TASK.npz: images without labels, as the training images were drawn.

    Digits are of the expert's own training images, for there are no others.
    """
    rng = np.random.default_rng(stable_hash("fit" + task) % 2**32)
    if task == "fashion":
        start = _SIZES["train"] + _SIZES["val"]
        images, _ = _pick(fashion("train"), _fashion_order()[start : start + _FIT])
    elif task == "digits":
        order = np.random.default_rng(stable_hash("task9digits") % 2**32)
        images, _ = _pick(digits(), order.permutation(1797)[:847][:_FIT])
    else:
        images, _ = _drawn(task, "train", _FIT, rng, work)
    images = images[rng.permutation(len(images))]
    path = out / "data" / f"{task}.npz"
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name != "fit_x"}
    write_npz({**arrays, "fit_x": images}, path)
    print(task, len(images))


def _examples(task: str, rng: np.random.Generator, work: Path) -> dict[str, Examples]:
    if task == "fashion":
        return _fashion(rng)
    if task == "digits":
        return _digits(rng)
    return {split: _drawn(task, split, n, rng, work) for split, n in _SIZES.items()}


def _fashion(rng: np.random.Generator) -> dict[str, Examples]:
    """train and val from Fashion-MNIST's train set, test from its test set."""
    order, test_order = _fashion_order(), rng.permutation(10_000)[: _SIZES["test"]]
    train, val = np.split(order[: _SIZES["train"] + _SIZES["val"]], [_SIZES["train"]])
    return {
        "train": _pick(fashion("train"), train),
        "val": _pick(fashion("train"), val),
        "test": _pick(fashion("t10k"), test_order),
    }


def _fashion_order() -> np.ndarray:
    return np.random.default_rng(_FASHION_SEED).permutation(60_000)


def _digits(rng: np.random.Generator) -> dict[str, Examples]:
    """847 train, 250 val, 700 test, at random."""
    examples = digits()
    train, val, test = np.split(rng.permutation(1797), [847, 1097])
    return {"train": _pick(examples, train), "val": _pick(examples, val), "test": _pick(examples, test)}


def _pick(examples: Examples, index: np.ndarray) -> Examples:
    """Some of the grey images (N, h, w), enlarged and in three equal channels, and their classes."""
    images, labels = examples
    return enlarged(images[index])[..., None].repeat(3, -1), labels[index]


def _drawn(task: str, split: str, n: int, rng: np.random.Generator, work: Path) -> Examples:
    if task == "textures":
        return textures(n, rng)
    if task == "shapes":
        return shapes(n, rng)
    style, geometry = _DOMAINS[task]
    masks, labels = glyphs(task, split, n, rng, geometry, work)
    return paint(masks, rng, style), labels


def make_pretraining(work: Path) -> None:
    """Write work/pretraining.npz: x (N, 36, 36, 3) uint8, and y (N), classes counted through all sets."""
    rng = np.random.default_rng(_PRETRAINING_SEED)
    images, labels, classes = [], [], 0
    for name in PRETRAINING_SETS:
        x, y = _pretraining_set(name, rng, work)
        images.append(x)
        labels.append(y + classes)
        classes += len(CLASSNAMES[name])
        print(name, len(x))
    np.savez(work / "pretraining.npz", x=np.concatenate(images), y=np.concatenate(labels))


def _pretraining_set(name: str, rng: np.random.Generator, work: Path) -> Examples:
    if name in SCRIPTS:
        n = _LETTERS_A_CLASS * len(CLASSNAMES[name])
        masks, labels = glyphs(name, "pretraining", n, rng, Geometry(turn_jitter=5), work)
        return paint(masks, rng, "mix"), labels
    if name == "fashion":
        images, labels = fashion("train")
        index = _fashion_order()[10_000:11_000]  # none of the task's
        return paint(enlarged(images[index]), rng, "mix"), labels[index]
    n = _DRAWINGS_A_CLASS * len(CLASSNAMES[name])
    draw = {"textures": textures, "shapes": shapes, "counts": counts, "directions": directions}[name]
    return draw(n, rng, pretraining=True)
