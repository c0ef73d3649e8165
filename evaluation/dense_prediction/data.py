"""Images with something of every pixel, decoded once and then read through memory maps.

A source is one of
    images.npz, images.safetensors      arrays val_x, val_y, test_x, test_y
    folder/                             test/images/*, test/targets/*, and val/ or train/ likewise; an image and its
                                        target have one name before the dot
    hf-dataset://org/name@revision      also ?config=, test=test, val=train[90%:], image=image, label=label

Splits are those of evaluation/splits.py. Images are uint8, (H, W), (H, W, 1 or 3), or files of any format that Pillow
reads; they become RGB. What a target is depends on what is asked for:
    labels      integers (H, W), or an image with a palette or of one channel: numbers of classes; 255 and -1 do not
                count
    mask        the same, or truth values: 0, and all else is 1; 255 does not count where there are 1s
    distances   numbers (H, W): in the data's unit; what is 0, negative or no number does not count
    normals     numbers (H, W, 3): directions; what has no length does not count
    images      as the images themselves
Targets in folders that are no images are .npy files. Images are resized to the size asked for (bicubic), targets but
images by the nearest pixel; what has the size already is taken as it is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergeline.evaluation.datasets import begin_array, blame_images, open_hub, read_arrays
from mergeline.evaluation.dense_prediction.metrics import IGNORED, Target
from mergeline.evaluation.dense_prediction.settings import Task
from mergeline.evaluation.splits import SPLITS, Examples, Opened, official
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.files import publish, staged, write_json

Size = tuple[int, int]  # height and width

_META = "meta.json"
_KEYS = tuple(f"{split}_{axis}" for split in SPLITS for axis in "xy")
_DTYPES: dict[Target, Any] = {
    "labels": np.uint8,
    "mask": np.uint8,
    "distances": np.float32,
    "normals": np.float32,
    "images": np.uint8,
}


@dataclass(frozen=True)
class DenseSet:
    """A prepared dataset. classes: one more than the largest label of all; 0 where targets are no labels."""

    folder: Path
    task: Task
    classes: int

    def split(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Images, uint8 (N, H, W, 3), and targets, of a dtype and shape that its target says; memory-mapped.

        labels and mask uint8 (N, H, W), 255 where none; distances float32 (N, H, W), 0 where none; normals float32
        (N, H, W, 3), 0 where none; images uint8 (N, H, W, 3). Raises UserError.
        """
        try:
            x, y = (
                np.load(self.folder / f"{name}_{axis}.npy", mmap_mode="r", allow_pickle=False)
                for axis in "xy"
            )
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{self.folder}: not a prepared dataset ({error}); prepare it again") from None
        if x.ndim != 4 or y.shape[:3] != x.shape[:3] or y.dtype != _DTYPES[self.task.target]:
            raise UserError(f"{self.folder}: {name}_x.npy and {name}_y.npy do not fit; prepare it again")
        return x, y


