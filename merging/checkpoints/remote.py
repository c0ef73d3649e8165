"""Checkpoints whose headers alone are on this machine, while their data lies elsewhere.

A folder of headers holds of every file of weights its first bytes, as far as the header goes; whole what is looked at
beside them; and `remote.json`, which says where all of it is from and how large the files are there; so does each
sub-folder of a component with weights. Whoever reads on
where a header ends finds the end of the file, never zeros. Data is read by who was registered for the folder, which
whoever knows the source does (`mergeline.tasks.remote`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Iterable, Protocol

from mergeline.merging.errors import UserError
from mergeline.merging.files import read_object

REMOTE = "remote.json"
AHEAD_BYTES = 1 << 23  # that are held of a tensor which is read over the network from one end to the other


class Data(Protocol):
    """The data of a remote checkpoint."""

    def read_into(self, view: memoryview, file: str, start: int, tensor: tuple[int, int]) -> None:
        """Read the bytes of `file` from `start` on into all of a view; they lie in those [start, stop) of `tensor`.

        Raises:
            UserError: no access, the file is another one now, or still failing after some attempts.
        """

    def refuse_changed(self) -> None:
        """Raises UserError if the files are no longer what they were when their headers were read."""


_DATA: dict[Path, Data] = {}  # of the folders of headers that this process may read data for


def register(folder: Path, data: Data) -> None:
    """Let the data of a folder of headers be read from now on."""
    _DATA[folder.resolve()] = data


def is_remote(folder: Path) -> bool:
    """Whether a folder holds headers alone."""
    return (folder / REMOTE).is_file()


def remote_source(path: Path) -> str | None:
    """The URI that a folder of headers, or a file in it, stands for; None of other paths."""
    folder = path if path.is_dir() else path.parent
    source = read_object(folder / REMOTE).get("source") if is_remote(folder) else None
    return source if isinstance(source, str) else None


def true_size(file: Path, here: int) -> int:
    """The size of a file of weights where it is whole; `here` is what it has on this machine.

    Raises:
        UserError: the folder holds headers, and does not say it.
    """
    if not is_remote(file.parent):
        return here
    known = read_object(file.parent / REMOTE, mend="remove the folder").get("sizes")
    size = known.get(file.name) if isinstance(known, dict) else None
    if type(size) is not int:
        raise UserError(f"{file.parent / REMOTE}: does not say the size of '{file.name}'; remove the folder")
    return size


def data_of(file: Path) -> Data | None:
    """Who reads the data of a file of weights; None of a file that is here.

    Raises:
        UserError: its header alone is here, and nobody may read its data.
    """
    if not is_remote(file.parent):
        return None
    data = _DATA.get(file.parent.resolve())
    if data is None:
        raise headers_alone(remote_source(file) or str(file.parent))
    return data


def headers_alone(source: str) -> UserError:
    """Whoever asks for data of a checkpoint that may not be read is told so."""
    return UserError(
        f"{source}: its headers alone are here; fetch it, or read its data over the network with --no-cache"
    )


def refuse_changed_remotes(files: Iterable[Path]) -> None:
    """Raises UserError if one of the files that are registered is no longer what it was where it lies."""
    for folder in {file.parent.resolve() for file in files}:
        if folder in _DATA:
            _DATA[folder].refuse_changed()
