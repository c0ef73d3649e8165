"""Image classification datasets, decoded once and then read through memory maps.

A source is one of
    images.npz, images.safetensors      arrays val_x, val_y, test_x, test_y
    folder/                             test/CLASS/*, and val/CLASS/* or train/CLASS/*
    torchvision://MNIST?root=data       also val=, test=, train= (names of official splits), download=true,
                                        and split= (for EMNIST)
    hf-dataset://org/name@revision      also ?config=, test=test, val=train[90%:], image=image, label=label

Where no validation split is given, a tenth of train is held out; where there is no test split either
(EuroSAT, SUN397), a tenth of all is drawn for each. The draw is one permutation with a fixed seed of the
examples in a fixed order, so it is the same everywhere; meta.json names the splits that were drawn.

Images become RGB and get CLIP's geometry: the shortest side resized (bicubic, antialiased), the centre
cropped. Arrays that have the size already are taken as they are.
"""

from __future__ import annotations

import inspect
import json
import operator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from merging.errors import UserError, did_you_mean
from merging.files import publish, staged, write_json

SPLITS = ("val", "test")
DRAWN_SHARE = 0.1
DRAW_SEED = 0


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset. `classnames`, in the order of the labels, are None if the source has none."""

    folder: Path
    classnames: list[str] | None

    def split(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The images (uint8, N x H x W x 3, memory-mapped) and labels (int64, N) of `val` or `test`."""
        try:
            x = np.load(self.folder / f"{name}_x.npy", mmap_mode="r", allow_pickle=False)
            y = np.load(self.folder / f"{name}_y.npy", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{self.folder}: not a prepared dataset ({error}); prepare it again") from None
        images = x.dtype == np.uint8 and x.ndim == 4 and x.shape[3] == 3
        if not images or y.dtype != np.int64 or y.shape != x.shape[:1]:
            raise UserError(f"{self.folder}: {name}_x.npy and {name}_y.npy do not fit; prepare it again")
        return x, y


def load(folder: Path | str) -> Dataset:
    """Open what `prepare` made."""
    try:
        meta = json.loads((Path(folder) / "meta.json").read_text())
        return Dataset(Path(folder), meta["classnames"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: not a prepared dataset (no valid meta.json); prepare it again") from None


def prepare(source: str, out: Path | str, image_size: int) -> None:
    """Decode a dataset into the folder `out`: val_x.npy, val_y.npy, test_x.npy, test_y.npy, meta.json.

    x is uint8 (N, image_size, image_size, 3), y is int64 (N). The same source gives the same bytes. `out`
    appears whole or not at all, and replaces what was there. Images are decoded one at a time.

    Raises:
        UserError: the source is not there, cannot be read, or does not hold images with labels.
    """
    opened, out = _open(source), Path(out)
    with staged(out) as partial:
        for name in SPLITS:
            _write(getattr(opened, name), name, partial, image_size, source)
        write_json(partial / "meta.json", _meta(opened, source))
        publish(partial, out)


@dataclass(frozen=True)
class _Examples:
    """`get(i)` is the i-th of `size` pairs of an image (PIL or uint8 array) and its label."""

    size: int
    get: Callable[[int], tuple[Any, Any]]
    classnames: list[str] | None = None

    def take(self, indices: Sequence[int]) -> _Examples:
        return replace(self, size=len(indices), get=lambda i: self.get(int(indices[i])))

    def draw(self, parts: int) -> list[_Examples]:
        """`parts` disjoint random samples of a tenth each."""
        order = np.random.default_rng(DRAW_SEED).permutation(self.size)
        size = round(DRAWN_SHARE * self.size)
        return [self.take(np.sort(order[k * size : (k + 1) * size])) for k in range(parts)]


@dataclass(frozen=True)
class _Opened:
    """The examples of both splits, and which of the splits were drawn at random."""

    val: _Examples
    test: _Examples
    drawn: tuple[str, ...] = ()


def _official(split: Callable[[str], _Examples], options: Mapping[str, str]) -> _Opened:
    """The source's own splits, by the names in `options`; without `val` there, it is drawn from train."""
    test = split(options.get("test", "test"))
    if "val" in options:
        return _Opened(split(options["val"]), test)
    return _Opened(split(options.get("train", "train")).draw(1)[0], test, drawn=("val",))


def _open(source: str) -> _Opened:
    scheme, separator, _ = source.partition("://")
    if separator and scheme in _SCHEMES:
        return _SCHEMES[scheme](source)
    if separator:
        raise UserError(f"{source}: unknown scheme '{scheme}'{did_you_mean(scheme, _SCHEMES)}")
    path = Path(source)
    if path.is_dir():
        return _open_folder(path)
    if path.suffix in _ARRAYS:
        return _open_arrays(path)
    if not path.exists():
        raise UserError(f"{source}: no such file or folder")
    raise UserError(f"{source}: must be a folder or end in {' or '.join(_ARRAYS)}")


def _write(examples: _Examples, name: str, folder: Path, image_size: int, source: str) -> None:
    if not examples.size:
        raise UserError(f"{source}: the {name} split is empty")
    labels = np.empty(examples.size, np.int64)
    shape = (examples.size, image_size, image_size, 3)
    # Not through a memory map: there a full disk is a bus error.
    with open(folder / f"{name}_x.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for i in range(examples.size):
            with _blame(f"{source}: {name} image {i}", ValueError, TypeError, OSError, SyntaxError):
                image, label = examples.get(i)
                pixels, labels[i] = _pixels(image, image_size), operator.index(label)
            file.write(pixels.tobytes())
    classes = len(examples.classnames or ()) or np.iinfo(np.int32).max
    if labels.min() < 0 or labels.max() >= classes:
        extent = f"{labels.min()} to {labels.max()}"
        raise UserError(f"{source}: {name} labels go from {extent}; they must lie in 0 to {classes - 1}")
    np.save(folder / f"{name}_y.npy", labels)


def _meta(opened: _Opened, source: str) -> dict[str, Any]:
    return {
        "source": source if "://" in source else Path(source).name,  # where it lies is no part of what it is
        "classnames": opened.test.classnames,
        "sizes": {"val": opened.val.size, "test": opened.test.size},
        "drawn": list(opened.drawn),
    }


def _pixels(image: Any, size: int) -> np.ndarray:
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


@contextmanager
def _blame(what: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn what a library says about bad input into a UserError of one line."""
    from PIL import Image

    try:
        yield
    except (*errors, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what}: {reason[:300]}") from None


# Arrays


def _open_arrays(path: Path) -> _Opened:
    import lzma
    import zipfile
    import zlib

    from safetensors import SafetensorError

    damage = (zipfile.BadZipFile, lzma.LZMAError, zlib.error, SafetensorError, EOFError, ValueError)
    with _blame(str(path), *damage, OSError, MemoryError):
        arrays = _ARRAYS[path.suffix](path)
    return _official(lambda name: _array_examples(path, name, arrays), {"val": "val"})


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    file = np.load(path, allow_pickle=False)
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError("not an npz file")
    with file:
        return {key: file[key] for key in file.files if key in _ARRAY_KEYS}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys() if key in _ARRAY_KEYS}


_ARRAYS = {".npz": _read_npz, ".safetensors": _read_safetensors}
_ARRAY_KEYS = [f"{name}_{axis}" for name in SPLITS for axis in "xy"]


def _array_examples(path: Path, name: str, arrays: dict[str, np.ndarray]) -> _Examples:
    for key in (f"{name}_x", f"{name}_y"):
        if key not in arrays:
            raise UserError(f"{path}: '{key}' is missing; it must hold {', '.join(_ARRAY_KEYS)}")
    x, y = arrays[f"{name}_x"], arrays[f"{name}_y"]
    images = x.ndim == 3 or x.ndim == 4 and x.shape[3] in (1, 3)
    if x.dtype != np.uint8 or not images or 0 in x.shape[1:]:
        raise UserError(f"{path}: {name}_x is {x.dtype} {x.shape}, not uint8 (N, H, W) or (N, H, W, 1 or 3)")
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise UserError(f"{path}: {name}_y is {y.dtype} {y.shape}, not integers ({len(x)},)")
    return _Examples(len(x), lambda i: (x[i], y[i]))


# Folders of images


def _open_folder(root: Path) -> _Opened:
    if not (root / "test").is_dir():
        raise UserError(
            f"{root}: no folder test/; put images at test/CLASS/*, and val/CLASS/* or train/CLASS/*"
        )
    classes = sorted(entry.name for entry in (root / "test").iterdir() if entry.is_dir())
    given = {"val": "val"} if (root / "val").is_dir() else {}
    return _official(lambda name: _folder_examples(root / name, classes), given)


def _folder_examples(folder: Path, classes: list[str]) -> _Examples:
    from PIL import Image

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and entry.name not in classes:
            raise UserError(f"{entry}: there is no class '{entry.name}' under test/")
        if entry.is_dir():
            label = classes.index(entry.name)
            files += [(path, label) for path in sorted(entry.iterdir()) if not path.name.startswith(".")]

    def get(i: int) -> tuple[Any, int]:
        path, label = files[i]
        with _blame(str(path), OSError, ValueError, SyntaxError), Image.open(path) as image:
            return image.convert("RGB"), label

    return _Examples(len(files), get, _readable(classes))


def _readable(classnames: Sequence[str]) -> list[str]:
    return [str(name).replace("_", " ").replace("/", " ") for name in classnames]


# torchvision


def _open_torchvision(source: str) -> _Opened:
    name, options = _parse(source)
    with _blame(source, ImportError):
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
    _check(source, options, {"root", "download"} | variants | splits)
    if "root" not in options:
        raise UserError(f"{source}: add ?root=FOLDER, the folder that holds the dataset")
    arguments: dict[str, Any] = {key: options[key] for key in {"root"} | variants if key in options}
    if options.get("download") == "true":
        arguments["download"] = True

    def examples(**which: Any) -> _Examples:
        with _blame(source, RuntimeError, ValueError, TypeError, OSError, ImportError):
            dataset = kind(**arguments, **which)
        classes = getattr(dataset, "classes", None)
        everything = _Examples(len(dataset), dataset.__getitem__, _readable(classes) if classes else None)
        return everything.take(_stable_order(dataset))

    if by_flag:
        return _official(lambda split: examples(train=split == "train"), {})
    if by_name:
        return _official(lambda split: examples(split=split), options)
    return _Opened(*examples().draw(2), drawn=SPLITS)


def _stable_order(dataset: Any) -> Sequence[int]:
    """Some of torchvision's datasets list their files in the order of the file system; put them by name."""
    samples = getattr(dataset, "_samples", None) or []
    files = getattr(dataset, "_image_files", None) or [file for file, *_ in samples]
    return sorted(range(len(dataset)), key=lambda i: str(files[i])) if files else range(len(dataset))


# Hugging Face


def _open_hub(source: str) -> _Opened:
    address, options = _parse(source)
    _check(source, options, {"config", "train", "val", "test", "image", "label"})
    path, _, revision = address.partition("@")
    image, label = options.get("image", "image"), options.get("label", "label")
    with _blame(source, ImportError):
        import datasets

    def examples(split: str) -> _Examples:
        with _blame(source, datasets.exceptions.DatasetsError, OSError, ValueError, ImportError):
            table = datasets.load_dataset(path, options.get("config"), split=split, revision=revision or None)
        for column in (image, label):
            if column not in table.column_names:
                raise UserError(f"{source}: no column '{column}'; there are {', '.join(table.column_names)}")
        table = table.select_columns([image, label])
        classes = getattr(table.features[label], "names", None)
        pair = operator.itemgetter(image, label)
        return _Examples(len(table), lambda i: pair(table[i]), _readable(classes) if classes else None)

    return _official(examples, options)


_SCHEMES = {"torchvision": _open_torchvision, "hf-dataset": _open_hub}


def _parse(source: str) -> tuple[str, dict[str, str]]:
    """What stands between :// and ?, and the options after it."""
    parts = urlsplit(source)
    with _blame(source, ValueError):
        options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    return parts.netloc + parts.path, options


def _check(source: str, options: Mapping[str, str], known: set[str]) -> None:
    for key in options:
        if key not in known:
            raise UserError(f"{source}: unknown option '{key}'{did_you_mean(key, known)}")
