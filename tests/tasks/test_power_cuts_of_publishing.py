"""A power cut while results are published: what MLflow, the registry and files say is true, and it goes on."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from judged_workspace import TASKS, JudgedWorkspace
from made_up_results import made_up
from power_cuts import Recording, recorded, write_tree

from mergeline.merging.files import read_object, write_json
from mergeline.tasks import tracking
from mergeline.tasks.evaluate import PREDICTIONS, SCORES
from mergeline.tasks.leaderboard import LEADERBOARD
from mergeline.tasks.places import REPORT
from mergeline.tasks.publication import is_published
from mergeline.tasks.publish import publish
from mergeline.tasks.register import register
from mergeline.tasks.workspace import Workspace

pytestmark = pytest.mark.slow

HITS = [{"digits": 200, "shapes": 220}, {"digits": 260, "shapes": 280}]
STATE = tracking.STATE
DATABASES = (f"{STATE}/mlflow.db", f"{STATE}/digests.sqlite")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every test's own database; the current folder is put back."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def root(tmp_path: Path, mlflow_database) -> Path:
    """A workspace whose steps have run and that nobody has published."""
    made = tmp_path / "place"
    made.mkdir()
    JudgedWorkspace(made).write_params()
    judge(made, HITS[0])
    mlflow_database(made)
    return made


def judge(root: Path, hits: dict[str, int]) -> None:
    """Let the workspace's one merge have these results."""
    judged = JudgedWorkspace(root)
    judged.add("ties", hits)
    [digest] = [row["digest"] for row in read_object(root / LEADERBOARD)["rows"] if row["kind"] == "merge"]
    results = made_up(tasks=TASKS, merges=("ties",))
    board = results["leaderboard"] | {"modality": "clip", "measure": "accuracy"}
    mean = sum(hits.values()) / 800
    board["rows"][-1] |= {"digest": digest, "mean": mean, "lower": mean, "upper": mean, "val_mean": mean}
    write_json(root / LEADERBOARD, board)
    write_json(root / "build/search/ties.json", results["searches"]["ties"])
    write_json(root / "build/extract/description.json", results["description"])


def published(root: Path) -> None:
    os.chdir(root)
    publish(Workspace(root / "params.yaml"))


def registered(root: Path) -> None:
    register(root, Workspace(root / "params.yaml").raw)


WRITES = pytest.mark.parametrize("write", [registered, published])


def record(write: Any, root: Path) -> Recording:
    with recorded(root, databases=[root / name for name in DATABASES]) as recording:
        write(root)
    return recording


def finished_runs(root: Path) -> Iterator[tuple[str, Path]]:
    """The name of each run that MLflow shows as finished, and where its files lie."""
    query = "select name, run_uuid from runs where status = 'FINISHED' and lifecycle_stage = 'active'"
    with closing(sqlite3.connect(f"file:{root}/{STATE}/mlflow.db?mode=ro", uri=True)) as database:
        for name, run_id in database.execute(query):
            yield name, root / STATE / "mlartifacts" / run_id / "artifacts"


def champions(root: Path) -> list[str]:
    """The digests of the versions that are champion."""
    query = """
        select value from model_version_tags t join registered_model_aliases a
        on a.name = t.name and a.version = t.version where a.alias = 'champion' and t.key = 'lineage.model'
    """
    with closing(sqlite3.connect(f"file:{root}/{STATE}/mlflow.db?mode=ro", uri=True)) as database:
        return [value for (value,) in database.execute(query)]


def results(root: Path) -> dict[str, bytes]:
    """What a run of the merge has in MLflow."""
    folder = root / "build/evaluations/ties"
    return {name: (folder / name).read_bytes() for name in (SCORES, PREDICTIONS)} | {
        "ties.json": (root / "build/search/ties.json").read_bytes()
    }


def files_of(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and ".partial" not in str(path))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def small_files(root: Path) -> dict[str, Any]:
    """What publishing leaves outside of MLflow: each as bytes, a kept run as its files."""
    names = [f"{STATE}/verdict.json", f"{STATE}/published.json", str(REPORT)]
    found: dict[str, Any] = {n: (root / n).read_bytes() for n in names if (root / n).exists()}
    kept = {name: files_of(root / STATE / "runs" / name) for name in ("current", "before")}
    return found | {name: files for name, files in kept.items() if files}


@WRITES
@pytest.mark.parametrize("again", [False, True], ids=["the first", "the next"])
def test_what_a_cut_leaves_is_true(write, again, root, tmp_path):
    """A finished run has its files, the champion is a version that passed, every file is the old or the new, whole."""
    old, expected = {}, [results(root)]
    if again:
        write(root)
        old = small_files(root)
        judge(root, HITS[1])
        expected.append(results(root))
    before = champions(root)
    recording = record(write, root)
    new, after = small_files(root), champions(root)
    assert new != old and after != before and len(after) == 1
    states = list(recording.states())
    assert len(states) > 100
    cut = tmp_path / "cut"
    for state in states:
        write_tree(state, cut)
        for name, place in finished_runs(cut):
            if name == "ties":
                assert files_of(place) in expected
        assert champions(cut) in (before, after)
        for name, what in small_files(cut).items():
            assert what in (old.get(name), new.get(name)), name
        shutil.rmtree(cut)
    for state in recording.states(first=len(recording.changes)):  # what was done stays
        write_tree(state, cut)
        assert small_files(cut) == new and champions(cut) == after
        shutil.rmtree(cut)


def disconnect(root: Path) -> None:
    """MLflow keeps its database open, which is to be another file."""
    client = tracking.connect(root)
    for store in (client._tracking_client.store, client._get_registry_client().store):
        store.engine.dispose()


@WRITES
def test_what_a_cut_leaves_is_gone_on_with(write, root):
    write(root)
    judge(root, HITS[1])
    recording = record(write, root)
    after = champions(root)
    states = list(recording.states())
    for state in states[:: len(states) // 12]:
        disconnect(root)
        os.chdir(root.parent)
        shutil.rmtree(root)
        write_tree(state, root)  # there, for MLflow's database knows where files lie
        (root / STATE).chmod(0o700)
        write(root)
        verdict = read_object(root / STATE / "verdict.json")  # which made it champion, or found it so
        assert verdict["passed"] and verdict["champion_after"] == "2" and champions(root) == after
        merges = [files_of(place) for name, place in finished_runs(root) if name == "ties"]
        assert len(merges) == 2 and results(root) in merges
        assert write is registered or is_published(Workspace(root / "params.yaml"))


def test_a_database_that_was_made_stays(root):
    (root / STATE / "mlflow.db").unlink()
    names = [root / STATE / name for name in ("mlflow.db", ".mlflow.db.partial")]
    with recorded(root, databases=names) as recording:
        tracking.connect(root)
    for state in recording.states(first=len(recording.changes)):
        assert state[STATE]["mlflow.db"] == names[0].read_bytes()


def test_sqlite_waits_for_the_disk(root):
    """What the others take for granted: a transaction that was committed is on the disk."""
    from sqlalchemy import text

    client = tracking.connect(root)
    with client._tracking_client.store.engine.connect() as connection:
        assert connection.execute(text("pragma journal_mode")).scalar() == "delete"
        assert connection.execute(text("pragma synchronous")).scalar() == 2  # FULL
