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
from typing import Iterator

# What .dvcignore leaves out of every folder.
_IGNORED_FOLDERS = {"__pycache__", ".git", ".dvc"}
_IGNORED_FILES = ("*.pyc", ".*.partial", ".gitignore")
_CHUNK = 1 << 22
_SELECT = "select md5 from md5 where inode = ? and size = ? and modified = ? and changed = ?"


class Digests:
    """Digests of paths; `memo` is an sqlite file that may be deleted at any time."""

    def __init__(self, memo: Path):
        memo.parent.mkdir(parents=True, exist_ok=True)
        self._memo = memo
        with self._connect() as db:
            db.execute(
                "create table if not exists md5 (inode int primary key, size int, modified int, changed int, md5 text)"
            )

    def of(self, path: Path) -> str | None:
        """DVC's md5 of a file, `...dir` of a folder, or None where there is nothing."""
        if path.is_dir():
            entries = [
                {"md5": self._file(f), "relpath": f.relative_to(path).as_posix()} for f in _files(path)
            ]
            entries.sort(key=lambda e: e["relpath"])
            return hashlib.md5(json.dumps(entries, sort_keys=True).encode()).hexdigest() + ".dir"
        return self._file(path) if path.exists() else None

    def _file(self, path: Path) -> str:
        stat = path.stat()
        key = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        with self._connect() as db:
            row = db.execute(_SELECT, key).fetchone()
        if row:
            return row[0]
        md5 = hashlib.md5()
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                md5.update(chunk)
        with self._connect() as db:
            db.execute("insert or replace into md5 values (?, ?, ?, ?, ?)", (*key, md5.hexdigest()))
        return md5.hexdigest()

    def _connect(self) -> closing[sqlite3.Connection]:
        return closing(sqlite3.connect(self._memo, timeout=60, isolation_level=None))


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if f not in _IGNORED_FOLDERS and not fnmatchcase(f, ".*.partial")]
        for name in names:
            if not any(fnmatchcase(name, pattern) for pattern in _IGNORED_FILES):
                yield Path(parent, name)
