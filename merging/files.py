"""Files and folders that appear whole or not at all, whatever is killed and whenever the power fails.

What is written takes shape in a staging folder, `.NAME.partial` beside its place, which whoever writes it has locked:

    out/            what is being made; a single file lies in it under any name
    beside/         finished files whose place is beside a single file, under their final names
    old/            what stood in the places of new files, until it is removed
    journal.jsonl   how far the engine has come

Everything is on the disk before it is renamed, and names are on the disk before the next step. A folder changes places
with the one that stood there, in one step where the system has it. A single file and what lies beside it are renamed
one after the other; a cut between leaves the second in `beside/` while `out/` is empty, where `beside` finds it and the
next writer of the same place puts it right. A small file of its own is written as `.NAME.new.partial`, locked likewise.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Callable, Iterable, Iterator, Mapping

from mergeline.merging.errors import UserError
from mergeline.merging.reading import read_json

_UNWRITABLE = (
    errno.EACCES, errno.EROFS, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
    errno.ELOOP, errno.EBUSY, errno.EXDEV, errno.EFBIG, errno.ENOTEMPTY,
)  # fmt: skip
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)

_AT_FDCWD, _RENAME_EXCHANGE, _SYNC_FILE_RANGE_WRITE = -100, 2, 2  # of Linux

_OUT, _BESIDE, _OLD, JOURNAL = "out", "beside", "old", "journal.jsonl"


@contextmanager
def user_errors(target: Path) -> Iterator[None]:
    """Turn what a full, failing or read-only disk says into a UserError."""
    if "\0" in str(target):
        raise UserError(f"{target}: no file can have this name; choose another place")
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{target}: no space left on the disk; free some and run again") from None
        if error.errno == errno.EIO:
            raise UserError(
                f"{target}: the disk failed ({error.strerror}); check it, or choose another place"
            ) from None
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise UserError(f"{target}: too many files are open at once; allow more (ulimit -n)") from None
        missing = _missing(error) if error.errno == errno.ENOENT else None
        if missing and (not missing.parent.is_dir() or _takes_entries(missing.parent)):
            raise UserError(
                f"{missing}: went away while {target} was written; run again, and report it if nobody removed it"
            ) from None
        if missing or error.errno in _UNWRITABLE:
            raise UserError(f"{target}: cannot be written ({error.strerror}); choose another place") from None
        raise
    except RuntimeError as error:
        if "Symlink loop" not in str(error):  # what Path.resolve says of it before Python 3.13
            raise
        raise UserError(f"{target}: is a link that leads to itself; choose another place") from None


def _missing(error: OSError) -> Path | None:
    """What is not there, of the names that a call was given."""
    names = (error.filename, error.filename2)
    paths = (Path(os.fsdecode(name)) for name in names if isinstance(name, str | bytes))
    return next((path for path in paths if not os.path.lexists(path)), None)


def _takes_entries(folder: Path) -> bool:
    """Whether files can be made in a folder; one that is there and takes none, as /proc, says ENOENT of a new file."""
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


# --------------------------------------------------------------------------------------- staging folders


def staging_of(out: Path) -> Path:
    """The staging folder of a place."""
    return out.parent / f".{out.name}.partial"


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """An empty folder to fill, in the locked staging folder of `out`, which is removed at the end.

    The lock is the kernel's, so a killed process leaves none behind.

    Raises:
        UserError: another process is writing `out`, the disk is full, the place is read-only, the name of the staging
            folder is taken by something else.
    """
    staging, handle = _locked_folder(out)
    try:
        with user_errors(out):
            empty(staging)
            (staging / _OUT).mkdir()
            yield staging / _OUT
    finally:
        _remove(staging, handle)
        os.close(handle)


@contextmanager
def resumable(out: Path) -> Iterator[Path]:
    """The locked staging folder of `out`, which a killed or interrupted block leaves for the next one to go on with.

    It is removed when the block ends, or fails because of the user's input.

    Raises:
        UserError: as `staged`.
    """
    staging, handle = _locked_folder(out)
    try:
        with user_errors(out):
            yield staging
        _remove(staging, handle)
    except UserError:
        _remove(staging, handle)
        raise
    finally:
        os.close(handle)


def remove_leftovers(out: Path) -> None:
    """Remove what a writer of `out` left that was killed once `out` stood in its place; what is being written stays."""
    if os.path.lexists(staging_of(out)):
        with suppress(UserError), staged(out):
            pass


def _remove(staging: Path, handle: int) -> None:
    """Remove the staging folder, unless it is another process's by now, or has what the next writer must put right."""
    if _is_same(staging, handle) and not _unfinished(staging):
        shutil.rmtree(staging, ignore_errors=True)


