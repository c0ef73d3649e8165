"""Checkpoints: safetensors files, or folders of them, read by header first and tensor by tensor after.

Everything a file says about itself is checked before it is believed: sizes, offsets, dtypes, and the names in a
shard index. The format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, ClassVar, Iterable, Iterator, Mapping, Self

from mergeline.merging.checkpoints import dcp, gguf_header
from mergeline.merging.checkpoints.companions import INDEX, PICKLE_SUFFIXES, STEMS, WEIGHTS
from mergeline.merging.checkpoints.components import component_folders, is_pipeline
from mergeline.merging.checkpoints.remote import data_of, true_size
from mergeline.merging.checkpoints.shards import Chunk, contiguous, gather, tile
from mergeline.merging.errors import UserError
from mergeline.merging.reading import open_regular, parsed_json, read_json, safe_name

if TYPE_CHECKING:
    from torch import Tensor

GGUF_DTYPE = "GGUF_"  # before the type of blocks of a GGUF file, which are read as bytes

# safetensors name, or that of a type of GGUF -> (torch name, bytes an element)
DTYPES = {
    **{f"{GGUF_DTYPE}{name}": ("uint8", 1) for name in gguf_header.PACKED},
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "F8_E8M0": ("uint8", 1),  # exponents, which torch before 2.7 has no dtype for
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
    "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1), "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")

MAX_HEADER = 100_000_000  # the limit of the safetensors library
_CHUNK = 1 << 24
_AHEAD, _STEP = 1 << 22, 1 << 20  # bytes that are read ahead of a file, and asked for together
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
    def computing_bytes(self) -> int:
        """Memory that reading it takes beside what is read."""
        return 0

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    @property
    def read_as(self) -> str:
        """The dtype of what `read` gives."""
        return self.dtype

    @property
    def files(self) -> set[Path]:
        """Where it lies."""
        return {self.file}

    @property
    def is_stored(self) -> bool:
        """Whether `read` gives what lies in files, and nothing that is computed from it."""
        return type(self) is TensorInfo

    def bytes_in(self, counts: Callable[[Path], bool]) -> int:
        """About what is read for it from the files that count."""
        return self.nbytes if counts(self.file) else 0

    def fill(self, opened: Callable[[Path], StoredBytes], view: memoryview, start: int) -> None:
        """Read the stored bytes from `start` on into all of a view (raises UserError if a file ends before)."""
        opened(self.file).read_into(view, self, start)

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
        self._read_ahead(info.start + start, info.start + start + len(view))
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

    def _read_ahead(self, start: int, stop: int) -> None:
        """Let the disk be busy while [start, stop) is computed with: of its own, the kernel reads 256 KiB ahead.

        Asks for the steps that come within _AHEAD of what is read; those before were asked for when that was.
        """
        first = max(stop, start + _AHEAD)
        for step in range(first + -first % _STEP, stop + _AHEAD, _STEP):
            os.posix_fadvise(self._handle, step, _STEP, os.POSIX_FADV_WILLNEED)


_BITS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}  # bytes of an element -> a dtype that has them


@dataclass(frozen=True)
class ShardedTensor(TensorInfo):
    """A tensor that is stored in chunks, which fill it; its place is that of the first."""

    chunks: tuple[Chunk, ...] = field(kw_only=True)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][1]

    @property
    def files(self) -> set[Path]:
        return {self.file, *(chunk.file for chunk in self.chunks)}

    @property
    def is_stored(self) -> bool:
        return True

    def bytes_in(self, counts: Callable[[Path], bool]) -> int:
        return sum(chunk.stop - chunk.start for chunk in self.chunks if counts(chunk.file))

    def fill(self, opened: Callable[[Path], StoredBytes], view: memoryview, start: int) -> None:
        if not len(view):
            return
        import torch

        width = DTYPES[self.dtype][1]
        out = torch.frombuffer(view, dtype=getattr(torch, _BITS[width]))

        def read(chunk: Chunk, first: int, into: Tensor) -> None:
            part = TensorInfo(self.name, self.dtype, chunk.sizes, chunk.file, chunk.start, chunk.stop)
            opened(chunk.file).read_into(into.view(torch.uint8).numpy().data, part, first * width)

        gather(out, self.shape, self.chunks, start // width, read)


class Files:
    """Files that are open for reading, by their tensors' places; a context manager that closes them.

    on_close: who is told then, to let go of what it keeps of what was read.
    """

    device = "cpu"
    on_close: ClassVar[list[Callable[[], None]]] = []

    def __init__(self) -> None:
        self._opened: dict[Path, StoredBytes] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        while self._opened:
            self._opened.popitem()[1].close()
        for tell in self.on_close:
            tell()

    def elements(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a stored tensor, flattened (raises UserError if the file ends before)."""
        import torch

        dtype, size = DTYPES[info.dtype]
        # What goes to an accelerator is read into pinned memory, from which copies need not be waited for.
        buffer = torch.empty((stop - start) * size, dtype=torch.uint8, pin_memory=self.device != "cpu")
        self.fill(buffer, info, start * size)
        return buffer.view(getattr(torch, dtype))

    def fill(self, buffer: Tensor, info: TensorInfo, start: int) -> None:
        """Read a stored tensor's bytes from `start` on into all of a buffer, uint8 (raises UserError as `elements`)."""
        self.fill_view(buffer.numpy().data, info, start)

    def fill_view(self, view: memoryview, info: TensorInfo, start: int) -> None:
        """As `fill`, without torch where the tensor lies in one piece."""
        info.fill(self._stored, view, start)

    def _stored(self, path: Path) -> StoredBytes:
        if path not in self._opened:
            opened = StoredBytes(path)
            if self._opened.setdefault(path, opened) is not opened:  # another thread was faster
                opened.close()
        return self._opened[path]


