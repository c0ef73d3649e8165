"""Image classification datasets, decoded once and then read through memory maps.

A source is one of
    images.npz, images.safetensors      arrays val_x, val_y, test_x, test_y, and fit_x, with fit_y or without
    folder/                             test/CLASS/*, and val/CLASS/* or train/CLASS/*, and fit/CLASS/* or fit/*
    torchvision://MNIST?root=data       also val=, test=, train=, fit= (names of official splits), download=true,
                                        and split= (for EMNIST)
    hf-dataset://org/name@revision      also ?config=, test=test, val=train[90%:], fit=train[:400], image=image,
                                        label=label

Where no validation split is given, a tenth of train is held out; where there is no test split either
(EuroSAT, SUN397), a tenth of all is drawn for each. The draw is one permutation with a fixed seed of the
examples in a fixed order, so it is the same everywhere; meta.json names the splits that were drawn.
`fit=400` draws so many of train that are not in val.

`fit` is what merges are fitted to, and needs no labels. Without it, that is every other example of val.

Images become RGB and get CLIP's geometry: the shortest side resized (bicubic, antialiased), the centre
cropped. Arrays that have the size already are taken as they are.
"""

from __future__ import annotations

import inspect
import json
import operator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Collection, Sequence

import numpy as np

from mergeline.evaluation.splits import (
    FIT,
    FITTED_OF_VAL,
    SPLITS,
    Examples,
    Opened,
    beside,
    blame,
    check_options,
    official,
    parsed,
)
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.files import publish, staged, write_json


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset. `classnames`, in the order of the labels, are None if the source has none."""

    folder: Path
    classnames: list[str] | None

    def split(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The images (uint8, N x H x W x 3, memory-mapped) and labels (int64, N) of `fit`, `val` or `test`.

        Where there is no `fit`, it is every other example of `val`. Where `fit` has no labels, they are -1.
        """
        if name == FIT and self.fits_val:
            x, y = self.split("val")
            return x[FITTED_OF_VAL], y[FITTED_OF_VAL]
        try:
            x = np.load(self.folder / f"{name}_x.npy", mmap_mode="r", allow_pickle=False)
            if name == FIT and not (self.folder / f"{FIT}_y.npy").exists():
                y = np.full(len(x), -1, np.int64)
            else:
                y = np.load(self.folder / f"{name}_y.npy", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{self.folder}: not a prepared dataset ({error}); prepare it again") from None
        images = x.dtype == np.uint8 and x.ndim == 4 and x.shape[3] == 3
        if not images or y.dtype != np.int64 or y.shape != x.shape[:1]:
            raise UserError(f"{self.folder}: {name}_x.npy and {name}_y.npy do not fit; prepare it again")
        return x, y

    @property
    def fits_val(self) -> bool:
        """Whether it has no split `fit`, so that examples of `val` stand for one."""
        return not (self.folder / f"{FIT}_x.npy").exists()


def load(folder: Path | str) -> Dataset:
    """Open what `prepare` made."""
    try:
        meta = json.loads((Path(folder) / "meta.json").read_text())
        return Dataset(Path(folder), meta["classnames"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: not a prepared dataset (no valid meta.json); prepare it again") from None


def prepare(source: str, out: Path | str, image_size: int) -> None:
    """Decode a dataset into the folder `out`: val_x.npy, val_y.npy, test_x.npy, test_y.npy, meta.json.

    And fit_x.npy, fit_y.npy, of what the source has of them. x is uint8 (N, image_size, image_size, 3), y is int64 (N).
    The same source gives the same bytes. `out` appears whole or not at all, and replaces what was there. Images are
    decoded one at a time.

    Raises:
        UserError: the source is not there, cannot be read, or does not hold images with labels.
    """
    opened, out = _open(source), Path(out)
    with staged(out) as partial:
        for name in SPLITS:
            _write(getattr(opened, name), name, partial, image_size, source)
        if opened.fit is not None:
            _write(opened.fit, FIT, partial, image_size, source)
        write_json(partial / "meta.json", _meta(opened, source))
        publish(partial, out)


def _open(source: str) -> Opened:
    scheme, separator, _ = source.partition("://")
    if separator and scheme in _SCHEMES:
        return _SCHEMES[scheme](source)
    if separator:
        raise UserError(f"{source}: unknown scheme '{scheme}'{did_you_mean(scheme, _SCHEMES)}")
    path = Path(source)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise UserError(f"{source}: no such file or folder")
    if not path.is_file():
        raise UserError(f"{source}: is no file, but a pipe or a device; name a file or a folder")
    return _open_arrays(path)


def _write(examples: Examples, name: str, folder: Path, image_size: int, source: str) -> None:
    if not examples.size:
        raise UserError(f"{source}: the {name} split is empty")
    labels = np.zeros(examples.size, np.int64)
    with open(folder / f"{name}_x.npy", "wb") as file:
        begin_array(file, np.uint8, (examples.size, image_size, image_size, 3))
        for i in range(examples.size):
            with blame_images(f"{source}: {name} image {i}", ValueError, TypeError, OSError, SyntaxError):
                image, label = examples.get(i)
                pixels = square_pixels(image, image_size)
                if examples.labelled:
                    labels[i] = operator.index(label)
            file.write(pixels.tobytes())
    if not examples.labelled:
        return
    classes = len(examples.classnames or ()) or np.iinfo(np.int32).max
    if labels.min() < 0 or labels.max() >= classes:
        extent = f"{labels.min()} to {labels.max()}"
        raise UserError(f"{source}: {name} labels go from {extent}; they must lie in 0 to {classes - 1}")
    np.save(folder / f"{name}_y.npy", labels)


def begin_array(file: BinaryIO, dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    """Begin an .npy file whose rows follow one by one; not by a memory map, where a full disk is a bus error."""
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})


def _meta(opened: Opened, source: str) -> dict[str, Any]:
    return {
        "source": source if "://" in source else Path(source).name,  # where it lies is no part of what it is
        "classnames": opened.test.classnames,
        "sizes": {
            "val": opened.val.size,
            "test": opened.test.size,
            **({FIT: opened.fit.size} if opened.fit else {}),
        },
        "drawn": list(opened.drawn),
    }


def square_pixels(image: Any, size: int) -> np.ndarray:
    """uint8 (size, size, 3) of a PIL image or a uint8 array (H, W), (H, W, 1) or (H, W, 3)."""
    from PIL import Image

    if isinstance(image, np.ndarray):
        if image.ndim == 2 or image.shape[2] == 1:
            image = np.broadcast_to(image.reshape(*image.shape[:2], 1), (*image.shape[:2], 3))
        if image.shape == (size, size, 3):
            return image
        image = Image.fromarray(np.ascontiguousarray(image))
    if not isinstance(image, Image.Image):
        raise TypeError(f"{type(image).__name__} is not an image")
    image = image.convert("RGB")  # before resizing, for the colours of a palette cannot be interpolated
    width, height = image.size
    short = min(width, height)
    width, height = int(size * width / short), int(size * height / short)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def blame_images(what: str, *errors: type[Exception]) -> AbstractContextManager[None]:
    """As `blame`, of images too."""
    from PIL import Image

    return blame(what, *errors, Image.DecompressionBombError)


# Arrays


def read_arrays(path: Path, keys: Collection[str]) -> dict[str, np.ndarray]:
    """The arrays of an .npz or .safetensors file that have these names (raises UserError)."""
    import lzma
    import zipfile
    import zlib

    from safetensors import SafetensorError

    damage = (zipfile.BadZipFile, lzma.LZMAError, zlib.error, SafetensorError, EOFError, ValueError)
    if path.suffix not in _ARRAYS:
        raise UserError(f"{path}: must be a folder or end in {' or '.join(_ARRAYS)}")
    with blame_images(str(path), *damage, OSError, MemoryError):
        return _ARRAYS[path.suffix](path, keys)


def _open_arrays(path: Path) -> Opened:
    arrays = read_arrays(path, _ARRAY_KEYS)
    own = {FIT: FIT} if f"{FIT}_x" in arrays else {}
    if not own and f"{FIT}_y" in arrays:
        raise UserError(f"{path}: fit_y is there, but no fit_x; add the images, or leave fit_y out")
    return official(lambda name: _array_examples(path, name, arrays), {"val": "val", **own}, str(path))


def _read_npz(path: Path, keys: Collection[str]) -> dict[str, np.ndarray]:
    file = np.load(path, allow_pickle=False)
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError("not an npz file")
    with file:
        return {key: file[key] for key in file.files if key in keys}


def _read_safetensors(path: Path, keys: Collection[str]) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys() if key in keys}


_ARRAYS = {".npz": _read_npz, ".safetensors": _read_safetensors}
_NEEDED_KEYS = [f"{name}_{axis}" for name in SPLITS for axis in "xy"]
_ARRAY_KEYS = [*_NEEDED_KEYS, f"{FIT}_x", f"{FIT}_y"]


def _array_examples(path: Path, name: str, arrays: dict[str, np.ndarray]) -> Examples:
    labelled = name != FIT or f"{name}_y" in arrays
    for key in (f"{name}_x", f"{name}_y") if labelled else ():
        if key not in arrays:
            raise UserError(f"{path}: '{key}' is missing; it must hold {', '.join(_NEEDED_KEYS)}")
    x = arrays[f"{name}_x"]
    y = arrays[f"{name}_y"] if labelled else np.zeros(len(x), np.int64)
    images = x.ndim == 3 or x.ndim == 4 and x.shape[3] in (1, 3)
    if x.dtype != np.uint8 or not images or 0 in x.shape[1:]:
        raise UserError(f"{path}: {name}_x is {x.dtype} {x.shape}, not uint8 (N, H, W) or (N, H, W, 1 or 3)")
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise UserError(f"{path}: {name}_y is {y.dtype} {y.shape}, not integers ({len(x)},)")
    return Examples(len(x), lambda i: (x[i], y[i]), labelled=labelled)


# Folders of images


def _open_folder(root: Path) -> Opened:
    if not (root / "test").is_dir():
        raise UserError(
            f"{root}: no folder test/; put images at test/CLASS/*, and val/CLASS/* or train/CLASS/*"
        )
    classes = sorted(entry.name for entry in (root / "test").iterdir() if entry.is_dir())
    opened = official(
        lambda name: _folder_examples(root / name, classes),
        {"val": "val"} if (root / "val").is_dir() else {},
        str(root),
    )
    return replace(opened, fit=_fit_folder(root / FIT, classes)) if (root / FIT).is_dir() else opened


def _fit_folder(folder: Path, classes: list[str]) -> Examples:
    """fit/CLASS/*, or fit/* without labels."""
    shown = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    if any(path.is_dir() for path in shown):
        if odd := next((path for path in shown if not path.is_dir()), None):
            raise UserError(f"{odd}: lies beside folders of classes; put all of {folder} into them, or none")
        return _folder_examples(folder, classes)
    return Examples(len(shown), lambda i: (_image(shown[i]), None), labelled=False)


def _folder_examples(folder: Path, classes: list[str]) -> Examples:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and entry.name not in classes:
            raise UserError(f"{entry}: there is no class '{entry.name}' under test/")
        if entry.is_dir():
            label = classes.index(entry.name)
            shown = sorted(path for path in entry.iterdir() if not path.name.startswith("."))
            if odd := next((path for path in shown if not path.is_file()), None):
                raise UserError(f"{odd}: is no file; keep only images under {entry}")
            files += [(path, label) for path in shown]

    def get(i: int) -> tuple[Any, int]:
        path, label = files[i]
        return _image(path), label

    return Examples(len(files), get, _readable(classes))


def _image(path: Path) -> Any:
    from PIL import Image

    with blame_images(str(path), OSError, ValueError, SyntaxError), Image.open(path) as image:
        return image.convert("RGB")


def _readable(classnames: Sequence[str]) -> list[str]:
    return [str(name).replace("_", " ").replace("/", " ") for name in classnames]


# torchvision


def _open_torchvision(source: str) -> Opened:
    name, options = parsed(source)
    with blame_images(source, ImportError):
        from torchvision import datasets
    kind = getattr(datasets, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, datasets.VisionDataset)):
        hint = did_you_mean(name, datasets.__all__)
        raise UserError(f"{source}: torchvision has no dataset '{name}'{hint}")
    parameters = inspect.signature(kind).parameters
    by_flag = "train" in parameters or issubclass(kind, datasets.MNIST)
    by_name = "split" in parameters and not by_flag
    variants = {"split"} if issubclass(kind, datasets.EMNIST) else set()
    splits = {"train", "val", "test"} if by_name else set()
    check_options(source, options, {"root", "download", FIT} | variants | splits)
    if not by_name and not options.get(FIT, "0").isdecimal():
        raise UserError(f"{source}: {name} has no split to fit to; write fit=400 for so many of its examples")
    if "root" not in options:
        raise UserError(f"{source}: add ?root=FOLDER, the folder that holds the dataset")
    arguments: dict[str, Any] = {key: options[key] for key in {"root"} | variants if key in options}
    if options.get("download") == "true":
        arguments["download"] = True

    def examples(**which: Any) -> Examples:
        with blame_images(source, RuntimeError, ValueError, TypeError, OSError, ImportError):
            dataset: Any = kind(**arguments, **which)
        classes = getattr(dataset, "classes", None)
        everything = Examples(len(dataset), dataset.__getitem__, _readable(classes) if classes else None)
        return everything.take(_stable_order(dataset))

    if by_flag:
        own = {key: options[key] for key in (FIT,) if key in options}
        return official(lambda split: examples(train=split == "train"), own, source)
    if by_name:
        return official(lambda split: examples(split=split), options, source)
    val, test, fit = beside(examples(), 2, options.get(FIT, ""), source)
    return Opened(val, test, (*SPLITS, *([FIT] if fit else [])), fit)


