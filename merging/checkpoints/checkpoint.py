"""Checkpoints: safetensors files, or folders of them, read by header first and tensor by tensor after.

Everything a file says about itself is checked before it is believed: sizes, offsets, dtypes, and the names in a
shard index. The format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, Self

from mergeline.merging.checkpoints.remote import data_of, true_size
from mergeline.merging.errors import UserError
from mergeline.merging.reading import open_regular, parsed_json, read_json

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What describes the weights and lies beside them.
CONFIG_FILES = (
    "config.json", "generation_config.json", "adapter_config.json", "preprocessor_config.json",
    "open_clip_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "source.spm", "target.spm", "chat_template.json", "chat_template.jinja",
    "processor_config.json", "video_preprocessor_config.json",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
)  # fmt: skip
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

# safetensors name -> (torch name, bytes an element)
DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
    "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1), "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")

MAX_HEADER = 100_000_000  # the limit of the safetensors library
_CHUNK = 1 << 24
_MOST_OF_NOTHING = (
    1 << 24
)  # of a dimension where there are no elements, so that the size of the file is no limit


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes [start, stop) of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    def bytes_in(self, counts: Callable[[Path], bool]) -> int:
        """About what is read for it from the files that count."""
        return self.nbytes if counts(self.file) else 0

    def read(self, elements: Callable[[TensorInfo, int, int], Tensor], start: int, stop: int) -> Tensor:
        """Elements [start, stop), flattened; `elements` reads what is stored."""
        return elements(self, start, stop)


class StoredBytes:
    """The bytes of a file of weights, here or where a folder of headers says; closed by a context manager."""

    def __init__(self, file: Path):
        """Raises UserError: the file cannot be read, or its header alone is here."""
        self.file = file
        self._handle = -1
        self._remote = data_of(file)
        if self._remote is None:
            try:
                self._handle = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise UserError(f"{file}: cannot be read ({error.strerror})") from None
            os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_SEQUENTIAL)  # the kernel reads further ahead

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def read_into(self, view: memoryview, info: TensorInfo, start: int) -> None:
        """Read a tensor's bytes from `start` on into all of a view (raises UserError if the file ends before)."""
        if self._remote is not None:
            self._remote.read_into(view, self.file.name, info.start + start, (info.start, info.stop))
            return
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self._handle, [view[done:]], info.start + start + done)
            except OSError as error:
                raise UserError(f"{self.file}: cannot be read ({error.strerror})") from None
            if not got:
                raise UserError(
                    f"{self.file}: ends inside tensor '{info.name}'; copy or download the file again"
                )
            done += got


@dataclass(frozen=True)
class Checkpoint:
    """The headers of a checkpoint; `tensors` is sorted by name.

    A checkpoint with an `original` is a view of it: fewer tensors, other names, rows in another order, or what an
    adapter makes of its base.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    original: Checkpoint | None = field(default=None, kw_only=True)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def stored(self) -> Checkpoint:
        """What lies in the files: itself, or what it is a view of."""
        return self.original.stored if self.original else self

    def view(self, tensors: Mapping[str, TensorInfo]) -> Checkpoint:
        """The same checkpoint with these tensors in place of its own."""
        return Checkpoint(self.path, dict(sorted(tensors.items())), self.metadata, original=self)

    def read(self, name: str) -> Tensor:
        """The tensor `name`, in its stored dtype, as a fresh copy.

        Raises:
            UserError: the file became shorter than its header said.
        """
        import torch

        info = self.tensors[name]
        buffer = torch.empty(info.nbytes, dtype=torch.uint8)
        with StoredBytes(info.file) as stored:
            stored.read_into(buffer.numpy().data, info, 0)
        return buffer.view(getattr(torch, DTYPES[info.dtype][0])).reshape(info.shape)

    def chunks(self, name: str) -> Iterator[bytearray]:
        """The bytes of a tensor, a few megabytes at a time."""
        info = self.tensors[name]
        with StoredBytes(info.file) as stored:
            for start in range(0, info.nbytes, _CHUNK):
                chunk = bytearray(min(info.nbytes - start, _CHUNK))
                stored.read_into(memoryview(chunk), info, start)
                yield chunk

    @cached_property
    def tensor_hashes(self) -> dict[str, str]:
        """The hash of the bytes of every tensor. Reads the whole checkpoint, once."""
        return {name: self.tensor_hash(name) for name in self.tensors}

    def tensor_hash(self, name: str) -> str:
        """The hash of the bytes of a tensor, which are read."""
        hash = hasher()
        for chunk in self.chunks(name):
            hash.update(chunk)
        return hash.hexdigest()

    def digest(self) -> str:
        """The digest of the content; the same for one file or many shards."""
        return content_digest(
            (t.name, t.dtype, t.shape, self.tensor_hashes[t.name]) for t in self.tensors.values()
        )


def hasher() -> Any:
    """A new hash of a tensor's bytes: BLAKE3, which costs a third of SHA-256 where all inputs of a merge are hashed."""
    from blake3 import blake3

    return blake3()