@dataclass(frozen=True)
class Checkpoint:
    """The headers of a checkpoint; `tensors` is sorted by name. settings: of a GGUF file.

    notes: sentences on what of its files is not among the tensors.

    A checkpoint with an `original` is a view of it: fewer tensors, other names, rows in another order, or what an
    adapter makes of its base.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    original: Checkpoint | None = field(default=None, kw_only=True)
    settings: dict[str, Any] | None = field(default=None, kw_only=True)
    notes: tuple[str, ...] = field(default=(), kw_only=True)

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
            UserError: the file became shorter than its header said, or the tensor is of codes without their scales.
        """
        import torch

        info = self.tensors[name]
        if info.dtype.startswith(("F8", GGUF_DTYPE)):
            raise UserError(
                f"{info.file}: tensor '{name}' is {info.dtype}: quantised weights are read by merging alone; merge the "
                "checkpoint with `passthrough`, and take what that writes"
            )
        buffer = torch.empty(info.nbytes, dtype=torch.uint8)
        with Files() as files:
            files.fill(buffer, info, 0)
        return buffer.view(getattr(torch, DTYPES[info.dtype][0])).reshape(info.shape)

    def chunks(self, name: str) -> Iterator[bytearray]:
        """The bytes of a tensor, a few megabytes at a time."""
        info = self.tensors[name]
        with Files() as files:
            for start in range(0, info.nbytes, _CHUNK):
                chunk = bytearray(min(info.nbytes - start, _CHUNK))
                files.fill_view(memoryview(chunk), info, start)
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


def common_dtype(dtypes: Iterable[str]) -> str:
    """The dtype that numbers of these have in one tensor: their own, or a wider one that holds all."""
    found = set(dtypes)
    return found.pop() if len(found) == 1 else "F64" if "F64" in found else "F32"


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
        if dcp.is_part_of_shards(path):
            raise UserError(f"{path}: is a part of training shards; name its folder")
        refuse_pickle(path)
        if gguf_header.is_gguf(path):
            return _open_gguf([path], path)
        tensors, metadata = _read_header(path)
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read ({error.strerror})") from None
    return Checkpoint(path, dict(sorted(tensors.items())), metadata)


