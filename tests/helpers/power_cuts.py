"""What a power cut leaves of a folder: every change to it is recorded, and any moment is looked at afterwards.

The bytes of a file are on the disk once the file was synced, a name once its folder was (of a renaming, both folders).
Of what was not, a cut keeps the names up to any moment, as a file system with a journal does, and of the bytes
nothing, or zeros, or all but half of the last write, or everything. Databases of SQLite are taken at its word: what was
committed is on the disk, all of it, and nothing else.
"""

from __future__ import annotations

import builtins
import io
import os
import shutil
import threading
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import pytest

from mergeline.merging import files

Tree = dict[str, Any]  # of a folder: by name the bytes of a file, or the tree of a folder
MODES = ("dropped", "zeros", "torn", "kept")  # what becomes of bytes that were not synced
ROOT = 0


class Names(NamedTuple):
    """At once, names in folders come to mean other nodes, or (None) nothing."""

    entries: tuple[tuple[int, str, int | None], ...]


class Write(NamedTuple):
    node: int
    offset: int
    data: bytes


class Size(NamedTuple):
    node: int
    size: int


class Sync(NamedTuple):
    node: int


class Commit(NamedTuple):
    """A database has these bytes, on the disk."""

    folder: int
    name: str
    node: int
    data: bytes


Change = Names | Write | Size | Sync | Commit


class Disk:
    """Folders and files as numbered nodes: the names in each folder, the bytes of each file."""

    def __init__(self, folder: Path):
        self.names: dict[int, dict[str, int]] = {ROOT: {}}
        self.data: dict[int, bytes] = {}
        self._add(ROOT, folder)

    def _add(self, node: int, folder: Path) -> None:
        for path in sorted(folder.iterdir()):
            child = self.names[node][path.name] = len(self.names) + len(self.data)
            if path.is_dir():
                self.names[child] = {}
                self._add(child, path)
            else:
                self.data[child] = path.read_bytes()

    def copy(self) -> Disk:
        made = copy(self)
        made.names = {node: dict(names) for node, names in self.names.items()}
        made.data = dict(self.data)
        return made

    def apply(self, change: Change) -> None:
        if isinstance(change, Names):
            for folder, name, node in change.entries:
                if node is None:
                    self.names[folder].pop(name, None)
                else:
                    self.names[folder][name] = node
        elif isinstance(change, Write):
            old = self.data.get(change.node, b"").ljust(change.offset, b"\0")
            self.data[change.node] = (
                old[: change.offset] + change.data + old[change.offset + len(change.data) :]
            )
        elif isinstance(change, Commit):
            self.names[change.folder][change.name] = change.node
            self.data[change.node] = change.data
        elif isinstance(change, Size):
            self.data[change.node] = self.data.get(change.node, b"")[: change.size].ljust(change.size, b"\0")

    def tree(self, node: int = ROOT) -> Tree:
        return {
            name: self.tree(child) if child in self.names else self.data.get(child, b"")
            for name, child in sorted(self.names[node].items())
        }


