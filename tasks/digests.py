"""MD5 digests of files and folders, equal to DVC's, remembered while a file's inode, size and times stay the same.

The change time is among them: archives restore modification times, and inodes are used again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from contextlib import closing
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Collection, Iterator

from mergeline.merging.reading import open_regular

# What .dvcignore leaves out of every folder.
_IGNORED_FOLDERS = {"__pycache__", ".git", ".dvc"}
_IGNORED_FILES = ("*.pyc", ".*.partial", ".gitignore")
_CHUNK = 1 << 22
_Key = tuple[int, int, int, int]  # inode, size, modification and change time


class Digests:
    """Digests of paths; `memo` is an sqlite file that may be deleted at any time."""

    def __init__(self, memo: Path):
        memo.parent.mkdir(parents=True, exist_ok=True)
        self._memo = memo
        self._known: dict[
            _Key, str
        ] = {}  # what the memo has; one stage after another asks for the same files
        with self._connect() as db:
            db.execute(
                "create table if not exists md5 (inode int primary key, size int, modified int, changed int, md5 text)"
            )
            self._known |= {(i, s, m, c): md5 for i, s, m, c, md5 in db.execute("select * from md5")}

    def of(self, path: Path, without: Collection[Path] = ()) -> str | None:
        """DVC's md5 of a file, `...dir` of a folder, or None where there is nothing.

        without: files and folders that are taken for gone.
        """
        if path.is_dir():
            return hashlib.md5(folder_list(self.entries(path, without))).hexdigest() + ".dir"
        new: dict[_Key, str] = {}
        try:
            return self._file(path, new) if path.exists() else None
        finally:
            self._remember(new)

    def entries(self, folder: Path, without: Collection[Path] = ()) -> list[dict[str, str]]:
        """The `md5` and `relpath` of every file in a folder, by name."""
        new: dict[_Key, str] = {}
        try:
            found = [
                {"md5": self._file(f, new), "relpath": f.relative_to(folder).as_posix()}
                for f in files_of(folder)
                if not any(f.is_relative_to(gone) for gone in without)
            ]
        finally:
            self._remember(new)
        return sorted(found, key=lambda entry: entry["relpath"])

    def _file(self, path: Path, new: dict[_Key, str]) -> str:
        """The digest of a file; where it had to be read, it is added to `new`, too."""
        stat = path.stat()
        key = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        if key not in self._known:
            self._known[key] = new[key] = _md5(path)
        return self._known[key]

    def _remember(self, new: dict[_Key, str]) -> None:
        """In one transaction: each is written to the disk before it returns."""
        if new:
            with self._connect() as db:
                db.execute("begin immediate")
                rows = [(*key, md5) for key, md5 in new.items()]
                db.executemany("insert or replace into md5 values (?, ?, ?, ?, ?)", rows)
                db.execute("commit")

    def _connect(self) -> closing[sqlite3.Connection]:
        return closing(sqlite3.connect(self._memo, timeout=60, isolation_level=None))


def folder_list(entries: list[dict[str, str]]) -> bytes:
    """What DVC keeps of a folder with these files: its MD5 is the folder's digest."""
    return json.dumps(entries, sort_keys=True).encode()


def _md5(path: Path) -> str:
    md5 = hashlib.md5()
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            md5.update(chunk)
    return md5.hexdigest()


def files_of(folder: Path) -> Iterator[Path]:
    """The files of a folder that belong to its digest: those that DVC sees."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if f not in _IGNORED_FOLDERS and not fnmatchcase(f, ".*.partial")]
        for name in names:
            if not any(fnmatchcase(name, pattern) for pattern in _IGNORED_FILES):
                yield Path(parent, name)
