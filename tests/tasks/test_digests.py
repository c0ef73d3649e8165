"""Digests are DVC's own, for files and folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from places import REPOSITORY

from mergeline.tasks.digests import Digests

IGNORE = (REPOSITORY / ".dvcignore").read_text()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A DVC project with this repository's .dvcignore."""
    from dvc.repo import Repo

    Repo.init(tmp_path, no_scm=True).close()
    (tmp_path / ".dvcignore").write_text(IGNORE)
    return tmp_path


def of_dvc(project: Path, *names: str) -> dict[str, str]:
    from dvc.repo import Repo

    with Repo(project) as repo:
        added = repo.add([str(project / name) for name in names])
        return {Path(out.fspath).name: out.hash_info.value for stage in added for out in stage.outs}


def fill(folder: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/é ü.bin", "sub/deep/x", "sub.txt", "a/1", "a-b/2", "empty"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"" if name == "empty" else name.encode() * 1000)
    (folder / "no files").mkdir()


def test_files_and_folders_have_the_md5_of_dvc(project):
    (project / "file").write_bytes(os.urandom(5_000_000))
    (project / "nothing").touch()
    fill(project / "folder")
    digests = Digests(project / "memo.sqlite")
    ours = {name: digests.of(project / name) for name in ("file", "nothing", "folder")}
    assert ours == of_dvc(project, *ours)
    assert ours["folder"].endswith(".dir")


def test_what_dvc_ignores_is_left_out(project):
    fill(project / "folder")
    digests = Digests(project / "memo.sqlite")
    before = digests.of(project / "folder")
    for name in (
        "__pycache__/any",
        "sub/m.pyc",
        ".out.partial/half",
        "sub/.x.123.partial",
        "sub/.gitignore",
    ):
        path = project / "folder" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert digests.of(project / "folder") == before == of_dvc(project, "folder")["folder"]
    (project / "folder" / "sub" / "visible.partial").write_text("a file of the user, which DVC sees")
    assert digests.of(project / "folder") == of_dvc(project, "folder")["folder"] != before


def test_nothing_has_no_digest(tmp_path):
    assert Digests(tmp_path / "memo.sqlite").of(tmp_path / "none") is None


@pytest.mark.parametrize("target", ["file", "folder"])
def test_a_change_in_place_changes_the_digest(target, tmp_path):
    (tmp_path / "folder").mkdir()
    path = tmp_path / ("file" if target == "file" else "folder/file")
    path.write_text("one")
    digests = Digests(tmp_path / "memo.sqlite")
    before = digests.of(tmp_path / target)
    stat = path.stat()
    with open(path, "r+") as file:  # the same inode, the same size
        file.write("two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert digests.of(tmp_path / target) != before
    path.write_text("one")
    assert digests.of(tmp_path / target) == before


def test_names_and_moves_change_a_folder_but_copies_do_not(tmp_path):
    fill(tmp_path / "a")
    fill(tmp_path / "b")
    digests = Digests(tmp_path / "memo.sqlite")
    assert digests.of(tmp_path / "a") == digests.of(tmp_path / "b")
    (tmp_path / "b" / "a.txt").rename(tmp_path / "b" / "c.txt")
    assert digests.of(tmp_path / "a") != digests.of(tmp_path / "b")


def test_a_change_behind_the_modification_time_is_seen(tmp_path):
    path = tmp_path / "file"
    path.write_text("one")
    digests = Digests(tmp_path / "memo.sqlite")
    before, stat = digests.of(path), path.stat()
    path.write_text("two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert digests.of(path) != before


def test_the_next_process_reads_no_file_again(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("one")
    before = Digests(tmp_path / "memo.sqlite").of(path)
    monkeypatch.setattr("mergeline.tasks.digests.open", None, raising=False)
    assert Digests(tmp_path / "memo.sqlite").of(path) == before
