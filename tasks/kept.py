"""The files of registered versions: `.mergeline/models/REGISTRY/MD5`, where no run writes.

They are hard links to the files of the merge, which costs no disk: whatever writes a merge again writes new files under
the old names. A folder goes by DVC's digest of it, so that DVC's cache and remote have it, too.
"""

from __future__ import annotations

import re
from pathlib import Path
from stat import S_IMODE, S_IWGRP, S_IWOTH, S_IWUSR
from typing import Callable, Iterator

from mergeline.merging.errors import UserError
from mergeline.merging.files import link_or_copy, make_folder, publish, staged
from mergeline.tasks import dvc_objects
from mergeline.tasks.digests import Digests, files_of

KEPT = Path(".mergeline/models")

_WRITABLE = S_IWUSR | S_IWGRP | S_IWOTH

Say = Callable[[str], object]  # takes a sentence about what is done


def silent(_: str) -> None:
    """Say nothing."""


def place_of(registry: str, md5: str) -> Path:
    """Where the files of a version lie, seen from the workspace. md5: DVC's digest, `...dir`.

    Raises:
        UserError: it is none; the registry may hold anything.
    """
    if not re.fullmatch(r"[0-9a-f]{32}\.dir", md5):
        raise UserError(f"'{md5}' is no digest of DVC's of a folder; correct the version's tag in MLflow")
    return KEPT / registry / md5.removesuffix(".dir")


def keep(root: Path, source: Path, registry: str, digests: Digests, push: bool, say: Say) -> str:
    """Keep the files of a merge, and bring them to DVC's default remote, if there is one; returns their digest.

    registry: whose versions they are (`tracking.registry_name`). push: whether they go to the remote.

    Raises:
        UserError: there is no space, or the remote cannot be written.
    """
    md5 = digests.of(source)
    assert md5 is not None, source
    place = root / place_of(registry, md5)
    if digests.of(place) != md5:
        make_folder(place.parent)
        with staged(place) as out:
            linked = _copy(source, out)
            if digests.of(out) != md5:
                raise UserError(f"{source}: changed while its files were kept; run again")
            publish(out, place)
        how = "by hard link" if linked else "as a copy, for they cannot be linked there"
        say(f"kept the files of {source.name} {how}: {_size(place)} in {place_of(registry, md5)}")
    if push and (remote := dvc_objects.push(root, place, digests)):
        say(f"{remote} has them, too")
    return md5


def bring_back(root: Path, md5: str, registry: str, digests: Digests, say: Say) -> Path | None:
    """The folder with the files of a version, seen from the workspace; None where they are nowhere.

    They are looked for where they were kept, among the merges, in DVC's cache and in its default remote.

    Raises:
        UserError: the remote does not answer.
    """
    place = root / place_of(registry, md5)
    if digests.of(place) == md5:
        return place_of(registry, md5)
    if place.exists():
        say(f"{place_of(registry, md5)} was changed, and is made anew")
    for merge in sorted((root / "build" / "merges").glob("*")):
        if digests.of(merge) == md5:
            keep(root, merge, registry, digests, False, say)
            return place_of(registry, md5)
    make_folder(place.parent)
    with staged(place) as out:
        found = dvc_objects.bring(root, md5, out, digests)
        if found is None:
            return None
        publish(out, place)
    say(f"brought the files back from {found}: {_size(place)} in {place_of(registry, md5)}")
    return place_of(registry, md5)


def file_problem(root: Path, files: Path, digest: str) -> str:
    """Why the weights in `files`, seen from the workspace, are not those of a digest, or ""."""
    from mergeline.merging.checkpoints.checkpoint import open_checkpoint

    try:
        found = open_checkpoint(root / files).digest()
    except UserError as error:
        return f"The checkpoint does not open: {error}."
    return "" if found == digest else f"The files in {files} have the digest {found}, not {digest}."


def kept_versions(root: Path) -> Iterator[tuple[str, str, Path]]:
    """Of everything that is kept: the registry, DVC's digest, and the folder."""
    for folder in sorted((root / KEPT).glob("*/*")):
        if not folder.name.startswith("."):
            yield folder.parent.name, f"{folder.name}.dir", folder


def _copy(source: Path, out: Path) -> bool:
    """Put the files of a folder into another, to be read alone as in DVC's cache; whether all could be linked."""
    linked = []
    for file in files_of(source):
        target = out / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        linked.append(link_or_copy(file, target))
        if (mode := target.stat().st_mode) & _WRITABLE:
            target.chmod(S_IMODE(mode) & ~_WRITABLE)
    return all(linked)


def _size(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in files_of(folder)) / 1e6:.1f} MB"
