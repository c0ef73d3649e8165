"""Files that others wrote, read without trusting them: regular files alone, JSON of one meaning, digests."""

from __future__ import annotations

import errno
import json
import os
import stat
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any

from mergeline.merging.errors import UserError

# Of a file of JSON; the largest tokenizers take a third of it.
_MOST_BYTES = 100_000_000
DEEPEST = 64  # lists and mappings in one another, in anything that is read


class TooDeep(ValueError):
    """What is read nests deeper than `DEEPEST`."""

    def __init__(self) -> None:
        super().__init__(f"it nests deeper than {DEEPEST} lists and mappings")


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading, without waiting for whoever may write into a pipe.

    Raises:
        OSError: it cannot be opened.
        UserError: it is a pipe, a socket or a device, which may never end.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except ValueError as error:  # a name with a NUL in it
        raise UserError(f"{path}: no such file ({error})") from None
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise UserError(f"{path}: is no file, but a pipe or a device; write what it gives into a file first")


def parsed_json(data: str | bytes) -> Any:
    """What JSON says.

    Raises:
        ValueError: it is no JSON, is too long, nests too deeply, or gives a name twice (others may read the other).
    """
    if len(data) > _MOST_BYTES:
        raise ValueError(f"it is longer than {_MOST_BYTES} bytes")
    try:
        value = json.loads(data, object_pairs_hook=_unique)
    except RecursionError:
        raise TooDeep from None
    if _depth(value) > DEEPEST:
        raise TooDeep
    return value


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [v for v in level if isinstance(v, dict | list)]:
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
        depth += 1
    return depth


def read_json(path: Path) -> Any:
    """The JSON in a regular file.

    Raises:
        OSError: it cannot be read.
        UserError: it is no regular file.
        ValueError: as `parsed_json`.
    """
    with open_regular(path) as file:
        return parsed_json(file.read(_MOST_BYTES + 1))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name is given twice")
    return result


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    import hashlib

    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
