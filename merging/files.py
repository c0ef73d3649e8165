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

_UNWRITABLE = (
    errno.EACCES, errno.EROFS, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG
)  # fmt: skip


@contextmanager
def user_errors(target: Path) -> Iterator[None]:
    """Turn what a full disk or a read-only target says into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{target}: no space left on the disk; free some and run again") from None
        if error.errno in _UNWRITABLE:
            raise UserError(f"{target}: cannot be written ({error.strerror}); choose another place") from None
        raise


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A locked, empty sibling folder `.NAME.partial` to fill; removed if the block fails.

    The lock is the kernel's, so a killed process leaves none behind.

    Raises:
        UserError: another process is writing `out`, the disk is full, or the place is read-only.
    """
    partial, handle = _locked_folder(out)
    try:
        empty(partial)
        with user_errors(out):
            yield partial
    finally:
        _remove(partial, handle)
        os.close(handle)


@contextmanager
def resumable(out: Path) -> Iterator[Path]:
    """A locked sibling folder `.NAME.partial` that a killed or interrupted block leaves for the next one to go on with.

    It is removed when the block ends, or fails because of the user's input.

    Raises:
        UserError: as `staged`.
    """
    partial, handle = _locked_folder(out)
    try:
        with user_errors(out):
            yield partial
        _remove(partial, handle)
    except UserError:
        _remove(partial, handle)
        raise
    finally:
        os.close(handle)


def _remove(partial: Path, handle: int) -> None:
    if _is_same(partial, handle):  # not published, nor yet another process's
        shutil.rmtree(partial, ignore_errors=True)


def _locked_folder(out: Path) -> tuple[Path, int]:
    """Make and lock the folder; the lock is on the inode, so check that the name still means it."""
    partial = out.parent / f".{out.name}.partial"
    while True:
        with user_errors(out):
            partial.mkdir(parents=True, exist_ok=True)
            handle = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UserError(
                f"{out}: another process is writing it; wait for it or choose another place"
            ) from None
        if _is_same(partial, handle):
            return partial, handle
        os.close(handle)


def _is_same(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def empty(folder: Path, keep: Path | None = None) -> None:
    """Remove what is in a folder, but for one file."""
    for entry in folder.iterdir():
        if entry != keep:
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


def read_object(path: Path, *, named: str | None = None, mend: str = "download it again") -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file.

    named: what the user calls the file. mend: what to do about a file that holds something else (raises UserError).
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{named or path}: is not valid JSON ({error}); {mend}") from None
    if not isinstance(found, dict):
        raise UserError(f"{named or path}: is not a JSON object; {mend}")
    return found


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all."""
    temporary = path.parent / f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial"
    try:
        with user_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            sync(temporary)
            temporary.rename(path)
    finally:
        if temporary.exists():
            temporary.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all, keys in their given order."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
