"""Training shards: folders of torch.distributed.checkpoint, as FSDP and DTensor write them, read by their metadata.

`.metadata` is a pickle, which is read as data (`pickled.py`); each chunk of a tensor is a file of `torch.save` inside a
`.distcp` file, whose storage is found without opening it as such. No process group is needed, and no more is read than
the stretch of a tensor that is asked for.
https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
"""

from __future__ import annotations

import io
import re
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import prod
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, NamedTuple, Sequence

from mergeline.merging.checkpoints.pickled import Entries, Made, Name, Stored, Unreadable, read_pickle
from mergeline.merging.checkpoints.shards import Chunk, tile
from mergeline.merging.errors import UserError
from mergeline.merging.reading import open_regular, parsed_json, safe_name

METADATA = ".metadata"
_OF_METADATA, _OF_FILES = "torch.distributed.checkpoint.metadata.", "torch.distributed.checkpoint.filesystem."
_BEFORE_2_3 = "torch.distributed._shard.sharded_tensor.metadata."
_MOST_METADATA = 1 << 26  # bytes; the chunks of some hundred thousand parts of tensors
_MOST_IN_BLOB = 1 << 16  # bytes of what stands before the storage of a chunk
_MOST_OF_NOTHING = 1 << 24  # of a dimension where there are no elements
_MOST_AXES = 64  # of a tensor; torch has no more
_MODEL = ("model", "module", "state_dict", "model_state_dict")  # what holds the model among what was saved
_OPTIMISER = re.compile(r"optim(izer)?s?(_states?(_dict)?|_[0-9]+)?")
_MOMENTS = "exp_avg_sq"
_FEW = 4
_SHARDING = "DCP_SHARDING_INFO"  # in the header of safetensors
PIECES = "shard-[0-9]*-model-[0-9]*-of-[0-9]*.safetensors"  # files of torch's HuggingFaceStorageWriter
_MEGATRON = (
    "a checkpoint of Megatron Core, whose names and layouts are its own: make safetensors of it by "
    "`AutoBridge.export_ckpt` of Megatron Bridge"
)
_DEEPSPEED = (
    "shards of DeepSpeed: make safetensors of them by the script beside them, `zero_to_fp32.py . OUT "
    "--safe_serialization`"
)


@dataclass(frozen=True)
class _Saved:
    """A tensor as `.metadata` has it; boxes: offsets and sizes of its chunks, where each lies."""

    name: str
    path: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