def content_digest(tensors: Iterator[tuple[str, str, tuple[int, ...], str]]) -> str:
    """`sha256:...` over (name, dtype, shape, BLAKE3 of the bytes) of every tensor, in the order of the names."""
    rows = sorted([name, dtype, list(shape), hash] for name, dtype, shape, hash in tensors)
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read and check the headers of a safetensors file or folder; no tensor data is read.

    Raises:
        UserError: nothing there, a pickle, a malformed or truncated file, overlapping tensors, an index that
            names files outside the folder or tensors that are not in them.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _open_folder(path)
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        refuse_pickle(path)
        _refuse_gguf(path)
        tensors, metadata = _read_header(path)
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read ({error.strerror})") from None
    return Checkpoint(path, dict(sorted(tensors.items())), metadata)


def is_pickle(path: Path) -> bool:
    """Whether a file is named, or begins, like a pickle; or a folder holds no other weights."""
    if path.is_dir():
        return not any(path.glob("*.safetensors")) and any(
            f.suffix in PICKLE_SUFFIXES for f in path.iterdir()
        )
    with open_regular(path) as file:
        start = file.read(9)
    # The first eight bytes of safetensors, a length, may look like a pickle; the "{" after them does not.
    begins = start.startswith((b"\x80\x02", b"\x80\x04", b"PK\x03\x04")) and start[8:] != b"{"
    return begins or path.suffix in PICKLE_SUFFIXES


def refuse_pickle(path: Path) -> None:
    """Raises UserError if `path` is a pickle."""
    if is_pickle(path):
        raise UserError(
            f"{path}: a pickle checkpoint can run code when it is opened; save it as safetensors, or convert it with "
            "--allow-pickle (in params.yaml: allow_pickle: true)"
        )


def _refuse_gguf(path: Path) -> None:
    with open_regular(path) as file:
        if file.read(4) == b"GGUF":
            raise UserError(
                f"{path}: GGUF weights are quantised, they cannot be merged; take the original ones"
            )


def safe_name(folder: Path, name: Any, source: Path | str) -> Path:
    """`folder/name`, if `name` is a plain file name that stays inside `folder` (raises UserError if not).

    A link may lead from a snapshot of the Hugging Face cache to the blobs beside it, as all of its files do.
    """
    plain = (
        isinstance(name, str)
        and PurePosixPath(name).name == name
        and "\\" not in name
        and name not in ("", "..")
    )
    if not plain:
        raise UserError(
            f"{source}: names the file {name!r}; only plain file names inside the folder are allowed"
        )
    target = folder / name
    if target.is_symlink() and not _stays_inside(target, folder):
        raise UserError(f"{target}: is a link out of its folder; put the file itself there")
    return target


def _stays_inside(link: Path, folder: Path) -> bool:
    # Not Path.resolve, which raises RuntimeError for a link that leads to itself.
    real, home = (Path(os.path.realpath(path)) for path in (link, folder))
    caches = (
        cache
        for cache in home.parents
        if cache.name.startswith("models--") and home.is_relative_to(cache / "snapshots")
    )
    return real.is_relative_to(home) or any(real.parent == cache / "blobs" for cache in caches)


