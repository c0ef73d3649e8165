"""Folders in DVC's cache and remote, by their digest alone: without git, dvc.lock, or an output of that name.

DVC keeps a folder as its files, each under the MD5 of its content, and a list of these, under the folder's digest.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import contextmanager
from hashlib import md5
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Iterator, NamedTuple

from mergeline.merging.errors import UserError
from mergeline.merging.files import empty, link_or_copy
from mergeline.tasks.credentials import scrubbed
from mergeline.tasks.digests import folder_list

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc_data.hashfile.db import HashFileDB

    from mergeline.tasks.digests import Digests


_CACHE = "DVC's cache"


class _Place(NamedTuple):
    """Where DVC keeps files: what it is called, and what reads it."""

    name: str
    files: HashFileDB


def bring(root: Path, digest: str, out: Path, digests: Digests) -> str | None:
    """Put the files of a folder of this digest (`...dir`) into the empty folder `out`; says from where.

    From DVC's cache they come by hard link. None, and nothing in `out`, where they are not kept, or not whole.

    Raises:
        UserError: the remote does not answer, or what it keeps is no folder's list.
    """
    with _opened(root) as repo:
        for place in _places(repo):
            with _told(place.name):
                try:
                    _bring(place, digest, out)
                except FileNotFoundError:  # `dvc gc` has removed some
                    pass
            if digests.of(out) == digest:
                return place.name
            empty(out)
    return None


def _bring(place: _Place, digest: str, out: Path) -> None:
    fs = place.files.fs
    for name, key in _entries(fs.cat_file(place.files.oid_to_path(digest)), digest, place.name):
        target, kept = out / name, place.files.oid_to_path(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        if place.name == _CACHE:
            link_or_copy(Path(kept), target)
        else:
            fs.get_file(kept, str(target))


def push(root: Path, folder: Path, digests: Digests) -> str | None:
    """Bring a folder to DVC's default remote, if there is one; says which.

    Raises:
        UserError: it cannot be written.
    """
    from dvc_objects.fs.local import localfs

    with _opened(root) as repo:
        for place in _places(repo):
            if place.name == _CACHE:
                continue
            entries = digests.entries(folder)
            listing = folder_list(entries)
            with _told(place.name):
                for entry in entries:
                    if not place.files.exists(entry["md5"]):
                        place.files.add(str(folder / entry["relpath"]), localfs, entry["md5"])
                if not place.files.exists(key := f"{md5(listing).hexdigest()}.dir"):
                    place.files.add_bytes(key, listing)  # last: where it is, all files are
            return place.name
    return None


@contextmanager
def _opened(root: Path) -> Iterator[Repo | None]:
    """DVC's repository of a workspace; None where there is none."""
    os.environ["DVC_NO_ANALYTICS"] = "1"  # before DVC is imported
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    try:
        repo = Repo(str(root))
    except NotDvcRepoError:
        yield None
        return
    try:
        yield repo
    finally:
        repo.close()


def _places(repo: Repo | None) -> Iterator[_Place]:
    """DVC's cache, and its default remote if there is one (raises UserError if it cannot be opened)."""
    from dvc.config import NoRemoteError

    if repo is None:
        return
    yield _Place(_CACHE, repo.cache.local)
    try:
        with _told("DVC's remote"):
            remote = repo.cloud.get_remote()
            if remote.fs.version_aware or remote.worktree:  # these keep no files by digest
                return
    except NoRemoteError:
        return
    yield _Place(f"DVC's remote '{remote.name}'", remote.odb)


@contextmanager
def _told(place: str) -> Iterator[None]:
    """Turn what a place of DVC's says of itself into one line: every kind of store brings exceptions of its own."""
    from dvc.config import NoRemoteError

    try:
        yield
    except (NoRemoteError, UserError):
        raise
    except Exception as error:
        said = scrubbed(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise UserError(f"{place} cannot be used ({said}); see `dvc remote list` and .dvc/config") from None


def _entries(listing: bytes, digest: str, place: str) -> list[tuple[str, str]]:
    """Names inside the folder, and the digests of their files, as a list of DVC's says.

    Raises:
        UserError: it is not the list of this digest, or names files elsewhere.
    """
    if f"{md5(listing).hexdigest()}.dir" != digest:
        raise UserError(f"{place}: the list of {digest} is damaged; remove it there, and push again")
    found = [(entry["relpath"], entry["md5"]) for entry in json.loads(listing)]
    for name, key in found:
        path = PurePosixPath(name)
        if (
            path.is_absolute()
            or ".." in path.parts
            or not path.parts
            or not re.fullmatch("[0-9a-f]{32}", key)
        ):
            raise UserError(f"{place}: {digest} names the file {name!r}, which lies outside of the folder")
    return found
