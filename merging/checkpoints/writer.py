"""Write a checkpoint tensor by tensor, at final offsets, in files of known size; it appears whole or not at all."""

from __future__ import annotations

import json
import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Mapping

from mergeline.merging.checkpoints.checkpoint import DTYPES, hasher
from mergeline.merging.checkpoints.companions import STEMS
from mergeline.merging.checkpoints.components import component_of
from mergeline.merging.errors import UserError
from mergeline.merging.files import begin_writing

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 1 << 20
_BEHIND = 1 << 20  # bytes that are sent to the disk together


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class CheckpointWriter:
    """Pre-sized safetensors files in `folder`, into which tensors are written at their final offsets, from any thread.

    Tensors are laid out as the safetensors library does: larger elements first, then by name. With `resume`, files
    that already lie there with the very same header are opened as they are, whoever made them; with `join`, they must.
    """

    def __init__(
        self,
        folder: Path,
        tensors: list[TensorSpec],
        metadata: dict[str, str],
        shard_size: int | None,
        resume: bool = False,
        join: bool = False,
        file: str | None = None,
        stems: Mapping[str, str] = MappingProxyType({"": STEMS[0]}),
    ):
        """file: the name of a single file, if it has another than `stems` say.

        stems: of what stands before names of tensors, as of components (`unet/`), how the names of its files begin.
        """
        self.folder, self._join = folder, join
        self.specs = {t.name: t for t in tensors}
        self.hashes: dict[str, str] = {}
        self._handles: list[int] = []
        self._place: dict[str, tuple[int, int]] = {}
        self.files: list[str] = []
        self.indexes: list[str] = []
        folder.mkdir(exist_ok=True)
        try:
            for prefix, own in _by_component(tensors, stems).items():
                (folder / prefix).mkdir(exist_ok=True)
                self._create_all(prefix, own, metadata, shard_size, resume, stems[prefix], file)
        except BaseException:
            self.close()
            raise

    def _create_all(
        self,
        prefix: str,
        tensors: list[TensorSpec],
        metadata: dict[str, str],
        shard_size: int | None,
        resume: bool,
        stem: str,
        file: str | None,
    ) -> None:
        """The files of one component."""
        ordered = sorted(tensors, key=lambda t: (-DTYPES[t.dtype][1], t.name))
        shards = _shards(ordered, shard_size)
        names = [file or f"{stem}.safetensors"] if len(shards) == 1 else _shard_names(stem, len(shards))
        for name, shard in zip(names, shards):
            self._create(self.folder / prefix / name, shard, metadata, resume, prefix)
            self.files.append(prefix + name)
        if len(shards) > 1:
            index = f"{prefix}{stem}.safetensors.index.json"
            self.indexes.append(index)
            if not self._join:
                _write_index(self.folder / index, prefix, dict(zip(names, shards)))

    def _create(
        self, path: Path, tensors: list[TensorSpec], metadata: dict[str, str], resume: bool, prefix: str
    ) -> None:
        header: dict = {"__metadata__": metadata}
        offset = 0
        for t in tensors:
            header[t.name.removeprefix(prefix)] = {
                "dtype": t.dtype,
                "shape": list(t.shape),
                "data_offsets": [offset, offset + t.nbytes],
            }
            offset += t.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        text = len(text).to_bytes(8, "little") + text
        if resume and not _is_alone(path):
            path.unlink()
        keep = 0 if resume or self._join else os.O_EXCL
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | keep, 0o666)
        self._handles.append(handle)
        if os.pread(handle, len(text), 0) != text or os.fstat(handle).st_size != len(text) + offset:
            if self._join:
                raise UserError(f"{path}: another merge took its place; this one cannot go on")
            os.ftruncate(handle, 0)
            os.posix_fallocate(handle, 0, len(text) + offset)  # a full disk shows here, not after an hour
            os.pwrite(handle, text, 0)
        for t in tensors:
            self._place[t.name] = (handle, len(text) + header[t.name.removeprefix(prefix)]["data_offsets"][0])

    def open(self, name: str) -> TensorWriter:
        """Begin (or begin again) a tensor that is written piece by piece."""
        return TensorWriter(self, self.specs[name], *self._place[name])

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, whose shape must be the one announced."""
        assert tuple(tensor.shape) == self.specs[name].shape, name
        writer = self.open(name)
        writer.append(tensor)
        writer.close()

    def stored_hash(self, name: str) -> str:
        """The hash of the bytes that lie at a tensor's place now."""
        handle, offset = self._place[name]
        hash, left = hasher(), self.specs[name].nbytes
        while left:
            chunk = os.pread(handle, min(left, _CHUNK), offset)
            hash.update(chunk)
            offset += len(chunk)
            left -= len(chunk)
        return hash.hexdigest()

    def finish(self) -> None:
        """Close the files, in which every tensor was written; `files.publish` brings them to the disk."""
        missing = sorted(set(self.specs) - set(self.hashes))
        assert not missing, f"never written: {missing}"
        self.close()

    def close(self) -> None:
        while self._handles:
            os.close(self._handles.pop())


class TensorWriter:
    """Writes one tensor from its first element to its last."""

    def __init__(self, checkpoint: CheckpointWriter, spec: TensorSpec, handle: int, offset: int):
        self._checkpoint, self._spec, self._handle = checkpoint, spec, handle
        self._next, self._end = offset, offset + spec.nbytes
        self._begun = offset  # what lies before is on its way to the disk
        self._hash = hasher()

    def append(self, tensor: Tensor) -> None:
        """Write the next elements, which have the announced dtype."""
        import torch

        assert str(tensor.dtype) == f"torch.{DTYPES[self._spec.dtype][0]}", self._spec.name
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._hash.update(data)
        done = 0
        while done < len(data):
            done += os.pwrite(self._handle, data[done:], self._next + done)
        self._next += done
        if self._next - self._begun >= _BEHIND:
            whole = self._next - self._next % mmap.PAGESIZE  # the next elements go into the last page, too
            begin_writing(self._handle, self._begun, whole)
            self._begun = whole

    def close(self) -> str:
        """All elements are written; returns their hash."""
        assert self._next == self._end, self._spec.name
        self._checkpoint.hashes[self._spec.name] = digest = self._hash.hexdigest()
        return digest


def _by_component(tensors: list[TensorSpec], stems: Mapping[str, str]) -> dict[str, list[TensorSpec]]:
    """The tensors of each component; the folder's own where there is none at all."""
    found: dict[str, list[TensorSpec]] = {}
    components = {prefix.rstrip("/") for prefix in stems if prefix}
    for t in tensors:
        found.setdefault(component_of(t.name, components), []).append(t)
    return found or {"": []}


def _write_index(path: Path, prefix: str, shards: Mapping[str, list[TensorSpec]]) -> None:
    weight_map = {t.name.removeprefix(prefix): name for name, shard in shards.items() for t in shard}
    total = sum(t.nbytes for shard in shards.values() for t in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(index, indent=1) + "\n")


def _is_alone(path: Path) -> bool:
    """Whether writing to a path changes nothing but that path: it is no link, and the file has no other name."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return True
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def _shards(tensors: list[TensorSpec], limit: int | None) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for t in tensors:
        if limit and shards[-1] and size + t.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(t)
        size += t.nbytes
    return shards


def _shard_names(stem: str, count: int) -> list[str]:
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
