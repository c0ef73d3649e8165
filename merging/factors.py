"""The factor store: what costs much to compute and is needed again, under the digest of everything it depends on.

A spectral decomposition depends on the bytes of the tensors it was made from and on the reference that the task
vectors are measured from; not on rank, scale or method. Damaged or foreign entries are computed anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Protocol

from merging.errors import UserError
from merging.files import write_bytes
from merging.recipe import text_digest

if TYPE_CHECKING:
    from torch import Tensor

Tensors = dict[str, "Tensor"]


class FactorStore(Protocol):
    """Named tensors by a key that is plain JSON data."""

    def recall(self, key: Any, make: Callable[[], Tensors]) -> Tensors: ...


class FolderStore:
    """A factor store in a folder: one safetensors file an entry, written whole or not at all."""

    def __init__(self, folder: Path):
        self.folder = folder

    def recall(self, key: Any, make: Callable[[], Tensors]) -> Tensors:
        """What is stored under `key`; if nothing is, `make()`, which is stored."""
        from safetensors import SafetensorError
        from safetensors.torch import load, save

        digest = text_digest(key).partition(":")[2]
        path = self.folder / digest[:2] / f"{digest}.safetensors"
        try:
            return load(path.read_bytes())
        except (FileNotFoundError, SafetensorError):
            pass
        made = make()
        write_bytes(path, save({name: tensor.contiguous().cpu() for name, tensor in made.items()}))
        return made


def store_at(path: str | Path | None) -> FolderStore | None:
    """The factor store in a folder, or None (raises UserError if something else is there)."""
    if path is None:
        return None
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder for the factors")
    return FolderStore(folder)
