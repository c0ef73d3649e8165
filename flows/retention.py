"""What `.mergeline` and the user's cache keep so that later runs are quicker, how long, and how much of it.

Registered versions, MLflow's database and DVC's cache are no part of it: nothing that is removed here is missed, it is
only made, or brought, again. By hand alone the user's cache is cleaned, which is no workspace's, and what was kept of
versions that MLflow was told to delete.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import sqlite3
import time
from collections import defaultdict
from contextlib import closing, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Iterable, Iterator, NamedTuple

from mergeline.flows.cli import text
from mergeline.flows.server import announced_server, prefect_settings
from mergeline.merging.errors import UserError
from mergeline.merging.files import staged, staging_of
from mergeline.tasks import tracking
from mergeline.tasks.digests import files_of
from mergeline.tasks.kept import kept_versions
from mergeline.tasks.places import CACHED_CHECKPOINTS, CACHED_DOWNLOADS, CACHED_HEADERS, user_cache
from mergeline.tasks.registry import is_named
from mergeline.tasks.schema import Retention

if TYPE_CHECKING:
    from mergeline.tasks.workspace import Workspace

# What is kept until it was not used for long: what it is called, and its entries.
_CACHES = {
    "factors": "factors/*/*.factors",
    "evaluations": "evaluations/*/*.safetensors",
    "searches": "studies/*.jsonl",
    "unfinished downloads": "downloads/*",
    "results of Prefect's tasks": "prefect/storage/*",
}
_USER_CACHES = {
    "checkpoints": f"{CACHED_CHECKPOINTS}/*",
    "headers of checkpoints": f"{CACHED_HEADERS}/*",
    "unfinished downloads": f"{CACHED_DOWNLOADS}/*",
}
# Where processes that were killed leave `.NAME.partial`, seen from the workspace.
_STAGING = (
    "build", "build/*", "build/fits/*", "build/fits/*/*", ".mergeline", ".mergeline/costs", ".mergeline/evaluations/*",
    ".mergeline/factors/*",
    ".mergeline/figures", ".mergeline/models/*", ".mergeline/prefect", ".mergeline/runs", ".mergeline/scratch",
)  # fmt: skip
_LEFTOVERS = "leftovers of killed runs"
_WRITING_SECONDS = 3600  # a single file is written in less
_YOUNGEST = timedelta(
    seconds=3601
)  # flow runs that ended just now are kept; Prefect refuses an hour and less
_EVENTS = timedelta(days=7)


class Entry(NamedTuple):
    """A file or folder that may go. used: when it last was, in seconds since the epoch."""

    what: str
    path: Path
    bytes: int
    used: float


def clean(
    workspace: Workspace | None, older_than: timedelta | None, max_size: int | None, *, dry_run: bool
) -> Iterator[str]:
    """Remove, by hand, what was not used for `older_than`, and the rest down to `max_size`; says what, line by line.

    It counts all that may be removed together: files of the workspace's `.mergeline`, Prefect's database there, and the
    user's cache. Prefect's oldest runs go where its database alone is too much; then what was not used for longest.
    Without a workspace there is the user's cache alone.

    Raises:
        UserError: another run is using the workspace, or Prefect's database is damaged.
    """
    keep = workspace.params.retention if workspace else Retention()
    age = keep.age if older_than is None else older_than
    size = keep.bytes if max_size is None else max_size
    with workspace.lock() if workspace else nullcontext():
        database, said = _clean_database(workspace.state, age, size, dry_run) if workspace else (0, [])
        gone = [
            *_leftovers(user_cache() / kept for kept in (CACHED_CHECKPOINTS, CACHED_HEADERS)),
            *(_leftovers_of(workspace) if workspace else ()),
        ]
        kept = [*_cached_by_user(), *(_cached(workspace.state) if workspace else ())]
        gone += _too_old_or_much(kept, age, size - database)
        if workspace:
            deleted, told = _deleted_versions(workspace.root)
            gone += deleted
            said += told
        if not dry_run:
            remove(gone)
        would = "would remove" if dry_run else "removed"
        total: dict[str, list[int]] = defaultdict(list)
        for entry in gone:
            total[entry.what].append(entry.bytes)
        for what, sizes in total.items():
            yield f"{would} {what}: {len(sizes)}, {text.size(sum(sizes))}"
        yield from said


def _deleted_versions(root: Path) -> tuple[list[Entry], list[str]]:
    """What is kept for no version of the registry any more, and what is said of the rest.

    Raises:
        UserError: MLflow does not answer.
    """
    found, own = list(kept_versions(root)), tracking.registry_name(root)
    gone = []
    if any(name == own for name, _, _ in found):  # what others name is not known here
        client = tracking.connect(root)
        gone = [folder for name, md5, folder in found if name == own and not is_named(client, md5)]
    stays = [folder for _, _, folder in found if folder not in gone]
    files = {file.stat().st_ino: file.stat() for folder in stays for file in files_of(folder)}
    alone = sum(stat.st_size for stat in files.values() if stat.st_nlink == 1)
    total = text.size(sum(stat.st_size for stat in files.values()))
    said = f"left the files of registered versions: {len(stays)}, {total}, of which {text.size(alone)} lie nowhere else"
    return [_entry("files of deleted versions", folder) for folder in gone], [said] if stays else []


def removable(workspace: Workspace, age: timedelta, size: int) -> list[Entry]:
    """What killed runs have left, what was not used for `age`, and the oldest of the rest as far as it exceeds `size`
    together with Prefect's database; in the workspace alone.

    To be asked for with the workspace's lock.
    """
    left = size - _size_of_database(workspace.state)
    return [*_leftovers_of(workspace), *_too_old_or_much(_cached(workspace.state), age, left)]


def _too_old_or_much(entries: Iterable[Entry], age: timedelta, size: int) -> Iterator[Entry]:
    kept = sorted(entries, key=lambda entry: entry.used)
    total = sum(entry.bytes for entry in kept)
    oldest = time.time() - age.total_seconds()
    for entry in kept:
        if entry.used < oldest or total > size:
            yield entry
            total -= entry.bytes


def remove(entries: list[Entry]) -> None:
    """Remove them, whatever they are."""
    for entry in entries:
        is_folder = entry.path.is_dir() and not entry.path.is_symlink()
        shutil.rmtree(entry.path) if is_folder else entry.path.unlink(missing_ok=True)


def _cached(state: Path) -> Iterator[Entry]:
    for what, pattern in _CACHES.items():
        for path in state.glob(pattern):
            yield _entry(what, path)


def _cached_by_user() -> Iterator[Entry]:
    """The user's cache, without what a process that lives brings or reads."""
    cache = user_cache()
    for what, pattern in _USER_CACHES.items():
        for path in cache.glob(pattern):
            # A download belongs to the checkpoint that is being made of it.
            made = staging_of(cache / CACHED_CHECKPOINTS / path.name.rpartition("-")[0])
            held = made if what == "unfinished downloads" else path
            if not path.name.startswith(".") and not (held.exists() and _in_use(held)):
                yield _entry(f"{what} of {cache}", path)


