"""What gc, and the end of a run, removes of `.mergeline`, and what it leaves."""

from __future__ import annotations

import fcntl
import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
from checkpoints import another_process, random_state
from safetensors.torch import save_file

from mergeline.flows import retention
from mergeline.flows.cli import values
from mergeline.flows.retention import removable, remove
from mergeline.tasks.fetch import local_checkpoint
from mergeline.tasks.places import user_cache
from mergeline.tasks.workspace import Workspace

DAY = 86400.0
FACTORS = ".mergeline/factors/ab/cd.factors"
EVALUATION = ".mergeline/evaluations/ab/cd.safetensors"
DOWNLOAD = ".mergeline/downloads/digits-0123/x.part"
RESULT = ".mergeline/prefect/storage/0123"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache: none of the tests may clean that of whoever runs them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mergeline"


def put(root: Path, name: str, days: float = 0.0, size: int = 10) -> Path:
    """A file that was last used some days ago."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (time.time() - days * DAY,) * 2)
    return path


def clean(root: Path, days: float = 30, size: int = 10**9) -> None:
    remove(removable(Workspace(root / "params.yaml"), timedelta(days=days), size))


def test_what_was_not_used_for_long_goes(tmp_path):
    for kind in (FACTORS, EVALUATION, DOWNLOAD, RESULT):
        old, new = (
            put(tmp_path, f"{kind}", 31),
            put(tmp_path, kind.replace("0123", "9").replace("ab/", "ac/"), 29),
        )
        clean(tmp_path)
        assert (old.exists(), new.exists()) == (False, True), kind


def test_what_is_too_much_goes_the_oldest_first(tmp_path):
    files = [put(tmp_path, f".mergeline/factors/ab/{days}.factors", days, size=100) for days in (3, 1, 2)]
    download = put(tmp_path, DOWNLOAD, 4, size=100)
    clean(tmp_path, size=250)
    assert [path.exists() for path in (*files, download)] == [False, True, True, False]


def test_what_is_needed_is_never_touched(tmp_path):
    names = [
        "params.yaml", "dvc.lock", "build/merges/cart/model.safetensors", ".mergeline/mlflow.db",
        ".mergeline/mlartifacts/1/.x.partial", ".mergeline/models/0123/model.safetensors", ".mergeline/verdict.json",
        ".mergeline/prefect/prefect.db", ".mergeline/run.lock", ".dvc/cache/files/md5/ab/cd",
    ]  # fmt: skip
    files = [put(tmp_path, name, days=400) for name in names]
    clean(tmp_path, days=1, size=0)
    assert all(path.exists() for path in files)


def test_a_used_factor_is_kept(tmp_path):
    import torch

    from mergeline.merging.engine.cache import FolderStore

    store = FolderStore(tmp_path / ".mergeline" / "factors")
    for key in ("used", "unused"):
        store.recall(key, lambda: {"u": torch.ones(2)})
    for file in store.folder.glob("*/*"):
        os.utime(file, (time.time() - 40 * DAY,) * 2)
    store.recall("used", lambda: pytest.fail("it is stored"))
    clean(tmp_path)
    assert len(list(store.folder.glob("*/*"))) == 1
    store.recall("used", lambda: pytest.fail("it is kept"))


def test_leftovers_of_killed_runs_go_and_those_in_use_stay(tmp_path):
    dead = [
        put(tmp_path, "build/.extract.partial/description.json").parent,
        put(tmp_path, "build/merges/.cart.partial/model.safetensors").parent,
        put(tmp_path, ".mergeline/scratch/.search@cart.partial/0/model.safetensors").parents[1],
        put(tmp_path, ".mergeline/factors/ab/.cd.factors.1.2.partial", days=1),
        put(tmp_path, ".mergeline/evaluations/ab/.cd.safetensors.1.2.partial", days=1),
        put(tmp_path, ".mergeline/.mlflow.db.partial-journal", days=1),
    ]
    written = put(tmp_path, ".mergeline/factors/ab/.ef.factors.1.2.partial")
    locked = put(tmp_path, "build/merges/.ties.partial/model.safetensors").parent
    handle = os.open(locked, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    clean(tmp_path)
    os.close(handle)
    assert not any(path.exists() for path in dead)
    assert written.exists() and locked.exists()


def test_a_link_goes_and_what_it_leads_to_stays(tmp_path):
    target = put(tmp_path, "elsewhere/thesis.tex", days=400)
    (tmp_path / "build").mkdir()
    link = tmp_path / "build" / ".x.partial"
    link.symlink_to(target.parent)
    os.utime(link, (0, 0), follow_symlinks=False)
    clean(tmp_path, days=1, size=0)
    assert target.exists() and not link.is_symlink()


def test_gc_says_what_it_removes_and_a_dry_run_removes_nothing(workspace, mergeline):
    old = put(workspace, FACTORS, 3, size=3 << 10)
    options = ("gc", "--params", workspace / "params.yaml", "--older-than", "2d")
    assert mergeline(*options, "--dry-run") == (0, "would remove factors: 1, 3 KiB\n", "")
    assert old.exists()
    assert mergeline(*options) == (0, "removed factors: 1, 3 KiB\n", "")
    assert not old.exists()
    assert mergeline(*options) == (0, "nothing to remove\n", "")


def test_params_yaml_says_how_long_and_how_much(workspace, mergeline):
    with open(workspace / "params.yaml", "a") as file:
        file.write("retention: {days: 2, gigabytes: 0.000001}\n")
    old, large, small = (
        put(workspace, f".mergeline/factors/ab/{name}.factors", days, size)
        for name, days, size in (("old", 3, 1), ("large", 1, 2000), ("small", 0, 1))
    )
    assert mergeline("gc", "--params", workspace / "params.yaml").out == "removed factors: 2, 1.954 KiB\n"
    assert small.exists() and not old.exists() and not large.exists()


def test_all_that_may_go_is_counted_together(workspace, cache, mergeline, monkeypatch):
    """Were each kind counted for itself, nothing here would be too much."""
    monkeypatch.setattr(retention, "_clean_database", lambda *_: (1000, []))  # what stands there is none
    download = put(cache, "downloads/0123-4567/x.part", 4, size=1000)
    checkpoint = put(cache, "checkpoints/0123/model.safetensors", 3, size=1000)
    factors = put(workspace, FACTORS, 2, size=1000)
    database = put(workspace, ".mergeline/prefect/prefect.db", size=1000)
    said = mergeline("gc", "--params", workspace / "params.yaml", "--max-size", "2500B", "--dry-run")
    assert said.out == (
        f"would remove unfinished downloads of {cache}: 1, 1000 B\nwould remove checkpoints of {cache}: 1, 1000 B\n"
    )
    kept = removable(Workspace(workspace / "params.yaml"), timedelta(days=30), 1500)
    assert [entry.path for entry in kept] == [factors]
    assert all(path.exists() for path in (download, checkpoint, factors, database))


@pytest.mark.parametrize("there", [True, False])
def test_gc_retires_the_users_cache_with_and_without_a_workspace(
    there, workspace, cache, mergeline, monkeypatch
):
    monkeypatch.chdir(workspace if there else workspace.parent)
    old, new = (put(cache, f"checkpoints/{name}/x", days) for name, days in (("old", 31), ("new", 29)))
    left = put(cache, "checkpoints/.dead.partial/out/x").parents[1]
    assert mergeline("gc", "--dry-run").out.count("would remove") == 2 and old.exists()
    assert (
        mergeline("gc").out
        == f"removed leftovers of killed runs: 1, 10 B\nremoved checkpoints of {cache}: 1, 10 B\n"
    )
    assert (old.exists(), new.exists(), left.exists()) == (False, True, False)


def test_gc_retires_headers_of_remote_checkpoints(tmp_path, cache, mergeline, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old, new = (put(cache, f"headers/{name}/remote.json", days) for name, days in (("old", 31), ("new", 29)))
    assert mergeline("gc").out == f"removed headers of checkpoints of {cache}: 1, 10 B\n"
    assert (old.exists(), new.exists()) == (False, True)


def test_no_run_cleans_the_users_cache(tmp_path, cache):
    old = put(cache, "checkpoints/0123/model.safetensors", 400)
    clean(tmp_path, size=0)
    assert old.exists()


def test_what_a_process_reads_or_brings_into_the_users_cache_stays(cache, mergeline, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    read = put(cache, "checkpoints/read/model.safetensors", 400)
    part = put(cache, "downloads/brought-4567/x.part", 400)
    staging = put(cache, "checkpoints/.brought.partial/out/x").parents[1]
    handles = [os.open(folder, os.O_RDONLY) for folder in (read.parent, staging)]
    for handle in handles:
        fcntl.flock(handle, fcntl.LOCK_SH)
    assert mergeline("gc", "--max-size", "0").out == "nothing to remove\n"
    for handle in handles:
        os.close(handle)
    mergeline("gc", "--max-size", "0")
    assert not any(path.exists() for path in (read, part, staging))


def test_what_local_checkpoint_gave_is_held_and_marked_as_used(tmp_path, cache, mergeline, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(random_state(0), tmp_path / "a.safetensors")
    given = local_checkpoint(f"file://{tmp_path}/a.safetensors")
    for file in given.iterdir():
        os.utime(file, (0, 0))
    assert mergeline("gc", "--max-size", "0").out == "nothing to remove\n"
    assert local_checkpoint(f"file://{tmp_path}/a.safetensors") == given
    assert max(file.stat().st_mtime for file in given.iterdir()) > time.time() - DAY


def test_the_users_cache_is_its_owners_alone(tmp_path, cache):
    save_file(random_state(0), tmp_path / "a.safetensors")
    cache.mkdir(parents=True, mode=0o777)
    before = os.umask(0)
    try:
        local_checkpoint(f"file://{tmp_path}/a.safetensors")
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    modes = {path.relative_to(cache): path.stat().st_mode & 0o777 for path in (cache, *cache.rglob("*"))}
    assert len(modes) > 3
    assert all(mode == (0o700 if (cache / path).is_dir() else 0o600) for path, mode in modes.items()), modes


@pytest.mark.parametrize("named", ["", "relative/cache"])
def test_a_cache_that_is_named_by_no_absolute_path_is_the_usual_one(named, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache() == tmp_path / ".cache" / "mergeline"


@pytest.mark.parametrize("content", [b"no database" * 100, b"", b"SQLite format 3\0" + bytes(4080)])
@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_damaged_database_is_refused_in_a_line_and_nothing_goes(content, options, workspace, mergeline):
    old = put(workspace, FACTORS, 400)
    database = put(workspace, ".mergeline/prefect/prefect.db")
    database.write_bytes(content)
    outcome = mergeline("gc", "--params", workspace / "params.yaml", *options)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "prefect.db: Prefect's database cannot be cleaned (" in outcome.err and "remove it" in outcome.err
    assert old.exists() and database.read_bytes() == content


def test_gc_waits_for_no_run(workspace, mergeline):
    (workspace / ".mergeline").mkdir()
    old = put(workspace, FACTORS, 400)
    with another_process("FileLock(path)", workspace / ".mergeline" / "run.lock"):
        outcome = mergeline("gc", "--params", workspace / "params.yaml")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1) and "another run is using" in outcome.err
    assert old.exists()


@pytest.mark.parametrize(("text", "hours"), [("90m", 1.5), ("12h", 12), ("30d", 720)])
def test_ages(text, hours):
    assert values.age(text) == timedelta(hours=hours)


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "1w", "1.5d", "1d2h", "9999999d"])
def test_what_is_no_age_is_refused(text, mergeline):
    outcome = mergeline("gc", f"--older-than={text}")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1) and "write 90m, 12h or 30d" in outcome.err
