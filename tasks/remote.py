"""Remote checkpoints read in parts: their headers, for plans; and their data, for merges without a local copy.

`remote_headers` makes the folder of headers that `mergeline.merging.checkpoints.remote` describes, in the user's cache;
`let_data_be_read` lets this process read the data behind it, by ranges.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple
from urllib.parse import urlsplit

from mergeline.merging.checkpoints.adapters import ADAPTER_CONFIG
from mergeline.merging.checkpoints.checkpoint import MAX_HEADER
from mergeline.merging.checkpoints.companions import (
    CONFIG,
    PROVENANCE,
    TOKENIZER,
)
from mergeline.merging.checkpoints.components import PIPELINE
from mergeline.merging.checkpoints.gguf_header import header_length
from mergeline.merging.checkpoints.modules import MODULES
from mergeline.merging.checkpoints.remote import AHEAD_BYTES, REMOTE, headers_alone, register
from mergeline.merging.errors import UserError
from mergeline.merging.files import json_bytes, publish, read_object, staged, user_errors
from mergeline.tasks.fetch import (
    GGUF_SUFFIX,
    Folder,
    bring,
    config_files,
    folders_of,
    held,
    placed_as,
    shards_of,
)
from mergeline.tasks.places import CACHED_HEADERS, user_cache
from mergeline.tasks.private import private_folder, private_umask
from mergeline.tasks.sources import (
    HttpFile,
    LocalFile,
    RemoteFile,
    Source,
    Transient,
    locate,
    patiently,
)

# What a plan reads besides headers; the others of CONFIG_FILES are copied beside a merge alone.
_PLANNED_WITH = (CONFIG, TOKENIZER, ADAPTER_CONFIG, MODULES, PIPELINE, "sentence_bert_config.json")
_DOWNLOADS = "downloads"  # of a folder that is being made
_FIRST_BYTES = (
    1 << 12
)  # of a file of weights: a shard's header is in them, or one more question brings the rest
_LARGEST_COMPANION = 100_000_000
_FORM = 2  # of a folder of headers; those of another form are made again
_AT_ONCE = 8  # headers
_MOST_AT_ONCE = 1 << 25
_WINDOWS = 64  # of a thread, each of a tensor that is being read


@dataclass(frozen=True)
class Remote:
    """A folder of headers.

    source: where the data is, without credentials, with the commit if there is one. where: what it was found by.
    files: of weights, by their names in the folder, with the names, sizes and versions that they have there; each with
    what stands before it, as `unet/`. beside: what describes the weights there, brought or not; named as the files.
    """

    folder: Path
    source: str
    where: str = field(repr=False)
    files: Mapping[str, tuple[RemoteFile, str, int, str]]
    beside: tuple[str, ...]
    is_pinned: bool


class NoHeaders(UserError):
    """The weights are neither safetensors nor GGUF, and have no headers that could be read alone."""


def remote_headers(found: Source, where: str, companions: bool = False) -> Remote:
    """The folder of headers of what was located; made again only where the files there are others.

    where: what it was located by. companions: all that lies beside the weights is brought, as a merge needs it; or what
    a plan needs alone.

    Raises:
        NoHeaders: a pickle. NoParts: the server sends whole files alone. UserError: no access, no weights.
    """
    with user_errors(user_cache()), private_umask():
        private_folder(user_cache())
        listed = [[n, f.version] for n, f in found.files.items() if isinstance(f, RemoteFile) and f.version]
        has_parts = not found.revision and (MODULES in found.files or PIPELINE in found.files)
        if len(listed) == len(found.files) and not has_parts:
            out = _cached(found, companions, listed)
            if not (out / REMOTE).exists():
                with staged(out) as staging:
                    read = _read_headers(found, staging)
                    _finish(found, read, staging, out, companions)
        else:  # what has no versions is asked for its headers each time, and known by them
            with staged(_cached(found, companions, os.getpid())) as staging:
                read = _read_headers(found, staging)
                out = _cached(found, companions, read.told)
                if not (out / REMOTE).exists():
                    with staged(out) as own:
                        shutil.copytree(staging, own, dirs_exist_ok=True)
                        _finish(found, read, own, out, companions)
    try:
        located = {}
        told = read_object(held(out) / REMOTE)
        beside = tuple(map(str, told["beside"]))
        for prefix in told["folders"]:
            inside = _below(found, prefix)
            for name, (of, size, version) in read_object(out / prefix / REMOTE)["files"].items():
                located[prefix + name] = _remote(inside, of), of, size, version
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{out / REMOTE}: was damaged; remove the folder") from None
    source, is_pinned = found.pinned or found.name, found.revision is not None
    return Remote(out, source, where, located, beside, is_pinned)


def _below(source: Source, prefix: str) -> Source:
    """The folder of a part, by what stands before the names of its files; of nothing the source itself."""
    if not prefix:
        return source
    if source.below is None:
        raise UserError(f"{source.name}: has no folder '{prefix}'; try again")
    return source.below(prefix.rstrip("/"))


def _cached(found: Source, companions: bool, versions: Any) -> Path:
    key = json.dumps([_FORM, found.pinned or found.name, found.chosen, companions, versions])
    return user_cache() / CACHED_HEADERS / hashlib.sha256(key.encode()).hexdigest()[:16]


def _remote(source: Source, name: str) -> RemoteFile:
    file = source.file(name)
    if isinstance(file, LocalFile):
        raise UserError(f"{file.path}: is a local file; name it as a path")
    return file


class _Headers(NamedTuple):
    """What was read of a source.

    folders: of its parts, and its own. files: of weights by folder and name here, with their names, sizes and versions
    there. told: what tells these headers from others.
    """

    folders: dict[str, Folder]
    files: dict[str, dict[str, tuple[str, int, str]]]
    told: list[Any]


def _read_headers(found: Source, staging: Path) -> _Headers:
    """Write indexes and headers of the weights into `staging`."""
    folders = folders_of(found, staging / _DOWNLOADS, allow_pickle=True)
    places: list[tuple[str, str, str]] = []  # what stands before names, the name here and the one there
    for prefix, (source, weights) in folders.items():
        (staging / prefix).mkdir(exist_ok=True)
        if weights is None:
            continue
        if not weights.endswith((".safetensors", ".safetensors.index.json", GGUF_SUFFIX)):
            raise NoHeaders(
                f"{source.name}: '{weights}' is a pickle, which can run code when it is opened; convert it to "
                "safetensors, or allow it with --allow-pickle, which brings it here whole"
            )
        if weights.endswith(".index.json"):
            index = staging / prefix / placed_as(weights)
            _companion(source, weights, index, staging)
            places += [(prefix, n, n) for n in shards_of(index, f"{source.name}: {weights}")]
        else:
            places.append((prefix, placed_as(weights), weights))

    def read_header(place: tuple[str, str, str]) -> tuple[bytes, int, str]:
        prefix, _, name = place
        file = _remote(folders[prefix].source, name)
        return _gguf_header(file) if name.endswith(GGUF_SUFFIX) else _header(file)

    with ThreadPoolExecutor(min(_AT_ONCE, len(places))) as pool:
        read = [*pool.map(read_header, places)]
    files: dict[str, dict[str, tuple[str, int, str]]] = {prefix: {} for prefix in folders}
    for (prefix, name, of), (header, size, version) in zip(places, read):
        (staging / prefix / name).write_bytes(header)
        files[prefix][name] = of, size, version
    digests = [hashlib.sha256(header).hexdigest() for header, _, _ in read]
    told = [[prefix, *place] for prefix, own in files.items() for place in sorted(own.items())]
    return _Headers(folders, files, [told, digests])


def _header(file: RemoteFile) -> tuple[bytes, int, str]:
    """The first bytes of a file as far as its header says that it goes; size and version of the file."""
    start, size, version = _bytes(file, 0, _FIRST_BYTES)
    end = 8 + int.from_bytes(start[:8], "little")
    if end - 8 > MAX_HEADER or end > size:
        return start[:16], size, version  # no header: whoever opens it says what is wrong
    return _longer(file, start, end, (size, version))[:end], size, version


def _gguf_header(file: RemoteFile) -> tuple[bytes, int, str]:
    """The same of a GGUF file, which does not say beforehand how long its header is; most of it are tokens."""
    start, size, version = _bytes(file, 0, _FIRST_BYTES)
    while (end := header_length(start, size, file.where)) is None:
        if len(start) >= MAX_HEADER:
            raise UserError(f"{file.where}: has no header of {MAX_HEADER} bytes at most; fetch it")
        start = _longer(file, start, min(2 * len(start), size), (size, version))
    return _longer(file, start, end, (size, version))[:end], size, version


def _longer(file: RemoteFile, start: bytes, stop: int, known: tuple[int, str]) -> bytes:
    """The beginning of a file up to `stop`, of which `start` is here; known: its size and version by then."""
    if stop <= len(start):
        return start
    more, *now = _bytes(file, len(start), stop)
    if tuple(now) != known:
        raise UserError(f"{file.where}: was changed while its header was read; try again")
    return start + more


def _bytes(file: RemoteFile, start: int, stop: int) -> tuple[bytes, int, str]:
    """Bytes [start, stop) of a file, or those of them that it has; its size and version."""

    def attempt() -> tuple[bytes, int, str]:
        with file.part(start, stop) as part:
            data = b""
            for chunk in part.chunks:
                data += chunk
                if len(data) >= stop - start:
                    break
            if len(data) < min(stop, part.size) - start:
                raise Transient(f"{file.where}: cut off after {len(data)} bytes")
            return data[: stop - start], part.size, part.version

    data, size, version = patiently(attempt)
    if file.size is not None and size != file.size:
        raise UserError(f"{file.where}: has {size} bytes, not {file.size}; try again")
    return data, size, version


def _finish(found: Source, read: _Headers, staging: Path, out: Path, companions: bool) -> None:
    """Bring what lies beside the weights, say where all is from, and publish the folder."""
    brought = {}
    source = found.pinned or found.name
    for prefix, folder in read.folders.items():
        for name in config_files(folder.source):
            if companions or name in _PLANNED_WITH:
                _companion(folder.source, name, staging / prefix / name, staging)
                if content := _remote(folder.source, name).content:
                    brought[content] = out / prefix / name
        files = read.files[prefix]
        told: dict[str, Any] = {
            "source": f"{source}/{prefix}".rstrip("/") if prefix else source,
            "files": files,
            "sizes": {name: size for name, (_, size, _) in files.items()},
        }
        if not prefix:
            told["folders"] = [p for p, own in read.files.items() if own or not p]
            told["beside"] = [p + name for p, of in read.folders.items() for name in config_files(of.source)]
        if files or not prefix:
            (staging / prefix / REMOTE).write_bytes(json_bytes(told))
    shutil.rmtree(staging / _DOWNLOADS, ignore_errors=True)
    (staging / PROVENANCE).write_bytes(json_bytes({"source": source, "revision": found.revision}))
    publish(staging, out)
    _BROUGHT.update(brought)


_BROUGHT: dict[str, Path] = {}  # companions by their content, which experts of one base have in common


def _companion(found: Source, name: str, target: Path, staging: Path) -> None:
    """Bring a small file to `target`, from an earlier folder if that has the same one."""
    file = _remote(found, name)
    if (file.size or 0) > _LARGEST_COMPANION:
        raise UserError(
            f"{file.where}: has {file.size} bytes; files beside weights have {_LARGEST_COMPANION} at most"
        )
    earlier = _BROUGHT.get(file.content or "")
    if earlier and earlier.exists():
        shutil.copyfile(earlier, target)
    else:
        shutil.move(bring(found, name, staging / _DOWNLOADS), target)


# --------------------------------------------------------------------------------------- data


def streamed(where: str) -> Path:
    """The folder of headers of what a URI, or `org/name`, names; this process may read its data.

    Raises:
        UserError: as `locate` and `remote_headers`.
    """
    remote = remote_headers(locate(where), where, companions=True)
    let_data_be_read(remote)
    return remote.folder


def let_data_be_read(remote: Remote, most: int | None = None) -> None:
    """Let this process read the data of a remote checkpoint, wherever it has the headers.

    most: bytes of a tensor, of which larger ones may not be read; None: all may.
    """
    for prefix in {name[: name.rfind("/") + 1] for name in remote.files}:
        register(remote.folder / prefix, _Data(remote, prefix, most))


@dataclass
class _Window:
    """Bytes of a tensor that were read ahead, from `start` on."""

    start: int
    data: memoryview

    @property
    def stop(self) -> int:
        return self.start + len(self.data)


class _Windows(threading.local):
    """What a thread read ahead, by file and tensor."""

    def __init__(self) -> None:
        self.of: OrderedDict[tuple[Any, ...], _Window] = OrderedDict()


_AHEAD_OF = _Windows()


class _Data:
    """The data of a remote checkpoint; a tensor that is read from one end to the other is read ahead."""

    def __init__(self, remote: Remote, prefix: str, most: int | None):
        """prefix: of the names of its files, which are of one folder. most: bytes of a tensor that may be read."""
        self._remote, self._prefix, self._most = remote, prefix, most
        self._files = {
            name.removeprefix(prefix): _Ranges(file, size, version)
            for name, (file, _, size, version) in self._own()
        }

    def _own(self) -> Iterator[tuple[str, tuple[RemoteFile, str, int, str]]]:
        for name, place in self._remote.files.items():
            if name[: name.rfind("/") + 1] == self._prefix:
                yield name, place

    def read_into(self, view: memoryview, file: str, start: int, tensor: tuple[int, int]) -> None:
        if self._most is not None and tensor[1] - tensor[0] > self._most:
            raise headers_alone(self._remote.source)
        windows, key = _AHEAD_OF.of, (id(self), file, tensor[0])
        done = 0
        while done < len(view):
            window, at = windows.get(key), start + done
            if window and window.start <= at < window.stop:
                taken = window.data[at - window.start :][: len(view) - done]
                view[done : done + len(taken)] = taken
                done += len(taken)
                if at + len(taken) == tensor[1]:
                    del windows[key]
                continue
            left = len(view) - done
            assert at + left <= tensor[1], "nobody reads past a tensor"
            goes_on = at == tensor[0] or (window is not None and at == window.stop)
            count = min(max(left, AHEAD_BYTES if goes_on else 0), tensor[1] - at, _MOST_AT_ONCE)
            if count <= left:
                self._files[file].read_into(view[done : done + count], at)
                window = _Window(at + count, memoryview(b""))
                done += count
            else:
                window = _Window(at, memoryview(bytearray(count)))
                self._files[file].read_into(window.data, at)
            windows.pop(key, None)
            if window.stop < tensor[1] or window.data:
                windows[key] = window
            if len(windows) > _WINDOWS:
                windows.popitem(last=False)

    def refuse_changed(self) -> None:
        """Raises UserError; looks at the versions of a listing, for others are held against theirs at every reading."""
        if self._remote.is_pinned:
            return
        now = _below(locate(self._remote.where), self._prefix).files
        for _, (file, name, _, _) in self._own():
            there = now.get(name)
            if file.version and not (isinstance(there, RemoteFile) and there.version == file.version):
                raise _changed(file)


def _changed(file: RemoteFile) -> UserError:
    return UserError(f"{file.where}: was changed while it was read, so nothing was written; run again")


class _Ranges:
    """A file that is read by ranges, from where its address leads to as long as that holds."""

    def __init__(self, file: RemoteFile, size: int, version: str):
        self.file, self._known = file, (size, version)
        self._moved: RemoteFile | None = None

    def read_into(self, view: memoryview, start: int) -> None:
        """Raises UserError: no access, another file than its header was read of, or failing again and again."""
        done = 0

        def attempt() -> None:
            nonlocal done
            asked = self._moved or self.file
            try:
                with asked.part(start + done, start + len(view)) as part:
                    if (part.size, part.version) != self._known:
                        raise _Changed
                    if isinstance(self.file, HttpFile) and part.moved and asked is self.file:
                        self._moved = self._at(self.file, part.moved)
                    for chunk in part.chunks:
                        chunk = chunk[: len(view) - done]
                        view[done : done + len(chunk)] = chunk
                        done += len(chunk)
            except UserError:
                if asked is self.file:
                    raise
                self._moved = None  # an address that is signed holds for a while
                raise Transient(f"{self.file.where}: moved again", wait=0) from None
            if done < len(view) and not isinstance(self.file, HttpFile):
                raise _Changed  # file systems give all that there is
            if done < len(view):
                raise Transient(f"{self.file.where}: cut off at byte {start + done}")

        try:
            patiently(attempt, progress=lambda: done)
        except _Changed:
            raise _changed(self.file) from None

    @staticmethod
    def _at(file: HttpFile, url: str) -> HttpFile:
        """The file at the address that its own led to; a token is for the first host alone."""
        same = urlsplit(url).netloc == urlsplit(file.url).netloc
        return replace(file, url=url, token=file.token if same else None)


class _Changed(Exception):
    pass
