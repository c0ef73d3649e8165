"""Where checkpoints come from: local files, the Hugging Face Hub, web servers, and whatever fsspec knows.

`locate` lists the files of a source without reading them; `download` brings one of them here, and `RemoteFile.part`
some bytes of one. A download goes on where an earlier one was cut off, and is checked for size and SHA-256 (where the
source states them). `TRAFFIC` counts what comes over the wire.

The Hub is spoken to directly, because huggingface_hub (2.4) neither resumes what another process began nor
checks hashes. Its settings are honoured: HF_ENDPOINT, HF_TOKEN or the saved login, HF_HUB_OFFLINE.
https://huggingface.co/docs/hub/api
"""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from threading import Lock, local
from time import sleep
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

from mergeline.merging.checkpoints.companions import is_repository
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.files import user_errors
from mergeline.merging.reading import parsed_json, safe_name, sha256_of
from mergeline.tasks.credentials import scrubbed, without_credentials
from mergeline.tasks.extras import missing

if TYPE_CHECKING:
    from requests import Response, Session

ATTEMPTS = 6  # failures in a row, without a new byte, before giving up
BACKOFF_SECONDS = 1.0  # before the second attempt; doubled for every further one
LONGEST_WAIT_SECONDS = 300.0  # the Hub counts requests over windows of five minutes
TIMEOUT_SECONDS = (10, 60)  # to connect; between two pieces of an answer

_CHUNK = 1 << 16  # small, because a chunk that is cut off is lost
_PASSING = (408, 429, 500, 502, 503, 504)
_NOT_FOUND = {
    "RepoNotFound": "no such repository, or a private one (then set HF_TOKEN)",
    "RevisionNotFound": "no such revision",
    "EntryNotFound": "no such file",
}
T = TypeVar("T")


class Traffic:
    """How many bytes came over the wire, in how many answers."""

    def __init__(self) -> None:
        self.bytes = self.answers = 0
        self._lock = Lock()

    def add(self, bytes: int, answers: int = 0) -> None:
        with self._lock:
            self.bytes, self.answers = self.bytes + bytes, self.answers + answers


TRAFFIC = Traffic()  # of this process


class NoParts(UserError):
    """The server sends whole files alone."""


class Transient(Exception):
    """A failure that may pass; `wait` is the number of seconds that the server asks for, if it does."""

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


@dataclass(frozen=True)
class LocalFile:
    path: Path


@dataclass(frozen=True)
class Part:
    """Bytes of a remote file, as they come; size: of the whole file. version: differs whenever its bytes may differ.

    moved: the URL that answered where the one that was asked led elsewhere.
    """

    chunks: Iterator[bytes]
    size: int
    version: str
    moved: str | None = None