class Shards(NamedTuple):
    """A tensor of training shards: dtype by torch's name, and where its chunks lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: list[Chunk]


class _Place(NamedTuple):
    """Where a chunk lies: a file of `torch.save` in another file."""

    file: str
    start: int
    length: int


@dataclass
class Folder:
    """A folder of training shards, by its metadata; bytes of an element by torch's name of the dtype.

    Raises:
        UserError: damaged, with names of code that is no metadata, compressed, of Megatron Core.
    """

    path: Path
    element_bytes: Mapping[str, int]
    _saved: dict[str, _Saved] = field(init=False, default_factory=dict)
    _places: dict[tuple[str, tuple[int, ...]], _Place] = field(init=False, default_factory=dict)
    _others: list[tuple[str, ...]] = field(init=False, default_factory=list)  # paths of what is no tensor

    def __post_init__(self) -> None:
        file = safe_name(self.path, METADATA, self.path)
        with open_regular(file) as opened:
            raw = opened.read(_MOST_METADATA + 1)
        if len(raw) > _MOST_METADATA:
            raise UserError(f"{file}: is longer than {_MOST_METADATA} bytes, which no metadata of a model is")
        try:
            self._read(_fields(read_pickle(raw), _OF_METADATA + "Metadata"))
        except (Unreadable, UnicodeDecodeError) as error:
            raise UserError(
                f"{file}: is no metadata of torch.distributed.checkpoint ({error}); copy the folder again"
            ) from None

    def _read(self, metadata: Mapping[str, Any]) -> None:
        paths = dict(_paths(metadata.get("planner_data")))
        for name, entry in _entries(metadata.get("state_dict_metadata")):
            name = _text(name)
            path = paths.get(name) or (name,)
            if _is(entry, _OF_METADATA + "BytesStorageMetadata"):
                self._others.append(path)
                continue
            fields = _fields(entry, _OF_METADATA + "TensorStorageMetadata")
            chunks = fields.get("chunks")
            if not isinstance(chunks, list):
                raise Unreadable(f"'{name}' has no chunks")
            boxes = [_fields(chunk, _OF_METADATA + "ChunkStorageMetadata") for chunk in chunks]
            self._saved[name] = _Saved(
                name,
                path,
                _dtype(fields.get("properties")),
                _size(fields.get("size")),
                tuple((_size(box.get("offsets")), _size(box.get("sizes"))) for box in boxes),
            )
        for index, info in _entries(metadata.get("storage_data")):
            at = _fields(index, _OF_METADATA + "MetadataIndex")
            where = _fields(info, _OF_FILES + "_StorageInfo")
            name, file = _text(at.get("fqn")), _text(where.get("relative_path"))
            if where.get("transform_descriptors"):
                raise UserError(
                    f"{self.path}: is compressed or encrypted by an extension of its writer; save it without"
                )
            place = _Place(file, _count(where.get("offset")), _count(where.get("length")))
            offset = () if at.get("offset") is None else _size(at.get("offset"))
            self._places[name, offset] = place

    @cached_property
    def _model(self) -> tuple[dict[str, _Saved], tuple[str, ...]]:
        """The tensors of the model by their own names, and what stands before these in the file.

        Raises:
            UserError: there is none, or several.
        """
        groups: dict[tuple[str, ...], dict[str, _Saved]] = {}
        for saved in self._saved.values():
            if not _is_of_optimiser(saved.path):
                holder = _holder(saved.path)
                groups.setdefault(holder, {})[".".join(saved.path[len(holder) :])] = saved
        models = [holder for holder in groups if holder and holder[-1] in _MODEL]
        # What lies beside a model, counters and generators of random numbers, have holders of their own, or none.
        models = models or [holder for holder in groups if not holder] or list(groups)
        if len(models) != 1:
            found = ", ".join(sorted(".".join(holder) for holder in models)) or "none"
            raise UserError(
                f"{self.path}: needs one model among what was saved ('model' or such), found {found}; save it alone"
            )
        return groups[models[0]], models[0]

    def model(self) -> tuple[list[Shards], list[str]]:
        """The model's tensors, and sentences on what else the folder holds."""
        found, holder = self._model
        model = {saved.name for saved in found.values()}
        rest = Counter(saved.path[0] for name, saved in self._saved.items() if name not in model) + Counter(
            path[0] for path in self._others
        )
        notes = []
        if holder:
            notes.append(f"training shards: the model is what lies under '{'.'.join(holder)}.'")
        if rest:
            names = [f"{name} ({count})" if count > 1 else name for name, count in sorted(rest.items())]
            more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
            notes.append(
                f"training shards: left out, for they are no weights: {', '.join(names[:_FEW])}{more}"
            )
        return list(self._located(found.items())), notes

    def second_moments(self) -> tuple[list[Shards], list[str]]:
        """Adam's `exp_avg_sq` by the names of the parameters, and sentences on how they were found.

        Raises:
            UserError: there are none, or they have numbers in place of names.
        """
        found: dict[str, _Saved] = {}
        for saved in self._saved.values():
            *before, last = ".".join(saved.path).split(".")
            if last == _MOMENTS and _is_of_optimiser(saved.path):
                state = before.index("state") + 1 if "state" in before else 1
                found[".".join(before[state:])] = saved
        if not found:
            raise UserError(
                f"{self.path}: holds no second moments ('exp_avg_sq' of Adam); name shards with the optimizer's state"
            )
        if all(name.isdecimal() for name in found):
            raise UserError(
                f"{self.path}: its optimizer has numbers in place of names of parameters; save it with "
                "torch.distributed.checkpoint.state_dict.get_optimizer_state_dict"
            )
        note = (
            "second moments as the optimizer holds them: without the correction of their bias, which matters where "
            "runs had different numbers of steps, and few"
        )
        return list(self._located(found.items())), [note]

    def _located(self, tensors: Iterable[tuple[str, _Saved]]) -> Iterator[Shards]:
        """Where the chunks of tensors lie (raises UserError: not there, or not as the metadata says)."""
        known: set[tuple[Path, int]] = set()
        with _Blobs(self.path) as blobs:
            for name, saved in sorted(tensors):
                try:
                    if 0 in saved.shape and max(saved.shape) > _MOST_OF_NOTHING:
                        raise Unreadable("has no elements, and a dimension that no model has")
                    chunks = [self._chunk(saved, *box, blobs) for box in saved.boxes if 0 not in box[1]]
                    if prod(saved.shape) and not tile(saved.shape, chunks):
                        raise Unreadable("its chunks leave a hole, or overlap")
                    places = {(chunk.file, chunk.start) for chunk in chunks}
                    if len(places) < len(chunks) or places & known:
                        raise Unreadable("its chunk lies where another does")
                    known |= places
                except (Unreadable, UnicodeDecodeError, UserError) as error:
                    raise UserError(f"{self.path}: tensor '{saved.name}': {error}") from None
                yield Shards(name, saved.dtype, saved.shape, chunks)

    def _chunk(self, saved: _Saved, offsets: tuple[int, ...], sizes: tuple[int, ...], blobs: _Blobs) -> Chunk:
        place = self._places.get((saved.name, offsets))
        if place is None:
            raise Unreadable(f"nothing says where the chunk at {list(offsets)} lies")
        width = self.element_bytes.get(saved.dtype)
        if width is None:
            raise Unreadable(f"the dtype {saved.dtype!r} is not read")
        tensor = blobs.tensor(place)
        if tensor.dtype != saved.dtype or tensor.sizes != sizes:
            raise Unreadable(
                f"its chunk is {tensor.dtype!r} of shape {list(tensor.sizes)}, where the metadata say {saved.dtype!r} "
                f"of shape {list(sizes)}"
            )
        last = tensor.first + sum((size - 1) * stride for size, stride in zip(sizes, tensor.strides))
        # A stride of 0 would make a tensor of any size of one number.
        if max(last + 1, prod(sizes)) * width > tensor.stop - tensor.start:
            raise Unreadable("its chunk is longer than its storage")
        file = blobs.file(place)
        return Chunk(file, tensor.start, tensor.stop, offsets, sizes, tensor.strides, tensor.first)