def _open_folder(folder: Path) -> Checkpoint:
    index = folder / INDEX
    if index.exists():
        return _open_sharded(folder, index)
    files = sorted(folder.glob("*.safetensors"))
    if (folder / WEIGHTS) in files:
        files = [folder / WEIGHTS]
    for other in () if files else sorted([*folder.glob("*.gguf"), *folder.glob("pytorch_model*.bin")]):
        refuse_pickle(other)
        _refuse_gguf(other)
    if len(files) != 1:
        found = ", ".join(f.name for f in files) or "none"
        raise UserError(f"{folder}: needs {WEIGHTS}, {INDEX} or one *.safetensors file; found {found}")
    tensors, metadata = _read_header(safe_name(folder, files[0].name, folder))
    return Checkpoint(folder, dict(sorted(tensors.items())), metadata)


def _open_sharded(folder: Path, index: Path) -> Checkpoint:
    try:
        weight_map = read_json(index)["weight_map"]
        entries = sorted(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: is not a shard index ({type(error).__name__}: {error})") from None
    headers: dict[str, tuple[dict[str, TensorInfo], dict[str, str]]] = {}
    lies_in: dict[str, str] = {}
    for _, name in entries:
        if str(name) in headers:
            continue
        file = safe_name(folder, name, index)
        if not file.exists():
            raise UserError(f"{index}: names the shard '{name}', which is missing; download it again")
        headers[name] = _read_header(file)
        for tensor in headers[name][0]:
            if lies_in.setdefault(tensor, name) != name:
                raise UserError(
                    f"{index}: the tensor '{tensor}' lies in '{lies_in[tensor]}' and in '{name}'; keep one of them"
                )
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for tensor, shard in entries:
        found, metadata_of_shard = headers[shard]
        if tensor not in found:
            raise UserError(f"{index}: says that '{tensor}' is in '{shard}', where it is not")
        tensors[tensor] = found[tensor]
        metadata |= metadata_of_shard
    return Checkpoint(folder, tensors, metadata)


def header_digest(path: Path) -> str:
    """`sha256:...` of the header of a safetensors file as it is written, with its length before it."""
    with open_regular(path) as file:
        start = file.read(8)
        return f"sha256:{hashlib.sha256(start + file.read(int.from_bytes(start, 'little'))).hexdigest()}"


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    with open_regular(path) as file:
        size = true_size(path, os.fstat(file.fileno()).st_size)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise UserError(
                f"{path}: the header does not fit into the file ({size} bytes); it is truncated or no safetensors"
            )
        raw = file.read(length)
    try:
        header = parsed_json(raw.decode())
        json.dumps(header, ensure_ascii=False).encode()  # a lone surrogate could be read, but never written
        if not isinstance(header, dict):
            raise ValueError("not a JSON object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: malformed safetensors header ({error})") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"{path}: malformed safetensors header (__metadata__ must map names to strings)")
    tensors = {name: _tensor_info(path, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for info in sorted(tensors.values(), key=lambda t: (t.start, t.stop)):
        if info.start != end:
            raise UserError(f"{path}: tensor '{info.name}' overlaps its neighbour or leaves a hole before it")
        end = info.stop
    if end != size:
        state = "truncated: download it again" if end > size else "longer than its header says"
        raise UserError(f"{path}: {state} ({size} bytes, the header describes {end})")
    return tensors, metadata


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    def bad(reason: str) -> UserError:
        return UserError(f"{path}: tensor '{name}': {reason}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad("malformed entry in the safetensors header")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f"unknown dtype {dtype!r}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise bad("malformed shape or offsets in the safetensors header")
    if 0 in shape and max(shape) > _MOST_OF_NOTHING:
        raise bad(f"its shape {shape} has no elements, and a dimension that no model has")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype][1]:
        raise bad(f"its offsets {offsets} do not hold {dtype} of shape {shape}")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + offsets[0], data_start + offsets[1])