def _leftovers_of(workspace: Workspace) -> Iterator[Entry]:
    return _leftovers(folder for place in _STAGING for folder in workspace.root.glob(place))


def _leftovers(folders: Iterable[Path]) -> Iterator[Entry]:
    for folder in folders:
        for path in folder.glob(".*.partial*"):
            if not _in_use(path):
                yield _entry(_LEFTOVERS, path)


def _entry(what: str, path: Path) -> Entry:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    stats = [file.lstat() for file in files] or [path.lstat()]
    used = max(max(stat.st_mtime, stat.st_atime) for stat in stats)
    return Entry(what, path, sum(stat.st_size for stat in stats) if files else 0, used)


def _in_use(path: Path) -> bool:
    """Whether a process that lives is writing: it holds a lock on a staging folder, and is quick with a file."""
    if not path.is_dir() or path.is_symlink():
        return time.time() - path.lstat().st_mtime < _WRITING_SECONDS
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _clean_database(state: Path, age: timedelta, size: int, dry_run: bool) -> tuple[int, list[str]]:
    """Remove flow runs that ended longer ago than `age` from the embedded server's database, more of a large one.

    The bytes that it has then, and what is said of it. A dry run does all of it to a copy.

    Raises:
        UserError: the database is damaged.
    """
    file = _database(state)
    before = _size_of(file)
    if not file.exists():
        return before, []
    if running := announced_server(state):
        return before, [f"left Prefect's database to the server that runs at {running.pages}"]
    with _readable(file), _copied(file) if dry_run else nullcontext(file) as cleaned:
        os.environ |= prefect_settings(cleaned, age)
        runs = _shrink(cleaned, age, size)
        after = _size_of(cleaned)
    freed = max(0, before - after)
    would = "would remove" if dry_run else "removed"
    return after, [f"{would} flow runs: {runs}, {text.size(freed)}"] if runs or freed else []


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Raises UserError where SQLite cannot work with a database, before the block or in it."""
    from sqlalchemy.exc import DatabaseError

    try:
        with _opened(file) as database:
            database.execute("select count(*) from flow_run").fetchone()
        yield
    except (sqlite3.DatabaseError, DatabaseError) as error:
        reason = str(getattr(error, "orig", error)).splitlines()[0]
        raise UserError(
            f"{file}: Prefect's database cannot be cleaned ({reason}); if it is damaged, remove it with what is named "
            "like it: the next run starts a new one, without the runs before"
        ) from None


@contextmanager
def _copied(file: Path) -> Iterator[Path]:
    """A copy of a database during the block, beside it."""
    with staged(file) as folder:
        copy = folder / file.name
        with _opened(file) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        yield copy


def _opened(file: Path) -> closing[sqlite3.Connection]:
    """A database, to be read."""
    return closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True))


def _shrink(file: Path, age: timedelta, size: int) -> int:
    """The number of flow runs that were removed until the database is no larger than `size`, or they are too young."""
    runs = 0
    while True:
        age = max(age, _YOUNGEST)
        runs += asyncio.run(_forget_runs(file, age))
        with closing(sqlite3.connect(file)) as database:
            database.execute("vacuum")
            database.execute("pragma wal_checkpoint(truncate)")
        if age == _YOUNGEST or _size_of(file) <= size:
            return runs
        age /= 4


def _database(state: Path) -> Path:
    return state / "prefect" / "prefect.db"


def _size_of_database(state: Path) -> int:
    """Of Prefect's database in a workspace."""
    return _size_of(_database(state))