def _locked_folder(out: Path) -> tuple[Path, int]:
    """Make and lock the staging folder; the lock is on the inode, so check that the name still means it."""
    staging = staging_of(out)
    while True:
        with user_errors(out):
            _make_staging(staging, out)
            try:
                handle = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except FileNotFoundError:  # whoever had it has removed it
                continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UserError(
                f"{out}: another process is writing it; wait for it or choose another place"
            ) from None
        if _is_same(staging, handle):
            break
        os.close(handle)
    try:
        with user_errors(out):
            _recover(staging, out)
    except BaseException:
        os.close(handle)
        raise
    return staging, handle


def _make_staging(staging: Path, out: Path) -> None:
    """Make the staging folder, or take the one that a killed process of this user left (raises UserError)."""
    make_folder(staging.parent)
    try:
        staging.mkdir()
        return
    except FileExistsError:
        pass
    try:
        found = staging.lstat()
        names = sorted(os.listdir(staging)) if stat.S_ISDIR(found.st_mode) else []
    except FileNotFoundError:
        return
    strange = [name for name in names if name not in (_OUT, _BESIDE, _OLD, JOURNAL)]
    if not stat.S_ISDIR(found.st_mode):
        problem = "is no folder" if not stat.S_ISLNK(found.st_mode) else "is a link"
    elif found.st_uid != os.geteuid():
        problem = "belongs to another user"
    elif strange:
        problem = f"holds '{strange[0]}'"
    else:
        return
    raise UserError(f"{staging}: {problem}, but is where {out.name} is made; move it away")