def is_pickle(path: Path) -> bool:
    """Whether a file is named, or begins, like a pickle; or a folder holds no other weights."""
    if dcp.is_training_shards(path) if path.is_dir() else dcp.is_part_of_shards(path):
        return False
    if path.is_dir():
        return not any(path.glob("*.safetensors")) and any(
            f.name.endswith(PICKLE_SUFFIXES) for f in path.iterdir()
        )
    with open_regular(path) as file:
        start = file.read(9)
    # The first eight bytes of safetensors, a length, may look like a pickle; the "{" after them does not.
    begins = start.startswith((b"\x80\x02", b"\x80\x04", b"PK\x03\x04")) and start[8:] != b"{"
    return begins or path.name.endswith(PICKLE_SUFFIXES)


def refuse_pickle(path: Path) -> None:
    """Raises UserError if `path` is a pickle."""
    if is_pickle(path):
        raise UserError(
            f"{path}: a pickle checkpoint can run code when it is opened; save it as safetensors, or convert it with "
            "--allow-pickle (in params.yaml: allow_pickle: true)"
        )


def _open_gguf(files: list[Path], path: Path) -> Checkpoint:
    """A GGUF file, or the parts of one that was split: its blocks as bytes."""
    headers = [gguf_header.read_header(file) for file in files]
    counts = [header.settings.get("split.count", 1) for header in headers]
    if any(count != len(files) for count in counts):
        found = ", ".join(file.name for file in files)
        raise UserError(
            f"{path}: {found} are not the {counts[0]} parts of one GGUF file; name one model, or its folder"
        )
    tensors: dict[str, TensorInfo] = {}
    for file, header in zip(files, headers):
        for t in header.tensors:
            if t.name in tensors:
                raise UserError(f"{path}: the tensor '{t.name}' lies in two parts; keep one of them")
            dtype, shape = t.type, t.shape
            if dtype not in gguf_header.PLAIN:
                dtype, rows = f"{GGUF_DTYPE}{t.type}", math.prod(t.shape[:-1])
                shape = (*t.shape[:-1], (t.stop - t.start) // rows)
            tensors[t.name] = TensorInfo(t.name, dtype, shape, file, t.start, t.stop)
    return Checkpoint(path, dict(sorted(tensors.items())), settings=headers[0].settings)


def _open_folder(folder: Path) -> Checkpoint:
    """A folder with all of its components."""
    parts = component_folders(folder)
    if not parts:
        return _open_files(folder)
    own = [_open_files(folder)] if any(folder.glob("*.safetensors")) and not is_pipeline(folder) else []
    tensors = {name: info for checkpoint in own for name, info in checkpoint.tensors.items()}
    metadata = own[0].metadata if own else {}
    for part in parts:
        found = _open_files(folder / part)
        tensors |= {
            f"{part}/{name}": replace(info, name=f"{part}/{name}") for name, info in found.tensors.items()
        }
        metadata = {**found.metadata, **metadata}
    return Checkpoint(folder, dict(sorted(tensors.items())), metadata)


def open_statistics(kind: str, path: Path) -> Checkpoint:
    """A checkpoint of statistics; `fisher` of training shards are Adam's second moments, by the parameters' names.

    Raises:
        UserError: as `open_checkpoint`; there are no second moments.
    """
    shards = dcp.folder_of_optimiser(path) if kind == "fisher" and path.is_dir() else None
    if shards is None:
        return open_checkpoint(path)
    try:
        return _of_shards(path, *_training_shards(shards).second_moments())
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read ({error.strerror})") from None


def _training_shards(folder: Path) -> dcp.Folder:
    return dcp.Folder(folder, dict(DTYPES.values()))


def _of_shards(folder: Path, shards: list[dcp.Shards], notes: list[str]) -> Checkpoint:
    names = {torch_name: name for name, (torch_name, _) in DTYPES.items()}
    tensors: dict[str, TensorInfo] = {}
    for tensor in shards:
        first = tensor.chunks[0] if tensor.chunks else Chunk(folder / dcp.METADATA, 0, 0, (), (), ())
        at = (first.file, first.start, first.stop)
        tensors[tensor.name] = ShardedTensor(
            tensor.name, names[tensor.dtype], tensor.shape, *at, chunks=tuple(tensor.chunks)
        )
    return Checkpoint(folder, dict(sorted(tensors.items())), notes=tuple(notes))


def _open_files(folder: Path) -> Checkpoint:
    """The weights that lie in a folder itself."""
    shards = dcp.folder_of_model(folder)
    if shards or not any(folder.glob("*.safetensors")):
        dcp.refuse_other_frameworks(folder)
    if shards:
        return _of_shards(folder, *_training_shards(shards).model())
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.exists():
            return _open_sharded(folder, index)
    files = sorted(folder.glob("*.safetensors"))
    if pieces := sorted(folder.glob(dcp.PIECES)):
        return _open_pieces(folder, pieces)
    known = [folder / f"{stem}.safetensors" for stem in STEMS]
    files = [file for file in known if file in files][:1] or files
    for other in () if files else sorted(folder.glob("pytorch_model*.bin")):
        refuse_pickle(other)
    if not files and (parts := sorted(folder.glob("*.gguf"))):
        return _open_gguf([safe_name(folder, part.name, folder) for part in parts], folder)
    if len(files) != 1:
        found = ", ".join(f.name for f in files) or "none"
        raise UserError(f"{folder}: needs {WEIGHTS}, {INDEX} or one *.safetensors file; found {found}")
    tensors, metadata = _read_header(safe_name(folder, files[0].name, folder))
    return Checkpoint(folder, dict(sorted(tensors.items())), metadata)


def _open_pieces(folder: Path, files: list[Path]) -> Checkpoint:
    """Files of safetensors with boxes of tensors, as the processes of a training wrote them."""
    pieces: dict[str, list[tuple[Chunk, str]]] = {}
    for file in files:
        found, metadata = _read_header(safe_name(folder, file.name, folder))
        offsets = dcp.offsets_of_pieces(metadata, file)
        for name, info in found.items():
            if len(offsets.get(name, ())) != len(info.shape):
                raise UserError(f"{file}: does not say where in '{name}' its part lies; copy it again")
            chunk = contiguous(file, info.start, info.stop, offsets.get(name, ()), info.shape)
            pieces.setdefault(name, []).append((chunk, info.dtype))
    tensors: dict[str, TensorInfo] = {}
    for name in (name for name in sorted(pieces) if not dcp.is_of_optimiser(name)):
        chunks, dtypes = [chunk for chunk, _ in pieces[name]], {dtype for _, dtype in pieces[name]}
        ends = ([at + size for at, size in zip(c.offsets, c.sizes)] for c in chunks)
        shape = tuple(max(along) for along in zip(*ends))
        chunks = [chunk for chunk in chunks if 0 not in chunk.sizes]
        if len(dtypes) > 1 or math.prod(shape) and not tile(shape, chunks):
            raise UserError(
                f"{folder}: the parts of '{name}' leave a hole, overlap or differ in dtype; copy all files"
            )
        first = pieces[name][0][0]
        at = (first.file, first.start, first.stop)
        tensors[name] = ShardedTensor(name, dtypes.pop(), shape, *at, chunks=tuple(chunks))
    notes = [
        f"training shards: {len(files)} files are taken for all; nothing in them says how many there were"
    ]
    if rest := len(pieces) - len(tensors):
        notes.append(f"training shards: left out, for they are no weights: {rest} tensors of the optimizer")
    return Checkpoint(folder, tensors, notes=tuple(notes))


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
    if not isinstance(dtype, str) or dtype not in DTYPES or dtype.startswith(GGUF_DTYPE):
        raise bad(f"unknown dtype {dtype!r}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise bad("malformed shape or offsets in the safetensors header")
    if 0 in shape and max(shape) > _MOST_OF_NOTHING:
        raise bad(f"its shape {shape} has no elements, and a dimension that no model has")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype][1]:
        raise bad(f"its offsets {offsets} do not hold {dtype} of shape {shape}")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + offsets[0], data_start + offsets[1])