def is_training_shards(folder: Path) -> bool:
    """Whether a folder, or what Accelerate calls the model in it, has the metadata of torch.distributed.checkpoint."""
    return folder_of_model(folder) is not None


def is_part_of_shards(file: Path) -> bool:
    """Whether a file is one of those that torch.distributed.checkpoint writes, by its name."""
    return file.name == METADATA or file.suffix == ".distcp"


def folder_of_model(folder: Path) -> Path | None:
    """Where the metadata of a model lie: in the folder, or in `pytorch_model_fsdp_0`, which Accelerate writes."""
    return _with_metadata(folder, "pytorch_model_fsdp_[0-9]")


def folder_of_optimiser(folder: Path) -> Path | None:
    """The same of the state of an optimizer (`optimizer_0`)."""
    return _with_metadata(folder, "optimizer_[0-9]")


def _with_metadata(folder: Path, name: str) -> Path | None:
    if (folder / METADATA).is_file():
        return folder
    if any(folder.glob("*.safetensors")):
        return None
    found = [safe_name(folder, path.parent.name, folder) for path in folder.glob(f"{name}/{METADATA}")]
    return found[0] if len(found) == 1 else None


_VERL = "shards of verl: make safetensors of them by `python -m verl.model_merger merge`"
# Files that frameworks write, all of which are there -> whose they are, and what makes safetensors of them.
_ELSEWHERE = {
    ("common.pt", METADATA): _MEGATRON,
    ("iter_[0-9]*/common.pt",): _MEGATRON,
    ("mp_rank_[0-9]*/model_optim_rng.pt",): _MEGATRON,
    ("iter_[0-9]*/mp_rank_[0-9]*/model_optim_rng.pt",): _MEGATRON,
    ("mp_rank_[0-9]*_model_states.pt",): _DEEPSPEED,
    ("global_step[0-9]*/*_model_states.pt",): _DEEPSPEED,
    ("model_world_size_[0-9]*_rank_[0-9]*.pt",): _VERL,
}


def refuse_other_frameworks(folder: Path) -> None:
    """Raises UserError for checkpoints of training that are not read, with the name of what converts them."""
    for patterns, whose in _ELSEWHERE.items():
        if all(next(folder.glob(pattern), None) for pattern in patterns):
            raise UserError(f"{folder}: holds {whose}")


