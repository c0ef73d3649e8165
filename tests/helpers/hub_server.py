"""A loopback web server that speaks what downloading and uploading need of the Hub's protocol, with faults on demand.

/api/models/ORG/NAME/revision/REVISION    commit and files of a repository, as JSON
/ORG/NAME/resolve/COMMIT/FILE             a file; one in LFS is a redirect to /cdn/ on another host name
/cdn/SHA256/FILE, /web/FILE               bytes, with ETag, Range and If-Range
/api/repos/create, /api/models/ORG/NAME/preupload/main, /api/models/ORG/NAME/commit/main,
/ORG/NAME.git/info/lfs/objects/batch, /lfs/SHA256
                                          a repository that is made, and a commit to it, large files by LFS

A body is bytes, or `Sparse`: a file of any size, of which the beginning alone is held.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from time import sleep
from typing import Any
from urllib.parse import unquote, urlsplit

from loopback import QuietHandler, listening

_PIECE = 1 << 16  # of a body that is written at once


@dataclass(frozen=True)
class Sparse:
    """A file of `size` bytes: `start`, and zeros."""

    start: bytes
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> bytes:
        first, last, _ = part.indices(self.size)
        return self.start[first:last].ljust(max(last - first, 0), b"\0")


Body = bytes | Sparse


@dataclass
class Fault:
    """What happens to the next request whose path holds `path`, instead of what should."""

    path: str
    status: int | None = None  # answer with this status and no body
    headers: dict[str, str] = field(default_factory=dict)  # in place of those of the answer
    drop_after: int | None = None  # close the connection after so many bytes of the body
    truncate: int | None = None  # send so many bytes, and say that these are all
    body: bytes | None = None  # send these bytes


@dataclass
class Seen:
    """A request that came, and the bytes of body that went out."""

    path: str
    host: str
    range: str | None
    authorization: str | None
    sent: int = 0


@dataclass
class Hub:
    port: int = 0
    repositories: dict[str, dict[str, Body]] = field(default_factory=dict)
    web: dict[str, Body] = field(default_factory=dict)
    private: bool = False  # whoever brings no token is turned away
    pause: float = 0.0  # seconds before an answer with bytes of weights
    ranges: bool = True  # parts of files are sent where they are asked for
    made: dict[str, bool] = field(
        default_factory=dict
    )  # repositories by uploads, and whether they are private
    large: dict[str, bytes] = field(default_factory=dict)  # by LFS, by SHA-256
    faults: list[Fault] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)

    @property
    def sent(self) -> int:
        """The bytes of all bodies that went out."""
        return sum(seen.sent for seen in self.seen)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def commit(self, repository: str) -> str:
        files = sorted((name, _sha256(body)) for name, body in self.repositories[repository].items())
        return hashlib.sha1(repr(files).encode()).hexdigest()

    def bodies(self, path: str) -> list[Seen]:
        """The requests whose path holds `path`."""
        return [seen for seen in self.seen if path in seen.path]


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    with listening(_Handler, hub=hub) as hub.port:
        yield hub


class _Handler(QuietHandler):
    hub: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.seen = Seen(
            self.path, self.headers["Host"], self.headers["Range"], self.headers["Authorization"]
        )
        self.hub.seen.append(self.seen)
        self.fault = next((fault for fault in self.hub.faults if fault.path in path), Fault(""))
        if self.fault in self.hub.faults:
            self.hub.faults.remove(self.fault)
        if self.hub.pause and path.endswith(".safetensors"):
            sleep(self.hub.pause)
        if self.fault.status:
            self.answer(self.fault.status, self.fault.headers)
        elif path.startswith("/web/"):
            self.file(self.hub.web.get(path.removeprefix("/web/")))
        elif path.startswith("/cdn/"):
            every_file = (body for files in self.hub.repositories.values() for body in files.values())
            self.file(next((body for body in every_file if _sha256(body) == path.split("/")[2]), None))
        elif self.hub.private and not self.headers["Authorization"]:
            self.answer(401, {"X-Error-Code": "GatedRepo"})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            self.listing(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(match[1], match[2], match[3])
        else:
            self.answer(404)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.seen = Seen(self.path, self.headers["Host"], None, self.headers["Authorization"])
        self.hub.seen.append(self.seen)
        self.fault = next((fault for fault in self.hub.faults if fault.path in path), Fault(""))
        sent = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.fault.status:
            self.answer(self.fault.status, self.fault.headers)
        elif not self.headers["Authorization"]:
            self.answer(401)
        elif path == "/api/repos/create":
            asked = json.loads(sent)
            repository = f"{asked['organization']}/{asked['name']}"
            self.hub.made[repository] = asked.get("private") or asked.get("visibility") == "private"
            self.hub.repositories.setdefault(repository, {})
            self.json({"url": f"{self.hub.endpoint}/{repository}"})
        elif path == "/api/validate-yaml":
            self.json({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            modes = {
                file["path"]: "lfs" if _in_lfs(file["path"]) else "regular"
                for file in json.loads(sent)["files"]
            }
            self.json(
                {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
            )
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**entry, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{entry['oid']}"}}}
                for entry in json.loads(sent)["objects"]
            ]
            self.json({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self.commit(match[1], [json.loads(line) for line in sent.splitlines()])
        else:
            self.answer(404)

    def do_PUT(self) -> None:
        self.seen, self.fault = Seen(self.path, self.headers["Host"], None, None), Fault("")
        self.hub.large[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200)

    def commit(self, repository: str, lines: list[dict[str, Any]]) -> None:
        files = self.hub.repositories[repository]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        oid = self.hub.commit(repository)
        self.json(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repository}/commit/{oid}"}
        )

    def json(self, value: object) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def listing(self, repository: str, revision: str) -> None:
        if repository not in self.hub.repositories:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", self.hub.commit(repository)):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        siblings = []
        for name, body in self.hub.repositories[repository].items():
            sibling = {"rfilename": name, "size": len(body), "blobId": _sha256(body)[:40]}
            if _in_lfs(name):
                sibling["lfs"] = {"sha256": _sha256(body), "size": len(body), "pointerSize": 134}
            siblings.append(sibling)
        document = {"id": repository, "sha": self.hub.commit(repository), "siblings": siblings}
        body = json.dumps(document).encode() if self.fault.body is None else self.fault.body
        self.answer(200, {"Content-Type": "application/json"}, body)

    def resolve(self, repository: str, commit: str, name: str) -> None:
        body = self.hub.repositories.get(repository, {}).get(name)
        if body is None:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        if not _in_lfs(name):
            return self.file(body)
        linked = {
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(len(body)),
            "X-Linked-ETag": f'"{_sha256(body)}"',
        }
        cdn = f"http://localhost:{self.hub.port}/cdn/{_sha256(body)}/{name}?signature=SECRET"
        self.answer(302, linked | {"Location": cdn})

    def file(self, body: Body | None) -> None:
        if body is None:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        if self.fault.body is not None:
            body = self.fault.body
        etag, whole = f'"{_sha256(body)}"', len(body)
        headers = {"ETag": etag, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if not self.hub.ranges or not wanted or self.headers["If-Range"] not in (None, etag):
            return self.answer(200, headers, body)
        start, stop = int(wanted[1]), min(int(wanted[2] or whole) + 1, whole)
        if start >= whole:
            return self.answer(416, headers | {"Content-Range": f"bytes */{whole}"})
        self.answer(206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{whole}"}, body[start:stop])

    def answer(self, status: int, headers: dict[str, str] | None = None, body: Body = b"") -> None:
        body = body if self.fault.truncate is None else body[: self.fault.truncate]
        self.send_response(status)
        for name, value in (
            {"Content-Length": str(len(body))} | (headers or {}) | self.fault.headers
        ).items():
            self.send_header(name, value)
        self.end_headers()
        last = len(body) if self.fault.drop_after is None else min(self.fault.drop_after, len(body))
        for start in range(0, last, _PIECE):
            piece = body[start : min(start + _PIECE, last)]
            self.wfile.write(piece)
            self.seen.sent += len(piece)


def _in_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".gguf"))


@lru_cache(maxsize=1024)
def _sha256(body: Body) -> str:
    return hashlib.sha256(body if isinstance(body, bytes) else repr(body).encode()).hexdigest()