@dataclass(frozen=True)
class RemoteFile:
    """A file elsewhere. `where` names it to people; `version` differs whenever its bytes may differ.

    content: tells files of the same bytes, wherever they lie, where the source states something that does.
    """

    where: str
    version: str = ""
    size: int | None = None
    sha256: str | None = None
    content: str | None = None

    def part(self, start: int, stop: int) -> AbstractContextManager[Part]:
        """The bytes [start, stop) of the file, or those of them that it has.

        Raises:
            Transient: the server is busy, or the connection failed, now or between two chunks.
            NoParts: the server sends the whole file instead; none of it is read.
            UserError: there is no such file, or no access to it.
        """
        raise NotImplementedError

    def append(self, partial: Path) -> None:
        """Add to the existing file `partial` the bytes that it lacks.

        Raises:
            Transient: cut off, or the server is busy; the bytes that came are kept.
            UserError: there is no such file, or no access to it.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class HttpFile(RemoteFile):
    url: str = field(default="", repr=False)  # may carry a signature
    token: str | None = field(default=None, repr=False)

    @contextmanager
    def part(self, start: int, stop: int) -> Iterator[Part]:
        wanted = {"Range": f"bytes={start}-{stop - 1}"}
        with http_get(self.url, self.where, self.token, wanted, kept=True) as answer:
            headers = answer.headers
            told = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", headers.get("Content-Range", ""))
            length = headers.get("Content-Length", "")
            if answer.status_code == 200 and not (start == 0 and length.isdigit() and int(length) <= stop):
                raise NoParts(
                    f"{self.where}: the server sends no parts of files (it ignores Range); fetch the whole checkpoint"
                )
            if answer.status_code != 200 and (not told or told[1] not in (None, str(start))):
                raise Transient(f"{self.where}: the server sent another part than was asked for")
            size = int(told[2] if told else length)
            version = self.version or headers.get("ETag", "") or headers.get("Last-Modified", "")
            chunks = iter(()) if answer.status_code == 416 else answer.iter_content(_CHUNK)
            yield Part(_counted(chunks), size, version, answer.url if answer.history else None)

    def append(self, partial: Path) -> None:
        have, etag_file = partial.stat().st_size, partial.with_suffix(".etag")
        etag = etag_file.read_text() if etag_file.exists() else ""
        with http_get(self.url, self.where, self.token, self._range(have, etag)) as answer:
            part = answer.headers.get("Content-Range", "")
            if answer.status_code == 416 and part == f"bytes */{have}":
                return  # nothing was lacking
            if answer.status_code != 200 and not part.startswith(f"bytes {have}-"):
                partial.write_bytes(b"")
                raise Transient(f"{self.where}: the server sent another part than was asked for")
            resumed = answer.status_code == 206
            total = part.rpartition("/")[2] if resumed else answer.headers.get("Content-Length", "")
            with open(partial, "ab" if resumed else "wb") as file:
                if not resumed:
                    new = answer.headers.get("ETag", "")
                    etag_file.write_text("" if new.startswith("W/") else new)
                for chunk in _counted(answer.iter_content(_CHUNK)):
                    file.write(chunk)
        _require_whole(partial, self.size or (int(total) if total.isdigit() else None), self.where)

    def _range(self, have: int, etag: str) -> dict[str, str]:
        """Ask for the rest, if the hash in the end or the ETag now proves that it belongs to what is here."""
        if not have or not (self.sha256 or etag):
            return {}
        return {"Range": f"bytes={have}-"} | ({} if self.sha256 else {"If-Range": etag})


@dataclass(frozen=True)
class FsspecFile(RemoteFile):
    filesystem: Any = None
    path: str = ""

    @contextmanager
    def part(self, start: int, stop: int) -> Iterator[Part]:
        if self.size is None:
            raise NoParts(f"{self.where}: the file system does not say its size; fetch the whole checkpoint")
        stop = min(stop, self.size)
        with _fsspec_errors(self.where):
            data = self.filesystem.cat_file(self.path, start=start, end=stop) if start < stop else b""
        TRAFFIC.add(0, answers=1)
        if len(data) > stop - start:
            raise NoParts(
                f"{self.where}: the file system sends no parts of files; fetch the whole checkpoint"
            )
        yield Part(_counted([data]), self.size, self.version)

    def append(self, partial: Path) -> None:
        with open(partial, "ab") as file:
            for chunk in _counted(self._chunks(file.tell())):
                file.write(chunk)
        _require_whole(partial, self.size, self.where)

    def _chunks(self, start: int) -> Iterator[bytes]:
        with _fsspec_errors(self.where), self.filesystem.open(self.path, "rb") as remote:
            remote.seek(start)
            while chunk := remote.read(_CHUNK):
                yield chunk


def _counted(chunks: Iterable[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        TRAFFIC.add(len(chunk))
        yield chunk


@dataclass(frozen=True)
class Source:
    """The files of one folder, by plain name, sorted.

    name: what the user wrote, without credentials; `org/name` stands for the repository of the Hub.
    pinned: a name for the same bytes for ever, as far as there is one: of the Hub with the commit.
    chosen: the file that was named; None if it was the folder.
    revision: the commit that the name stands for, if there is one.
    sibling: makes the file of another name in a folder that cannot be listed.
    below: lists the files of a sub-folder by its plain name; none where there is no such folder.
    """

    name: str
    files: Mapping[str, LocalFile | RemoteFile]
    chosen: str | None = None
    revision: str | None = None
    sibling: Callable[[str], RemoteFile] | None = None
    below: Callable[[str], Source] | None = None
    pinned: str = ""

    def file(self, name: str) -> LocalFile | RemoteFile:
        """The file `name` (raises UserError: missing, or a link out of the folder that nobody named)."""
        file = self.files.get(name) or (self.sibling and self.sibling(name))
        if not file:
            raise UserError(f"{self.name}: '{name}' is missing{did_you_mean(name, self.files)}")
        if isinstance(file, LocalFile) and name != self.chosen:
            safe_name(file.path.parent, name, self.name)
        return file


def locate(source: str) -> Source:
    """List the files of a path, `file:...`, `hf://org/name[@revision][/path]`, http(s) or any fsspec URL.

    `org/name`, where there is no such path, is the repository of the Hub.

    Raises:
        UserError: unknown scheme, nothing there, no access, or file names that lead elsewhere.
    """
    scheme = re.match(r"(file(?=:)|[A-Za-z][\w+.-]*(?=://|::))", source)
    match scheme and scheme[0].lower():
        case None:
            path = Path(source).expanduser()
            return _repository(source, path) if is_repository(source, path) else _local(source, path)
        case "file":
            return _local(source, Path(unquote(re.sub(r"(?i)^file:(//(localhost)?(?=/))?", "", source))))
        case "hf":
            return _hub(source)
        case "http" | "https":
            return _web(source)
        case other:
            return _fsspec(source, other)


def pinned(source: str) -> str:
    """A URI of the Hub, or `org/name`, with the commit that it stands for now; anything else as it is.

    Raises:
        UserError: no such repository, no access.
    """
    if re.match(r"hf://[^@/]+/[^@/]+@[0-9a-f]{40}(/|$)", source):
        return source
    hub = source.startswith("hf://") or is_repository(source, Path(source).expanduser())
    return locate(source).pinned if hub else source


def download(file: RemoteFile, folder: Path) -> Path:
    """Bring a file into `folder`, going on with what an earlier call left there; returns where it is.

    One process at a time may use the folder.

    Raises:
        UserError: not found, no access, still failing after some attempts, wrong size or hash, disk full.
    """
    key = hashlib.sha256(f"{file.where}\n{file.version}".encode()).hexdigest()[:32]
    partial = folder / f"{key}.part"
    with user_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        partial.touch()
        if file.size is None or partial.stat().st_size != file.size:
            patiently(lambda: file.append(partial), progress=lambda: partial.stat().st_size)
        _verify(file, partial)
    return partial


def patiently(
    action: Callable[[], T], progress: Callable[[], int] = lambda: 0, attempts: int = ATTEMPTS
) -> T:
    """`action()`, repeated after Transient failures with exponential back-off and jitter.

    A failure after which `progress()` is further than ever is not counted.
    """
    failures, furthest = 0, progress()
    while True:
        try:
            return action()
        except Transient as error:
            failures = 1 if progress() > furthest else failures + 1
            furthest = max(furthest, progress())
            if failures == attempts:
                gave_up = f"gave up after {attempts} attempts, " if attempts > 1 else ""
                raise UserError(f"{error}; {gave_up}run again to continue") from None
            wait = error.wait
            if wait is None:
                wait = BACKOFF_SECONDS * 2 ** (failures - 1) * random.uniform(0.5, 1.0)
            if wait > LONGEST_WAIT_SECONDS:
                raise UserError(f"{error}; it asks to wait for {wait:.0f} s, run again then") from None
            sleep(wait)


@contextmanager
def http_get(
    url: str,
    where: str,
    token: str | None = None,
    headers: dict[str, str] | None = None,
    kept: bool = False,
) -> Iterator[Response]:
    """A streamed answer with status 200, 206 or 416; every other outcome is Transient or a UserError.

    kept: this thread's connections stay open for its next question. The messages hold `where`, not the URL, which may
    carry a signature; the causes, which do, are cut off.
    """
    import requests

    def authorise(request: requests.PreparedRequest) -> requests.PreparedRequest:
        # Not given as a header, which ~/.netrc would overrule. A redirect to another host drops it.
        request.headers["Authorization"] = f"Bearer {token}"
        return request

    try:
        with (_session() if kept else requests).get(
            url,
            headers={"Accept-Encoding": "identity"} | (headers or {}),
            auth=authorise if token else None,
            stream=True,
            timeout=TIMEOUT_SECONDS,
        ) as answer:
            TRAFFIC.add(0, answers=1 + len(answer.history))
            _check_status(answer, where)
            yield answer
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        raise Transient(f"{where}: the connection failed ({type(error).__name__})") from None
    except requests.RequestException as error:
        raise UserError(f"{where}: no valid answer from the server ({type(error).__name__})") from None


_KEPT = local()


def _session() -> Session:
    import requests

    if not hasattr(_KEPT, "session"):
        _KEPT.session = requests.Session()
    return _KEPT.session


def _check_status(answer: Response, where: str) -> None:
    status = answer.status_code
    if status in (200, 206, 416):
        return
    if status in _PASSING:
        raise Transient(f"{where}: the server answers HTTP {status}", _wait_asked_for(answer.headers))
    if status in (401, 403):
        raise UserError(
            f"{where}: access denied (HTTP {status}); give credentials (for the Hub: set HF_TOKEN to a token "
            "that may read the repository, and accept its licence there if it is gated)"
        )
    if status in (404, 410):
        reason = _NOT_FOUND.get(answer.headers.get("X-Error-Code", ""), "not found")
        raise UserError(f"{where}: {reason} (HTTP {status})")
    raise UserError(f"{where}: the server answers HTTP {status}")


def _wait_asked_for(headers: Any) -> float | None:
    """Seconds, from `Retry-After: 30` or the Hub's `RateLimit: "api";r=0;t=30`."""
    retry_after = re.fullmatch(r"(\d+)", headers.get("Retry-After", "").strip())
    rate_limit = re.search(r";\s*r=0\s*;\s*t=(\d+)", headers.get("RateLimit", ""))
    asked = retry_after or rate_limit
    return float(asked[1]) if asked else None


