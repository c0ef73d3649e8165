"""Write a checkpoint tensor by tensor, at final offsets, in files of known size; it appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from merging.checkpoint import DTYPES, INDEX, WEIGHTS
from merging.files import sync

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class CheckpointWriter:
    """Pre-sized safetensors files in `folder`; `write` puts each tensor at its final offset, from any thread.

    Tensors are laid out as the safetensors library does: larger elements first, then by name.
    """

    def __init__(
        self, folder: Path, tensors: list[TensorSpec], metadata: dict[str, str], shard_size: int | None
    ):
        self.folder = folder
        self.specs = {t.name: t for t in tensors}
        self.hashes: dict[str, str] = {}
        self._handles: list[int] = []
        self._place: dict[str, tuple[int, int]] = {}
        ordered = sorted(tensors, key=lambda t: (-DTYPES[t.dtype][1], t.name))
        shards = _shards(ordered, shard_size)
        self.files = _file_names(len(shards))
        try:
            for name, shard in zip(self.files, shards):
                self._create(folder / name, shard, metadata)
            if len(shards) > 1:
                self._write_index(shards)
        except BaseException:
            self.close()
            raise

    def _create(self, path: Path, tensors: list[TensorSpec], metadata: dict[str, str]) -> None:
        header: dict = {"__metadata__": metadata}
        offset = 0
        for t in tensors:
            header[t.name] = {
                "dtype": t.dtype,
                "shape": list(t.shape),
                "data_offsets": [offset, offset + t.nbytes],
            }
            offset += t.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._handles.append(handle)
        os.posix_fallocate(handle, 0, start + offset)  # a full disk shows here, not after an hour
        os.pwrite(handle, len(text).to_bytes(8, "little") + text, 0)
        for t in tensors:
            self._place[t.name] = (handle, start + header[t.name]["data_offsets"][0])

    def _write_index(self, shards: list[list[TensorSpec]]) -> None:
        weight_map = {t.name: name for name, shard in zip(self.files, shards) for t in shard}
        total = sum(t.nbytes for t in self.specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, whose dtype and shape must be those announced."""
        import torch

        handle, offset = self._place[name]
        spec = self.specs[name]
        assert tuple(tensor.shape) == spec.shape and str(tensor.dtype) == f"torch.{DTYPES[spec.dtype][0]}", (
            name
        )
        data = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        self.hashes[name] = hashlib.sha256(data).hexdigest()
        done = 0
        while done < len(data):
            done += os.pwrite(handle, data[done:], offset + done)

    def finish(self) -> None:
        """Flush everything to the disk."""
        missing = sorted(set(self.specs) - set(self.hashes))
        assert not missing, f"never written: {missing}"
        for handle in self._handles:
            os.fsync(handle)
        self.close()
        sync(self.folder)

    def close(self) -> None:
        while self._handles:
            os.close(self._handles.pop())


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


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