def offsets_of_pieces(metadata: Mapping[str, str], file: Path) -> dict[str, tuple[int, ...]]:
    """Where each tensor of a file of torch's HuggingFaceStorageWriter lies in the whole one, by its name.

    Raises:
        UserError: the header does not say it.
    """
    try:
        info = parsed_json(metadata[_SHARDING])
        found = {name: _size(entry["saved_offsets"]) for name, entry in info.items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{file}: is named like a shard of a training, and its header does not say where in the tensors it lies "
            f"({_SHARDING}: {type(error).__name__})"
        ) from None
    return found


def is_of_optimiser(name: str) -> bool:
    """Whether a tensor belongs to the state of an optimizer, by its name in a flat checkpoint."""
    return _is_of_optimiser((name,))


def _holder(path: tuple[str, ...]) -> tuple[str, ...]:
    """What a tensor of a model lies in, among what was saved together."""
    for i, name in enumerate(path[:-1]):
        if name in _MODEL:
            return path[: i + 1]
    return path[:1] if len(path) > 1 else ()


def _is_of_optimiser(path: tuple[str, ...]) -> bool:
    parts = ".".join(path[:2]).split(".")[:2]
    return any(_OPTIMISER.fullmatch(part) for part in parts)


class _InBlob(NamedTuple):
    """A tensor in a file of `torch.save`: its storage is bytes [start, stop) of the file that this one lies in."""

    dtype: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    first: int
    start: int
    stop: int