def _require_whole(partial: Path, size: int | None, where: str) -> None:
    have = partial.stat().st_size
    if size is not None and have < size:
        raise Transient(f"{where}: cut off after {have} of {size} bytes")


def _verify(file: RemoteFile, partial: Path) -> None:
    size = partial.stat().st_size
    problem = ""
    if file.size is not None and size != file.size:
        problem = f"has {size} bytes, not {file.size}"
    elif file.sha256 and file.sha256 != (actual := sha256_of(partial)):
        problem = f"has SHA-256 {actual}, not {file.sha256}"
    if problem:
        partial.unlink()
        raise UserError(f"{file.where}: {problem}; the download was thrown away, try again")


def _repository(source: str, path: Path) -> Source:
    """What may be the name of a repository, or of a path, mistyped; the more so where its folder is there."""
    try:
        return _hub(f"hf://{source}", attempts=1 if path.parent.is_dir() else 2)
    except UserError as error:
        raise UserError(f"{source}: no such file or folder, and as a repository: {error}") from None


def _local(source: str, path: Path) -> Source:
    if not path.exists():
        raise UserError(f"{source}: no such file or folder")
    folder = path if path.is_dir() else path.parent
    if not os.access(path, os.R_OK) or not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"{source}: cannot be read; check the permissions")

    def below(name: str) -> Source:
        inside = safe_name(folder, name, source)
        return Source(f"{source}/{name}", _local_files(inside) if inside.is_dir() else {})

    return Source(source, _local_files(folder), chosen=None if path.is_dir() else path.name, below=below)


