"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from merging.errors import UserError


@contextmanager
def user_errors(target: Path) -> Iterator[None]:
    """Turn what a full disk or a read-only target says into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{target}: no space left on the disk; free some and run again") from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(f"{target}: cannot be written ({error.strerror}); choose another place") from None
        raise


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A locked, empty sibling folder `.NAME.partial` to fill; removed if the block fails.

    The lock is the kernel's, so a killed process leaves none behind.

    Raises:
        UserError: another process is writing `out`, the disk is full, or the place is read-only.
    """
    partial = out.parent / f".{out.name}.partial"
    with user_errors(out):
        partial.mkdir(parents=True, exist_ok=True)
        handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another process is writing it; wait for it or choose another place") from None
        try:
            _empty(partial)
            with user_errors(out):
                yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(handle)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def publish(partial: Path, out: Path) -> None:
    """Give a filled staging folder (or file) its final name, in place of what stood there."""
    old = out.parent / f".{out.name}.old.partial"
    shutil.rmtree(old, ignore_errors=True)
    if out.is_dir() and not out.is_symlink():
        out.rename(old)
    partial.rename(out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial"
    try:
        with user_errors(path):
            temporary.write_text(text)
        sync(temporary)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all, keys in their given order."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
