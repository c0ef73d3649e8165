"""Bringing the files of a version to MLflow's artifact store: by hard link where it is seen here, else by upload."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mergeline.merging.files import make_folder, remove, staged, sync, sync_tree
from mergeline.tasks.digests import files_of
from mergeline.tasks.kept import Say
from mergeline.tasks.serving.folder import MLMODEL, write_folder
from mergeline.tasks.tracking import STATE

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from mergeline.tasks.modality import Modality
    from mergeline.tasks.registry import Version
    from mergeline.tasks.serving.contract import Served


def is_loadable(client: MlflowClient, version: Version) -> bool:
    """Whether MLflow has the files of a version."""
    if place := _local(version.source):
        return (place / MLMODEL).is_file()
    return any(file.path == MLMODEL for file in client.list_logged_model_artifacts(version.model_id))


def is_seen(version: Version) -> bool:
    """Whether MLflow keeps the files of a version on this machine."""
    return _local(version.source) is not None


def make_loadable(
    client: MlflowClient,
    root: Path,
    version: Version,
    files: Path,
    modality: Modality,
    served: Served,
    most_bytes: int,
    say: Say,
) -> None:
    """Let MLflow load a version, `models:/NAME/VERSION`. root: of the workspace. files: the folder of the version's.

    most_bytes: that are uploaded. say: is told how many bytes, and how, before they are.
    """
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

    uri = f"models:/{version.model}/{version.version}"
    size = sum(file.stat().st_size for file in files_of(files))
    place = _local(version.source)
    if place is None and size > most_bytes:
        limit = "registry: upload_gigabytes in params.yaml"
        say(f"MLflow cannot load {uri}: its {size / 1e9:.2f} GB are more than {most_bytes / 1e9:g} ({limit})")
        return
    with staged(root / STATE / "scratch" / version.model_id) as scratch:
        folder = scratch / "folder"
        folder.mkdir()
        linked = write_folder(folder, scratch, files, modality, served)
        if place:
            say(f"MLflow loads {uri}: {size / 1e6:.1f} MB, {'hard links' if linked else 'a copy'} in {place}")
            _move(folder, place)
        else:
            say(f"MLflow loads {uri}: {size / 1e6:.1f} MB are uploaded to {version.source} ...")
            last = scratch / MLMODEL  # where it is, all else is
            os.rename(folder / MLMODEL, last)
            client.log_model_artifacts(version.model_id, str(folder))
            client.log_model_artifact(version.model_id, str(last))
    if MLFLOW_MODEL_IS_EXTERNAL in client.get_logged_model(version.model_id).tags:
        client.delete_logged_model_tag(version.model_id, MLFLOW_MODEL_IS_EXTERNAL)


def _local(source: str) -> Path | None:
    """The folder that a place of MLflow's is on this machine, if it is one."""
    from mlflow.utils.file_utils import local_file_uri_to_path

    if urlsplit(source).scheme not in ("", "file"):
        return None
    return Path(local_file_uri_to_path(source))


def _move(folder: Path, place: Path) -> None:
    """Give a folder its place, unless another publisher has put the same there."""
    make_folder(place.parent)
    sync_tree(folder)
    try:
        os.rename(folder, place)
    except OSError as error:
        if error.errno == errno.EXDEV:
            near = place.with_name(f".{place.name}.{os.urandom(4).hex()}.partial")
            try:
                shutil.copytree(folder, near)
                _move(near, place)
            finally:
                remove(near)
        elif error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    sync(place.parent)