def _local_files(folder: Path) -> dict[str, LocalFile]:
    return {p.name: LocalFile(p) for p in sorted(folder.iterdir()) if p.is_file()}


def _web(source: str) -> Source:
    """A web server lists no files: there is the one that was named, and the shards that an index names."""
    try:
        url = urlsplit(source)
    except ValueError as error:
        raise UserError(f"{without_credentials(source)}: is no URL ({scrubbed(str(error))})") from None
    folder, _, name = url.path.rpartition("/")
    name = unquote(name)
    if not name:
        raise UserError(f"{without_credentials(source)}: name a file, for example .../model.safetensors")

    def sibling(name: str) -> HttpFile:
        whole = url._replace(path=f"{folder}/{quote(name)}").geturl()
        return HttpFile(without_credentials(whole), url=whole)

    return Source(without_credentials(source), {name: sibling(name)}, chosen=name, sibling=sibling)


def _hub(source: str, attempts: int = ATTEMPTS) -> Source:
    from huggingface_hub import constants, get_token

    parsed = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.*))?", source)
    if not parsed:
        raise UserError(
            f"{without_credentials(source)}: write hf://org/name@revision, and after it /file or /folder if need be"
        )
    repository, revision, inside = parsed[1], unquote(parsed[2] or "main"), (parsed[3] or "").strip("/")
    where = f"hf://{repository}@{revision}"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{where}: HF_HUB_OFFLINE is set; unset it, or name a local folder")
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    token = get_token()
    commit, siblings = patiently(
        lambda: _hub_listing(endpoint, repository, revision, where, token), attempts=attempts
    )

    def hub_file(path: str) -> HttpFile:
        url = f"{endpoint}/{repository}/resolve/{commit}/{quote(path)}"
        entry = siblings[path]
        sha256 = (entry.get("lfs") or {}).get("sha256")
        content = sha256 or entry.get("blobId")
        return HttpFile(f"{where}/{path}", commit, entry.get("size"), sha256, content, url=url, token=token)

    chosen = inside if inside in siblings else None
    folder = inside.rpartition("/")[0] if chosen else inside

    def files_of(folder: str) -> dict[str, HttpFile]:
        return {p.rpartition("/")[2]: hub_file(p) for p in sorted(siblings) if p.rpartition("/")[0] == folder}

    def below(name: str) -> Source:
        inside = f"{folder}/{name}".lstrip("/")
        return Source(f"{where}/{inside}", files_of(inside), revision=commit)

    files = files_of(folder)
    if not files:
        raise UserError(f"{where}: there is no '{inside}' in this repository{did_you_mean(inside, siblings)}")
    pinned = "/".join(filter(None, (f"hf://{repository}@{commit}", inside)))
    return Source(source, files, chosen and chosen.rpartition("/")[2], commit, below=below, pinned=pinned)


