"""The files that a merge reads, and whether they are still what they were."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Iterable, Mapping, NamedTuple

from mergeline.merging.checkpoints.adapters import ADAPTER_CONFIG
from mergeline.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mergeline.merging.checkpoints.companions import CONFIG, STEMS, TOKENIZER
from mergeline.merging.checkpoints.components import PIPELINE
from mergeline.merging.checkpoints.dcp import METADATA
from mergeline.merging.checkpoints.modules import MODULES
from mergeline.merging.checkpoints.remote import refuse_changed_remotes
from mergeline.merging.errors import UserError
from mergeline.merging.reading import sha256_of

_BESIDE = (
    *(f"{stem}.safetensors.index.json" for stem in STEMS), ADAPTER_CONFIG, CONFIG, TOKENIZER, PIPELINE, MODULES,
    METADATA
)  # fmt: skip


class Stamp(NamedTuple):
    """What the file system says of a file's content, and of the file."""

    size: int
    modified: int
    inode: int
    device: int
    changed: int
    links: int


def files_of(checkpoint: Checkpoint) -> list[Path]:
    """The files that a checkpoint is read from: weights, and what lies beside them and is looked at."""
    weights = {file for info in checkpoint.stored.tensors.values() for file in info.files}
    folders = {checkpoint.folder, *(file.parent for file in weights)}
    beside = (folder / name for folder in folders for name in _BESIDE)
    return sorted(weights.union(path for path in beside if path.is_file()))


def places_of(models: Iterable[Path]) -> list[Path]:
    """Where checkpoints lie, and the files that they are read from (raises UserError as `open_checkpoint`)."""
    return [file for path in models for file in (path, *files_of(open_checkpoint(path)))]


def stamps(files: Iterable[Path]) -> dict[Path, Stamp]:
    """What files are now."""
    found = {}
    for file in files:
        s = file.stat()
        found[file] = Stamp(s.st_size, s.st_mtime_ns, s.st_ino, s.st_dev, s.st_ctime_ns, s.st_nlink)
    return found


def contents(checkpoints: Mapping[str, Checkpoint]) -> dict[str, list[str]]:
    """By name, the SHA-256 digests of the files of checkpoints: the same wherever they lie and whenever written."""
    return {
        name: [_digest(file, stamp) for file, stamp in stamps(files_of(checkpoint)).items()]
        for name, checkpoint in checkpoints.items()
    }


@lru_cache(maxsize=4096)
def _digest(file: Path, stamp: Stamp) -> str:
    return sha256_of(file)


def refuse_changed(before: Mapping[Path, Stamp]) -> None:
    """Raises UserError if a file is no longer what it was, or what its header is of where it lies.

    A new time of change alone, by which tools that set the time of modification back are found out, does not count
    where the number of links is another one, too: a cache that took up the file, or gave it to somebody else.
    """
    for file, was in before.items():
        try:
            [now] = stamps([file]).values()
        except OSError:
            raise UserError(f"{file}: went away while it was read; bring it back and run again") from None
        if now[:4] != was[:4] or now.changed != was.changed and now.links == was.links:
            raise UserError(
                f"{file}: was changed while it was read, so nothing was written; run again once it is complete"
            )
    refuse_changed_remotes(before)
