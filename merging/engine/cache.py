"""The factor store: what costs much to compute and is needed again, under the digest of everything it depends on.

A spectral decomposition depends on the bytes of the tensors it was made from and on the reference that the task
vectors are measured from; not on rank, scale or method. Damaged or foreign entries are computed anew.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

from mergeline.merging.canonical import text_digest
from mergeline.merging.checkpoints.checkpoint import hasher
from mergeline.merging.errors import UserError
from mergeline.merging.files import write_bytes

if TYPE_CHECKING:
    from torch import Tensor

_SEAL_BYTES = 32


class FolderStore:
    """A factor store in a folder: one file an entry, written whole or not at all: a hash, then safetensors."""

    def __init__(self, folder: Path):
        self.folder = folder

    def recall(self, key: Any, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What is stored under `key`; if nothing is, `make()`, which is stored."""
        from safetensors.torch import load, save

        digest = text_digest(key).partition(":")[2]
        path = self.folder / digest[:2] / f"{digest}.factors"
        try:
            stored = path.read_bytes()
        except FileNotFoundError:
            stored = b""
        seal, data = stored[:_SEAL_BYTES], stored[_SEAL_BYTES:]
        if seal == _seal(digest, data):
            with suppress(OSError):  # a store that others filled may be read-only
                os.utime(path)  # what is not used for long may be removed
            # Copied: products of float64 matrices depend on their alignment, which a file does not give.
            return {name: tensor.clone() for name, tensor in load(data).items()}
        made = make()
        data = save({name: tensor.contiguous().cpu() for name, tensor in made.items()})
        write_bytes(path, _seal(digest, data) + data, lasting=False)
        return made


def _seal(digest: str, data: bytes) -> bytes:
    """The hash of an entry and its key: a store may be damaged, or not be one."""
    sealed = hasher()
    sealed.update(digest.encode())
    sealed.update(data)
    return sealed.digest()


def store_at(path: str | os.PathLike | None) -> FolderStore | None:
    """The factor store in a folder, or None (raises UserError if something else is there)."""
    if path is None:
        return None
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder for the factors")
    return FolderStore(folder)