def _stable_order(dataset: Any) -> Sequence[int]:
    """Some of torchvision's datasets list their files in the order of the file system; put them by name."""
    samples = getattr(dataset, "_samples", None) or []
    files = getattr(dataset, "_image_files", None) or [file for file, *_ in samples]
    return sorted(range(len(dataset)), key=lambda i: str(files[i])) if files else range(len(dataset))


# Hugging Face


def open_hub(source: str) -> Opened:
    """Two columns of a dataset of the Hugging Face hub, an image and its label (raises UserError)."""
    address, options = parsed(source)
    check_options(source, options, {"config", "train", "val", "test", FIT, "image", "label"})
    path, _, revision = address.partition("@")
    image, label = options.get("image", "image"), options.get("label", "label")
    with blame_images(source, ImportError):
        import datasets

    def examples(split: str) -> Examples:
        with blame_images(source, datasets.exceptions.DatasetsError, OSError, ValueError, ImportError):
            table = datasets.load_dataset(path, options.get("config"), split=split, revision=revision or None)
        for column in (image, label):
            if column not in table.column_names:
                raise UserError(f"{source}: no column '{column}'; there are {', '.join(table.column_names)}")
        table = table.select_columns([image, label])
        classes = getattr(table.features[label], "names", None)
        pair = operator.itemgetter(image, label)
        return Examples(len(table), lambda i: pair(table[i]), _readable(classes) if classes else None)

    return official(examples, options, source)


_SCHEMES = {"torchvision": _open_torchvision, "hf-dataset": open_hub}
