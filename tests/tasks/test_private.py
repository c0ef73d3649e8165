"""Folders and files for their owner alone, whatever the umask."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mergeline.tasks.private import open_private, private_folder, write_private_json
from mergeline.tasks.workspace import Workspace


@pytest.fixture(autouse=True)
def generous_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_private_folder_is_made_or_closed(tmp_path):
    assert mode(private_folder(tmp_path / "new")) == 0o700
    (tmp_path / "old").mkdir()
    assert mode(tmp_path / "old") == 0o777
    assert mode(private_folder(tmp_path / "old")) == 0o700


def test_a_private_file_takes_the_place_of_an_open_one(tmp_path):
    file = tmp_path / "log"
    file.write_text("old")
    with open_private(file) as log:
        log.write("new")
    assert (mode(file), file.read_text()) == (0o600, "new")


def test_private_json_is_whole_and_private(tmp_path):
    write_private_json(tmp_path / "x.json", {"login": "a:b"})
    assert (mode(tmp_path / "x.json"), json.loads((tmp_path / "x.json").read_text())) == (
        0o600,
        {"login": "a:b"},
    )
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_what_a_workspace_keeps_is_closed_to_others(workspace):
    with Workspace(workspace / "params.yaml").lock():
        assert mode(workspace / ".mergeline") == 0o700
    (workspace / ".mergeline").chmod(0o755)
    _ = Workspace(workspace / "params.yaml").digests
    assert mode(workspace / ".mergeline") == 0o700