def _is_same(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def empty(folder: Path, keep: Iterable[str] = ()) -> None:
    """Remove what is in a folder, but for entries of these names, which may lie in sub-folders (`unet/FILE`)."""
    inside: dict[str, list[str]] = {}
    for name in keep:
        first, _, rest = name.partition("/")
        inside.setdefault(first, []).extend([rest] if rest else [])
    for entry in folder.iterdir():
        if entry.name not in inside:
            remove(entry)
        elif kept := inside[entry.name]:
            empty(entry, kept)


def link_or_copy(source: Path, target: Path) -> bool:
    """Give a file a second name, or copy it where the disk is another or has no such links; whether it is a link."""
    try:
        os.link(source, target)
        return True
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
    shutil.copyfile(source, target)
    return False


def remove_halves(folder: Path) -> None:
    """Remove what processes that were killed while they wrote small files have left in a folder and those inside."""
    for half in folder.rglob(".*.partial"):
        if half.is_file():
            half.unlink()


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------- publication


def publish(new: Path, out: Path, beside: Mapping[str, bytes] = MappingProxyType({})) -> None:
    """Give what was made in the staging folder of `out` its final name, in place of what stood there.

    new: `out/` of the staging folder, or a single file in it. beside: files that belong beside a single file, by name.
    If the disk fails, everything becomes what it was before, and OSError is raised.
    """
    staging = staging_of(out)
    sync_tree(new)
    moves = [(new, out), *((staging / _BESIDE / name, out.parent / name) for name in beside)]
    if beside:
        (staging / _BESIDE).mkdir()
        for name, data in beside.items():
            _write_new(staging / _BESIDE / name, data)
        for folder in (new.parent, staging / _BESIDE, staging, staging.parent):
            sync(folder)
    (staging / _OLD).mkdir(exist_ok=True)
    moved: list[tuple[Path, Path]] = []  # that can be taken back
    try:
        for source, place in moves:
            if _put(source, place, staging / _OLD / place.name):
                moved.append((source, place))
            sync(place.parent)
            sync(source.parent)
    except OSError:
        for source, place in reversed(moved):
            place.rename(source)
        for old, place in _unfinished(staging):
            old.rename(place)
        raise
    shutil.rmtree(staging / _OLD, ignore_errors=True)


def _put(new: Path, out: Path, old: Path) -> bool:
    """Rename `new` to `out`, and what stood there to `old`; False where that is gone.

    Only where the system cannot exchange names, there is a moment in which there is no `out`.
    """
    if not os.path.lexists(out):
        new.rename(out)
    elif not out.is_dir():
        with suppress(OSError):  # some file systems have no hard links
            os.link(out, old, follow_symlinks=False)
        new.rename(out)
        return os.path.lexists(old)
    elif exchange(new, out):
        new.rename(old)
    else:
        out.rename(old)
        new.rename(out)
    return True


def exchange(a: Path, b: Path) -> bool:
    """Let two names change places in one step; False where the system cannot."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(a), None, str(b))


def beside(out: Path, name: str) -> Path:
    """Where a file of this name that belongs beside the single file `out` lies: there, unless a cut left it behind."""
    left = staging_of(out) / _BESIDE / name
    return left if left.is_file() and _is_empty(staging_of(out) / _OUT) else out.parent / name


def _recover(staging: Path, out: Path) -> None:
    """Finish or undo a publication that was cut."""
    for left, place in _unfinished(staging):
        left.rename(place)
        sync(out.parent)
    for done in (staging / _BESIDE, staging / _OLD):
        remove(done)


def _unfinished(staging: Path) -> list[tuple[Path, Path]]:
    """What a cut left in a staging folder, and where it belongs: what has no successor, what belongs beside a file."""
    found = [(old, staging.parent / old.name) for old in _entries(staging / _OLD)]
    found = [(old, place) for old, place in found if not os.path.lexists(place)]
    if _is_empty(staging / _OUT):
        found += [(left, staging.parent / left.name) for left in _entries(staging / _BESIDE)]
    return found


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


# --------------------------------------------------------------------------------------- small files


def read_object(path: Path, *, named: str | None = None, mend: str = "download it again") -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file.

    named: what the user calls the file. mend: what to do about a file that holds something else (raises UserError).
    """
    if not path.is_file():
        return {}
    try:
        found = read_json(path)
    except ValueError as error:
        raise UserError(f"{named or path}: is not valid JSON ({error}); {mend}") from None
    if not isinstance(found, dict):
        raise UserError(f"{named or path}: is not a JSON object; {mend}")
    return found


def write_bytes(path: Path, data: bytes, *, lasting: bool = True, mode: int = 0o666) -> None:
    """Write a small file whole or not at all (raises UserError if the disk is full, failing or read-only).

    lasting: it survives a power cut. What can be told to be damaged, and made again, need not. mode: its permissions,
    less those that the umask takes.
    """
    half = path.parent / f".{path.name}.new.partial"
    with user_errors(path):
        make_folder(path.parent) if lasting else path.parent.mkdir(parents=True, exist_ok=True)
        handle = _locked_half(half, mode)
        try:
            _write(handle, data, lasting)
            half.rename(path)
        finally:
            if _is_same(half, handle):  # it was not renamed
                half.unlink()
            os.close(handle)
        if lasting:
            sync(path.parent)


def _locked_half(half: Path, mode: int) -> int:
    """Make and lock the file that a small one is written to first, in place of what a killed process left there.

    Who finds another's that is being written waits for it.
    """
    while True:
        with suppress(FileExistsError):
            handle = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_same(half, handle):
                return handle
            os.close(handle)  # another took it for one that was left, before it was locked
            continue
        with suppress(FileNotFoundError):
            handle = os.open(half, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                if _is_same(half, handle):
                    half.unlink()
            finally:
                os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all, keys in their given order."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """JSON as files hold it, keys in their given order."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _write_new(path: Path, data: bytes) -> None:
    """Write a file that is not there yet, through to the disk."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _write(handle, data)
    finally:
        os.close(handle)


def _write(handle: int, data: bytes, lasting: bool = True) -> None:
    """Write to an open file; if it is to last, through to the disk."""
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left) :]
    if lasting:
        os.fsync(handle)


# --------------------------------------------------------------------------------------- the disk


def make_folder(folder: Path) -> None:
    """Make a folder and those that it lies in; their names are on the disk then."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def begin_writing(handle: int, start: int, stop: int) -> bool:
    """Let bytes [start, stop) of an open file go to its disk by and by, so that `sync` waits for less.

    False where the system cannot. That a disk fails is for `sync` to say.
    """
    function = _sync_file_range()
    return function is not None and function(handle, start, stop - start, _SYNC_FILE_RANGE_WRITE) == 0


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """The system call, where the C library has it."""
    import ctypes

    try:
        function = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


def sync_tree(path: Path) -> None:
    """`sync` of a file, or of a folder and all that is in it."""
    if path.is_symlink():
        return
    if path.is_dir():
        for entry in path.iterdir():
            sync_tree(entry)
    sync(path)