class _Blobs:
    """The files of `torch.save` in the `.distcp` files of a folder; a context manager that closes them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, tuple[Path, io.BufferedReader, int]] = {}

    def __enter__(self) -> _Blobs:
        return self

    def __exit__(self, *_: Any) -> None:
        for _path, file, _size in self._files.values():
            file.close()

    def file(self, place: _Place) -> Path:
        return self._opened(place)[0]

    def _opened(self, place: _Place) -> tuple[Path, io.BufferedReader, int]:
        if place.file not in self._files:
            path = safe_name(self.folder, place.file, self.folder / METADATA)
            if not path.exists():
                raise UserError(f"the file '{place.file}' is missing; copy it there")
            file = open_regular(path)
            self._files[place.file] = path, file, file.seek(0, io.SEEK_END)
        return self._files[place.file]

    def tensor(self, place: _Place) -> _InBlob:
        """The tensor that a file of `torch.save` holds (raises Unreadable: another file, or a damaged one)."""
        _, file, size = self._opened(place)
        if place.start + place.length > size:
            raise Unreadable(f"its chunk ends behind the end of '{place.file}', which was cut off")
        window = _Window(file, place)
        try:
            with zipfile.ZipFile(window) as archive:
                entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise Unreadable("its chunk is compressed")
                order = entries.get("byteorder")
                if order and window.bytes_of(order) != b"little":
                    raise Unreadable("its chunk is big-endian")
                if "data.pkl" not in entries:
                    raise Unreadable("its chunk is no file of torch.save")
                dtype, sizes, strides, first, key = _tensor(window.bytes_of(entries["data.pkl"]))
                storage = entries.get(f"data/{key}")
                if storage is None:
                    raise Unreadable("its chunk has no storage")
                start = window.start_of(storage)
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
            if isinstance(error, Unreadable):
                raise
            raise Unreadable("its chunk is no file of torch.save, or one of before torch 1.6") from None
        at = place.start + start
        return _InBlob(dtype, sizes, strides, first, at, at + storage.file_size)


class _Window(io.RawIOBase):
    """The bytes of one place, as a file."""

    def __init__(self, file: io.BufferedReader, place: _Place):
        self._file, self._start, self._length, self._at = file, place.start, place.length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + (0, self._at, self._length)[whence]
        if at < 0:
            raise OSError("before the beginning")
        self._at = at
        return at

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._at, 0)
        self._file.seek(self._start + self._at)
        found = self._file.read(left if size < 0 else min(size, left))
        self._at += len(found)
        return found

    def start_of(self, entry: zipfile.ZipInfo) -> int:
        """Where the bytes of an uncompressed entry begin."""
        self.seek(entry.header_offset)
        head = self.read(30)
        if len(head) < 30 or head[:4] != b"PK\x03\x04":
            raise Unreadable("its chunk is damaged")
        start = (
            entry.header_offset
            + 30
            + int.from_bytes(head[26:28], "little")
            + int.from_bytes(head[28:30], "little")
        )
        if start + entry.file_size > self._length:
            raise Unreadable("its chunk is cut off")
        return start

    def bytes_of(self, entry: zipfile.ZipInfo) -> bytes:
        if entry.file_size > _MOST_IN_BLOB:
            raise Unreadable("its chunk holds more than a tensor")
        self.seek(self.start_of(entry))
        return self.read(entry.file_size)


@lru_cache(maxsize=4096)  # chunks of one shape have the same pickle
def _tensor(pickled: bytes) -> tuple[str, tuple[int, ...], tuple[int, ...], int, str]:
    """dtype, shape, strides, first element and key of the storage of a tensor that was pickled by `torch.save`."""
    value = read_pickle(pickled)
    if _is(value, "torch._utils._rebuild_parameter") and isinstance(value.args, tuple) and value.args:
        value = value.args[0]
    versions = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
    known = next((version for version in versions if _is(value, version)), None)
    if known is None or not isinstance(value.args, tuple) or len(value.args) < 6:
        raise Unreadable("its chunk is no plain tensor")
    storage, first, sizes, strides = value.args[:4]
    identity = storage.identity if isinstance(storage, Stored) else None
    if not isinstance(identity, tuple) or len(identity) != 5 or not isinstance(identity[1], Name):
        raise Unreadable("its chunk is no plain tensor")
    kind = identity[1].text.rpartition(".")[2]
    if known == versions[0] and kind in _STORAGES:
        dtype = _STORAGES[kind]
    elif known == versions[1] and len(value.args) > 6 and isinstance(value.args[6], Name):
        dtype = value.args[6].text.rpartition(".")[2]
    else:
        raise Unreadable("the dtype of its chunk is not read")
    key, sizes, strides = _text(identity[2]), _size(sizes), _size(strides)
    if len(strides) != len(sizes):
        raise Unreadable("its chunk is no plain tensor")
    return dtype, sizes, strides, _count(first), key


_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip


def _is(value: Any, name: str) -> bool:
    return isinstance(value, Made) and isinstance(value.name, Name) and value.name.text == name


def _fields(value: Any, name: str) -> dict[str, Any]:
    """What is set on an object of the class `name` (raises Unreadable if it is another one)."""
    if not _is(value, name):
        said = (
            value.name.text if isinstance(value, Made) and isinstance(value.name, Name) else "something else"
        )
        raise Unreadable(f"it has {said[:100]!r} where {name.rpartition('.')[2]} belongs")
    return {_text(key): entry for key, entry in _entries(value.state)}


def _entries(value: Any) -> Entries:
    if not isinstance(value, Entries):
        raise Unreadable("a dictionary is missing")
    return value


def _paths(value: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What each name was made of, where the planner noted it."""
    for name, path in value if isinstance(value, Entries) else ():
        if isinstance(path, tuple) and path and all(isinstance(part, str | int) for part in path):
            yield _text(name), tuple(_text(str(part)) for part in path)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Unreadable("a name is no text")
    value.encode()  # a lone surrogate could be read, but never written
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise Unreadable("a number is missing, or none that a file can have")
    return value


def _size(value: Any) -> tuple[int, ...]:
    if _is(value, "torch.Size"):
        value = value.args[0] if isinstance(value.args, tuple) and len(value.args) == 1 else None
    if not isinstance(value, list | tuple) or len(value) > _MOST_AXES:
        raise Unreadable("a shape is missing")
    return tuple(_count(part) for part in value)


def _dtype(properties: Any) -> str:
    if not any(_is(properties, place + "TensorProperties") for place in (_OF_METADATA, _BEFORE_2_3)):
        raise Unreadable("the properties of a tensor are missing")
    state: Sequence[Any] = properties.state if isinstance(properties.state, tuple) else ()
    if not state or not isinstance(state[0], Name) or not state[0].text.startswith("torch."):
        raise Unreadable("the dtype of a tensor is missing")
    return state[0].text.removeprefix("torch.")
