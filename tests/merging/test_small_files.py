"""Small files appear whole or not at all, and what a killed writer left goes with the next one."""

from __future__ import annotations

import os
import signal
import stat
from multiprocessing import get_context
from pathlib import Path

import pytest

from mergeline.merging import files
from mergeline.merging.errors import UserError

WRITERS, TIMES = 4, 200


def _die_in_the_middle(path: Path) -> None:
    files._write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    files.write_bytes(path, b"never", mode=0o644)


def _write_often(path: Path, letter: str) -> None:
    for _ in range(TIMES):
        files.write_bytes(path, letter.encode() * 5000, lasting=False)


def test_what_a_killed_writer_left_is_gone_after_the_next(tmp_path):
    file = tmp_path / "page.html"
    killed = get_context("fork").Process(target=_die_in_the_middle, args=(file,))
    killed.start()
    killed.join()
    assert [p.name for p in tmp_path.iterdir()] == [".page.html.new.partial"]
    files.write_bytes(file, b"whole", mode=0o600)
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    assert file.read_bytes() == b"whole" and stat.S_IMODE(file.stat().st_mode) == 0o600


def test_writers_at_the_same_time_wait_for_each_other(tmp_path):
    file = tmp_path / "cache.json"
    make = get_context("fork").Process
    writers = [make(target=_write_often, args=(file, letter)) for letter in "abcd"[:WRITERS]]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if file.exists():
            found = file.read_bytes()
            assert len(found) == 5000 and len(set(found)) == 1
    assert [writer.exitcode for writer in writers] == [0] * WRITERS
    assert [p.name for p in tmp_path.iterdir()] == ["cache.json"]


def test_what_cannot_be_renamed_leaves_nothing(tmp_path):
    (tmp_path / "file" / "inside").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be written"):
        files.write_bytes(tmp_path / "file", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "thesis").write_text("years of work")
    (tmp_path / ".file.new.partial").symlink_to("thesis")
    with pytest.raises(UserError, match="cannot be written"):
        files.write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "thesis").read_text() == "years of work" and not (tmp_path / "file").exists()
