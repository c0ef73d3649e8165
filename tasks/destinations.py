"""Where a folder is exported to: another folder, a place that fsspec knows (s3:// ...), a repository of the Hub."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from mergeline.merging.engine.places import refuse_place
from mergeline.merging.errors import UserError
from mergeline.merging.files import publish, staged
from mergeline.tasks.credentials import scrubbed, without_credentials
from mergeline.tasks.digests import files_of
from mergeline.tasks.extras import missing

_LAST = "manifest.json"  # where it is, all else is


def refuse_destination(to: str, inputs: list[Path], force: bool) -> None:
    """Say before anything is made what is wrong with a destination.

    Raises:
        UserError: it is malformed, or holds what is no earlier export and `force` is not given.
    """
    if to.startswith("hf://"):
        _repository(to)
    elif "://" not in to:
        refuse_place(Path(to), inputs, "merge", force)
    elif not force:
        with _told(to):
            fs, path = _opened(to)
            if fs.exists(path) and fs.ls(path) and not fs.exists(f"{path}/{_LAST}"):
                raise UserError(
                    f"{without_credentials(to)}: is no earlier export; choose another place, or --force"
                )


def send(folder: Path, to: str, message: str, private: bool) -> str:
    """Copy or upload a folder; what it can be opened by then.

    message: of the commit on the Hub. private: whether a repository that is made there is.

    Raises:
        UserError: it cannot be written.
    """
    if to.startswith("hf://"):
        return _push(folder, _repository(to), message, private)
    if "://" not in to:
        out = Path(to)
        with staged(out) as place:
            shutil.copytree(folder, place, dirs_exist_ok=True, copy_function=shutil.copyfile)
            publish(place, out)
        return to
    with _told(to):
        fs, path = _opened(to)
        files = sorted(files_of(folder), key=lambda file: (file.name == _LAST, file))
        for file in files:
            target = f"{path}/{file.relative_to(folder).as_posix()}"
            fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            fs.put_file(str(file), target)
    return without_credentials(to)


def _opened(uri: str) -> tuple[Any, str]:
    import fsspec

    fs, path = fsspec.core.url_to_fs(uri)
    fs.invalidate_cache()
    return fs, path.rstrip("/")


@contextmanager
def _told(uri: str) -> Iterator[None]:
    """Every file system brings exceptions of its own: all are taken, with their type and text."""
    where = without_credentials(uri)
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{where}: {missing(error.__cause__) or scrubbed(str(error))}") from None
    except Exception as error:
        said = scrubbed(" ".join(str(error).split())[:300])
        raise UserError(f"{where}: cannot be written ({type(error).__name__}: {said})") from None


def _repository(uri: str) -> str:
    if not (found := re.fullmatch(r"hf://([\w.-]+/[\w.-]+)/?", uri)):
        raise UserError(f"{without_credentials(uri)}: write hf://org/name")
    return found[1]


def _push(folder: Path, repository: str, message: str, private: bool) -> str:
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"hf://{repository}: HF_HUB_OFFLINE is set; unset it, or name a folder")
    if get_token() is None:
        raise UserError(f"hf://{repository}: there is no token; set HF_TOKEN, or run `hf auth login`")
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or constants.ENDPOINT)
    with _told(f"hf://{repository}"):
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message=message)
    return f"hf://{repository}@{commit.oid}"