def load(folder: Path | str) -> DenseSet:
    """Open what `prepare` made (raises UserError)."""
    try:
        meta = json.loads((Path(folder) / _META).read_text())
        return DenseSet(Path(folder), Task.model_validate(meta["task"]), meta["classes"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: not a prepared dataset (no valid {_META}); prepare it again") from None


def prepare(source: str, out: Path | str, task: Task, size: Size) -> None:
    """Decode a dataset into the folder `out`: val_x.npy, val_y.npy, test_x.npy, test_y.npy, meta.json.

    `out` appears whole or not at all, and replaces what was there. Images are decoded one at a time.

    Raises:
        UserError: the source is not there, cannot be read, or does not hold images with such targets.
    """
    opened, out = _open(source), Path(out)
    with staged(out) as partial:
        classes = max(
            _write(examples, split, partial, task.target, size, source)
            for split, examples in (("val", opened.val), ("test", opened.test))
        )
        name = source if "://" in source else Path(source).name
        meta = {"source": name, "task": task.model_dump(), "classes": classes, "drawn": list(opened.drawn)}
        write_json(partial / _META, meta)
        publish(partial, out)


def _write(examples: Examples, split: str, folder: Path, target: Target, size: Size, source: str) -> int:
    """Write a split; returns one more than its largest label, or 0."""
    if not examples.size:
        raise UserError(f"{source}: the {split} split is empty")
    channels = [3] if target in ("normals", "images") else []
    classes = 0
    with open(folder / f"{split}_x.npy", "wb") as xs, open(folder / f"{split}_y.npy", "wb") as ys:
        begin_array(xs, np.uint8, (examples.size, *size, 3))
        begin_array(ys, _DTYPES[target], (examples.size, *size, *channels))
        for i in range(examples.size):
            what = f"{source}: {split} image {i}"
            with blame_images(what, ValueError, TypeError, OSError, SyntaxError):
                image, right = examples.get(i)
                x = _image(image, size)
                y = _image(right, size) if target == "images" else _pixels(right, target, size)
            if target != "images" and not _counts(y, target).any():
                raise UserError(f"{what}: no pixel of it has a right answer; leave the image out")
            if target == "labels":
                classes = max(classes, int(y[y != IGNORED].max()) + 1)
            xs.write(x.tobytes())
            ys.write(y.tobytes())
    return classes


def _counts(right: np.ndarray, target: Target) -> np.ndarray:
    """Which pixels have a right answer, (H, W)."""
    if target in ("labels", "mask"):
        return right != IGNORED
    return right > 0 if target == "distances" else np.any(right != 0, axis=-1)


def _image(image: Any, size: Size) -> np.ndarray:
    """uint8 (H, W, 3) of a PIL image, or of a uint8 array (H, W) or (H, W, 1 or 3)."""
    from PIL import Image

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise TypeError(f"{image.dtype} {image.shape} is no image of bytes")
        image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
    if not isinstance(image, Image.Image):
        raise TypeError(f"{type(image).__name__} is not an image")
    image, (height, width) = image.convert("RGB"), size
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _pixels(right: Any, target: Target, size: Size) -> np.ndarray:
    """A target in the size asked for: each pixel that of the nearest one."""
    found = np.asarray(right)
    shape = (3,) if target == "normals" else ()
    if found.ndim != 2 + len(shape) or found.shape[2:] != shape or 0 in found.shape:
        wanted = "(H, W, 3)" if shape else "(H, W)"
        raise ValueError(f"its target is {found.dtype} {found.shape}, and {target} are {wanted}")
    rows, columns = ((np.arange(new) * 2 + 1) * old // (2 * new) for new, old in zip(size, found.shape[:2]))
    found = found[rows[:, None], columns]
    if target in ("labels", "mask"):
        return _labels(found, target)
    if found.dtype.kind not in "fiu":
        raise ValueError(f"its target is {found.dtype}, and {target} are numbers")
    found = found.astype(np.float32)
    finite = np.isfinite(found) if target == "distances" else np.isfinite(found).all(-1, keepdims=True)
    return np.where(finite & (found > 0) if target == "distances" else finite, found, 0)


def _labels(found: np.ndarray, target: Target) -> np.ndarray:
    if found.dtype.kind == "b":
        return found.astype(np.uint8)
    if found.dtype.kind not in "iu":
        raise ValueError(f"its target is {found.dtype}, and {target} is of integers")
    if target == "mask":
        ignored = (found == IGNORED) & bool((found == 1).any())
        return np.where(ignored, IGNORED, found != 0).astype(np.uint8)
    if found.min() < -1 or found.max() > IGNORED:
        raise ValueError(f"its labels go from {found.min()} to {found.max()}; they must lie in 0 to 254")
    return np.where(found == -1, IGNORED, found).astype(np.uint8)


def _open(source: str) -> Opened:
    scheme, separator, _ = source.partition("://")
    if separator and scheme != "hf-dataset":
        raise UserError(f"{source}: unknown scheme '{scheme}'{did_you_mean(scheme, ['hf-dataset'])}")
    if separator:
        return open_hub(source)
    path = Path(source)
    if path.is_dir():
        own = {"val": "val"} if (path / "val").is_dir() else {}
        return official(lambda name: _folder(path / name), own, source)
    if not path.exists():
        raise UserError(f"{source}: no such file or folder")
    arrays = read_arrays(path, _KEYS)
    return official(lambda name: _of_arrays(path, name, arrays), {"val": "val"}, source)


def _of_arrays(path: Path, name: str, arrays: dict[str, np.ndarray]) -> Examples:
    for key in (f"{name}_x", f"{name}_y"):
        if key not in arrays:
            raise UserError(f"{path}: '{key}' is missing; it must hold {', '.join(_KEYS)}")
    x, y = arrays[f"{name}_x"], arrays[f"{name}_y"]
    if x.ndim not in (3, 4) or len(x) != len(y):
        raise UserError(f"{path}: {name}_x is {x.shape} and {name}_y {y.shape}: a target for each image")
    return Examples(len(x), lambda i: (x[i], y[i]))


def _folder(folder: Path) -> Examples:
    images, targets = (_by_name(folder / part) for part in ("images", "targets"))
    if odd := sorted(images.keys() ^ targets.keys()):
        has, lacks = ("image", "target") if odd[0] in images else ("target", "image")
        raise UserError(f"{folder}: '{odd[0]}' has an {has} and no {lacks}".replace("an target", "a target"))
    names = sorted(images)
    return Examples(len(names), lambda i: (_read(images[names[i]]), _read(targets[names[i]])))


def _by_name(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; put images at test/images/*, targets at test/targets/*")
    found: dict[str, Path] = {}
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if not path.is_file():
            raise UserError(f"{path}: is no file; keep only images under {folder}")
        if path.stem in found:
            raise UserError(f"{path}: {found[path.stem].name} has the same name before the dot; keep one")
        found[path.stem] = path
    return found


def _read(path: Path) -> Any:
    """An image as it is stored, or an array."""
    from PIL import Image

    with blame_images(str(path), OSError, ValueError, SyntaxError, EOFError):
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        with Image.open(path) as image:
            image.load()
            return image