def _size_of(database: Path) -> int:
    """With what is not yet written into it; not its index, which comes with whoever opens it."""
    files = (database, database.with_name(f"{database.name}-wal"))
    return sum(path.stat().st_size for path in files if path.exists())


async def _forget_runs(file: Path, age: timedelta) -> int:
    """The number of flow runs that ended before, which are removed with all that belongs to them."""
    import sqlalchemy as sa
    from prefect import settings
    from prefect.client.schemas.objects import StateType
    from prefect.server.database import provide_database_interface
    from prefect.server.services import db_vacuum
    from prefect.types._datetime import now

    oldest = now("UTC") - age
    own = {
        settings.PREFECT_API_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{file}",
        settings.PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD: age,
        settings.PREFECT_SERVER_EVENTS_RETENTION_PERIOD: min(age, _EVENTS),
    }
    with settings.temporary_settings(own):
        db = provide_database_interface()
        # The workspace is ours and no server runs: what is said to run was killed.
        running = db.FlowRun.state_type.in_([StateType.PENDING, StateType.RUNNING, StateType.CANCELLING])
        async with db.session_context(begin_transaction=True) as session:
            ended = sa.or_(db.FlowRun.end_time < oldest, sa.and_(running, db.FlowRun.start_time < oldest))
            runs = (
                await session.execute(sa.select(sa.func.count()).select_from(db.FlowRun).where(ended))
            ).scalar_one()
            crashed = {
                "state_type": StateType.CRASHED,
                "state_name": "Crashed",
                "end_time": db.FlowRun.start_time,
            }
            await session.execute(sa.update(db.FlowRun).where(running).values(crashed))
        await db_vacuum.vacuum_old_flow_runs(db=db)
        await db_vacuum.vacuum_old_events(db=db)
        await db_vacuum.vacuum_orphaned_logs(db=db)
        await db_vacuum.vacuum_orphaned_artifacts(db=db)
        await db_vacuum.vacuum_stale_artifact_collections(db=db)
        await (await db.engine()).dispose()
    return runs