def _hub_listing(
    endpoint: str, repository: str, revision: str, where: str, token: str | None
) -> tuple[str, dict]:
    """The commit of a revision, and its files: path -> {"size": bytes, "lfs": {"sha256": ...}}."""
    url = f"{endpoint}/api/models/{repository}/revision/{quote(revision, safe='')}?blobs=true"
    with http_get(url, where, token) as answer:
        text = answer.content
    TRAFFIC.add(len(text))
    try:
        listing = parsed_json(text)
        commit = str(listing["sha"])
        siblings = {str(entry["rfilename"]): _checked(entry) for entry in listing["siblings"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{where}: the Hub's answer is no list of files") from None
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        raise UserError(f"{where}: the Hub's answer names no commit")
    for path in map(PurePosixPath, siblings):
        if path.is_absolute() or ".." in path.parts or "\\" in str(path):
            raise UserError(f"{where}: lists the file '{path}'; only names inside the repository are allowed")
    return commit, siblings


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of a listing (raises KeyError, TypeError or AttributeError if it is none)."""
    lfs = entry.get("lfs") or {}
    for value, kind in ((entry.get("size"), int), (entry.get("blobId"), str), (lfs.get("sha256"), str)):
        if value is not None and type(value) is not kind:
            raise TypeError
    return entry


def _fsspec(source: str, scheme: str) -> Source:
    import fsspec

    name = without_credentials(source)
    known = ["file", "hf", "open_clip", "http", "https", *fsspec.available_protocols()]
    if scheme not in known:
        raise UserError(
            f"{name}: unknown scheme '{scheme}'{did_you_mean(scheme, known)}; "
            "known are file, hf, open_clip, http, https, s3, gs, az and the others of fsspec"
        )
    return patiently(lambda: _fsspec_listing(source, name))


def _fsspec_listing(source: str, name: str) -> Source:
    import fsspec

    with _fsspec_errors(name):
        filesystem, path = fsspec.core.url_to_fs(source)
        filesystem.invalidate_cache()  # fsspec remembers listings for as long as the process lives
        is_folder = filesystem.info(path)["type"] == "directory"
        folder = path if is_folder else path.rpartition("/")[0]
        shown = name.rstrip("/") if is_folder else name.rpartition("/")[0]
        files = _fsspec_files(filesystem, folder, shown)

    def below(name: str) -> Source:
        inside, where = f"{folder}/{name}", f"{shown}/{name}"

        def listed() -> Source:
            with _fsspec_errors(where):
                return Source(
                    where, _fsspec_files(filesystem, inside, where) if filesystem.isdir(inside) else {}
                )

        return patiently(listed)

    return Source(name, files, chosen=None if is_folder else path.rpartition("/")[2], below=below)


def _fsspec_files(filesystem: Any, folder: str, shown: str) -> dict[str, FsspecFile]:
    entries = [entry for entry in filesystem.ls(folder, detail=True) if entry["type"] == "file"]
    files = {}
    for entry in sorted(entries, key=lambda entry: entry["name"]):
        base = entry["name"].rpartition("/")[2]
        # str(entry) holds what tells one version from another: a modification time, an ETag.
        files[base] = FsspecFile(
            f"{shown}/{base}", str(entry), entry["size"], filesystem=filesystem, path=entry["name"]
        )
    return files


@contextmanager
def _fsspec_errors(where: str) -> Iterator[None]:
    """Every file system brings exceptions of its own: all are taken, with their type and text."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{where}: {missing(error.__cause__) or scrubbed(str(error))}") from None
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{where}: not found") from None
    except PermissionError as error:
        raise UserError(f"{where}: access denied; check the credentials ({scrubbed(str(error))})") from None
    except OSError as error:
        raise Transient(f"{where}: {type(error).__name__}: {scrubbed(str(error))}") from None
    except Exception as error:
        raise UserError(f"{where}: {type(error).__name__}: {scrubbed(str(error))}") from error