class Recording:
    """A folder as it was when the recording began, and the changes to it since."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.before, self.now = Disk(folder), Disk(folder)
        self.changes: list[Change] = []

    def add(self, change: Change) -> None:
        self.changes.append(change)
        self.now.apply(change)

    def check(self) -> None:
        """Every change was seen: the recording ends with what lies on the disk."""
        assert self.now.tree() == tree_of(self.folder)

    def commit(self, folder: int, path: Path) -> None:
        """See whether a database has changed."""
        data = path.read_bytes() if path.exists() else b""
        node = self.now.names[folder].get(path.name)
        if data and (node is None or self.now.data[node] != data):
            if node is None:
                node = len(self.now.names) + len(self.now.data)
                self.before.data[node] = b""
            self.add(Commit(folder, path.name, node, data))

    def states(self, first: int = 0) -> Iterator[Tree]:
        """Every different folder that a cut, at any moment from that change on, may leave."""
        synced = [self._synced(i) for i in range(len(self.changes))]
        seen = set()
        for end in range(first, len(self.changes) + 1):
            loose = [i for i in range(end) if synced[i] >= end]
            for kept in [*(i for i in loose if isinstance(self.changes[i], Names)), end]:
                for mode in MODES if any(isinstance(self.changes[i], Write) for i in loose) else ("kept",):
                    tree = self._state(end, kept, mode, set(loose))
                    if (key := _frozen(tree)) not in seen:
                        seen.add(key)
                        yield tree

    def _synced(self, i: int) -> int:
        """The number of the change by which change `i` is on the disk."""
        change, never = self.changes[i], len(self.changes) + 1
        if isinstance(change, Commit):
            return i
        nodes = {e[0] for e in change.entries} if isinstance(change, Names) else {change.node}
        later = range(i + 1, len(self.changes))
        return max(next((j for j in later if self.changes[j] == Sync(node)), never) for node in nodes)

    def _state(self, end: int, kept: int, mode: str, loose: set[int]) -> Tree:
        disk = self.before.copy()
        last = max((i for i in loose if isinstance(self.changes[i], Write)), default=None)
        for i, change in enumerate(self.changes[:end]):
            if i not in loose or isinstance(change, Names) and i < kept:
                disk.apply(change)
            elif isinstance(change, Names):
                continue
            elif mode == "zeros" and isinstance(change, Write):
                disk.apply(change._replace(data=bytes(len(change.data))))
            elif mode == "torn" and i == last:
                disk.apply(change._replace(data=change.data[: len(change.data) // 2]))
            elif mode != "dropped":
                disk.apply(change)
        return disk.tree()


def _frozen(tree: Tree) -> tuple[Any, ...]:
    """As a key; the hashes of bytes are computed once."""
    return tuple((name, _frozen(what) if isinstance(what, dict) else what) for name, what in tree.items())


def tree_of(folder: Path) -> Tree:
    """What lies in a folder."""
    return {p.name: tree_of(p) if p.is_dir() else p.read_bytes() for p in sorted(folder.iterdir())}


def write_tree(tree: Tree, folder: Path) -> None:
    """Make a folder of what was in another."""
    folder.mkdir(parents=True)
    for name, what in tree.items():
        write_tree(what, folder / name) if isinstance(what, dict) else (folder / name).write_bytes(what)


# --------------------------------------------------------------------------------------- recording


@contextmanager
def recorded(folder: Path, exchange: bool = True, databases: Sequence[Path] = ()) -> Iterator[Recording]:
    """The changes that the block makes in a folder; without `exchange` the system cannot exchange names.

    databases: files of SQLite in the folder, which writes them without our seeing it.
    """
    recording = Recording(folder)
    recorder = _Recorder(recording, databases)
    with pytest.MonkeyPatch.context() as patch, recorder.transactions():
        recorder.install(patch, exchange)
        yield recording
        recorder.look()
    recording.check()


class _Recorder:
    def __init__(self, recording: Recording, databases: Sequence[Path]):
        self.recording, self.disk, self.databases = recording, recording.now, databases
        self.root = os.path.realpath(recording.folder)
        self.open: dict[int, int] = {}  # handle -> node
        self.lock = threading.RLock()

    def install(self, patch: pytest.MonkeyPatch, exchange: bool) -> None:
        for name in (
            "open", "close", "write", "pwrite", "ftruncate", "posix_fallocate", "fsync", "mkdir", "rmdir",
            "unlink", "remove", "rename", "replace", "link", "symlink", "truncate", "sendfile",
        ):  # fmt: skip
            patch.setattr(os, name, self._locked(getattr(self, f"_{name}"), getattr(os, name)))
        patch.setattr(shutil, "_USE_CP_SENDFILE", False)
        for module in (builtins, io):
            patch.setattr(module, "open", self._opener(io.open))
        there = self._locked(self._exchange, files.exchange) if exchange else lambda a, b: False
        patch.setattr(files, "exchange", there)

    def _locked(self, record: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.lock:
                self.look()
                return record(real, *args, **kwargs)

        return call

    # ------------------------------------------------------------------ databases

    @contextmanager
    def transactions(self) -> Iterator[None]:
        """Every one that SQLAlchemy begins is looked at: what was committed before it is there then."""
        if not self.databases:
            yield
            return
        from sqlalchemy import event
        from sqlalchemy.engine import Engine

        def before(connection: Any) -> None:
            with self.lock:
                self.look()

        event.listen(Engine, "begin", before)
        try:
            yield
        finally:
            event.remove(Engine, "begin", before)

    def look(self) -> None:
        """See which databases have changed since."""
        for path in self.databases:
            place = self._place(path) if path.parent.is_dir() else None
            if place:
                self.recording.commit(place[0], path)

    # ------------------------------------------------------------------ places

    def _place(self, path: Any, dir_fd: int | None = None) -> tuple[int, str] | None:
        """The node of the folder that a path is in, and its name there; None outside."""
        if isinstance(path, int) or dir_fd is not None and dir_fd not in self.open:
            return None
        if dir_fd is not None:
            return self.open[dir_fd], os.fspath(path)
        head, name = os.path.split(os.path.abspath(os.fspath(path)))
        relative = os.path.relpath(os.path.realpath(head), self.root)
        if relative.split(os.sep)[0] == "..":
            return None
        node = ROOT
        for part in () if relative == "." else relative.split(os.sep):
            node = self.disk.names[node][part]
        return node, name

    def _node(self, place: tuple[int, str]) -> int | None:
        return self.disk.names[place[0]].get(place[1])

    def _new(self, place: tuple[int, str], folder: bool) -> int:
        node = len(self.disk.names) + len(self.disk.data)
        for disk in (self.disk, self.recording.before):
            (disk.names if folder else disk.data)[node] = {} if folder else b""
        self.recording.add(Names(((*place, node),)))
        return node

    # ------------------------------------------------------------------ what is recorded

    def _open(self, real: Any, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        handle = real(path, flags, mode, dir_fd=dir_fd)
        self.open.pop(handle, None)  # a file that was closed without us
        place = self._place(path, dir_fd)
        if place is None and not isinstance(path, int) and os.path.realpath(path) == self.root:
            self.open[handle] = ROOT
        elif place is not None:
            node = self._node(place)
            if node is None:
                node = self._new(place, folder=False)
            elif flags & os.O_TRUNC:
                self.recording.add(Size(node, 0))
            self.open[handle] = node
        return handle

    def _close(self, real: Any, handle: int) -> None:
        self.open.pop(handle, None)
        real(handle)

    def _write(self, real: Any, handle: int, data: Any) -> int:
        count = real(handle, data)
        if handle in self.open:
            offset = os.lseek(handle, 0, os.SEEK_CUR) - count
            self.recording.add(Write(self.open[handle], offset, bytes(data[:count])))
        return count

    def _pwrite(self, real: Any, handle: int, data: Any, offset: int) -> int:
        count = real(handle, data, offset)
        if handle in self.open:
            self.recording.add(Write(self.open[handle], offset, bytes(data[:count])))
        return count

    def _ftruncate(self, real: Any, handle: int, size: int) -> None:
        real(handle, size)
        if handle in self.open:
            self.recording.add(Size(self.open[handle], size))

    def _posix_fallocate(self, real: Any, handle: int, offset: int, length: int) -> None:
        real(handle, offset, length)
        if handle in self.open:
            size = max(os.fstat(handle).st_size, offset + length)
            self.recording.add(Size(self.open[handle], size))

    def _fsync(self, real: Any, handle: int) -> None:
        real(handle)
        if handle in self.open:
            self.recording.add(Sync(self.open[handle]))

    def _mkdir(self, real: Any, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        place = self._place(path, dir_fd)
        real(path, mode, dir_fd=dir_fd)
        if place:
            self._new(place, folder=True)

    def _unlink(self, real: Any, path: Any, *, dir_fd: int | None = None) -> None:
        place = self._place(path, dir_fd)
        real(path, dir_fd=dir_fd)
        if place:
            self.recording.add(Names(((*place, None),)))

    _remove = _rmdir = _unlink

    def _rename(self, real: Any, source: Any, target: Any, **kwargs: Any) -> None:
        old, new = self._place(source), self._place(target)
        real(source, target, **kwargs)
        if old and new:
            self.recording.add(Names(((*old, None), (*new, self._node(old)))))

    _replace = _rename

    def _link(self, real: Any, source: Any, target: Any, **kwargs: Any) -> None:
        old, new = self._place(source), self._place(target)
        real(source, target, **kwargs)
        if old and new:
            self.recording.add(Names(((*new, self._node(old)),)))

    def _exchange(self, real: Any, a: Path, b: Path) -> bool:
        first, second = self._place(a), self._place(b)
        done = real(a, b)
        if done and first and second:
            self.recording.add(Names(((*first, self._node(second)), (*second, self._node(first)))))
        return done

    def _unknown(self, real: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{real.__name__} is not recorded")

    _symlink = _truncate = _sendfile = _unknown

    def _opener(self, real: Any) -> Callable[..., Any]:
        """`open` whose files, if they are written to, write by os.write."""

        def opened(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
            if isinstance(file, int) and file not in self.open or not set(mode) & set("wxa+"):
                return real(file, mode, buffering, *args, **kwargs)
            assert "+" not in mode, "not recorded"
            opener = None if isinstance(file, int) else lambda *a: os.open(*a, 0o666)
            raw = _RawFile(file, mode.replace("t", "").replace("b", ""), opener=opener)
            buffered = io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **kwargs)

        return opened


class _RawFile(io.FileIO):
    def write(self, data: Any) -> int:
        return os.write(self.fileno(), bytes(data))
