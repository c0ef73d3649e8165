"""Folders and files that belong to their owner alone: databases, logs, passwords, downloads."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Iterator

from mergeline.merging.files import json_bytes, make_folder, sync, write_bytes


def private_folder(folder: Path) -> Path:
    """Make a folder that its owner alone may enter, or close one of ours that others could enter; returns it."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        sync(folder.parent)
    found = folder.stat()
    if found.st_mode & 0o077 and found.st_uid == os.getuid():
        folder.chmod(0o700)
    return folder


@contextmanager
def private_umask() -> Iterator[None]:
    """What the process makes during the block is its owner's alone; for where no other thread makes files meanwhile."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def open_private(path: Path) -> IO[str]:
    """A new text file, in place of an old one, that its owner alone may read."""
    path.unlink(missing_ok=True)
    return open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600))


def write_private_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all, for its owner alone (raises UserError as `write_bytes`)."""
    write_bytes(path, json_bytes(value), lasting=False, mode=0o600)
