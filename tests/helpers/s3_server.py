"""A loopback server that speaks what reading and writing small files take of S3's protocol.

GET /BUCKET?list-type=2&prefix=P&delimiter=/    keys and folders, as XML
GET /BUCKET/KEY, HEAD /BUCKET/KEY               an object, with Range
PUT /BUCKET/KEY                                 an object
https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
from loopback import QuietHandler, listening


@dataclass
class Bucket:
    """objects: key -> bytes. sent: bytes of them that went out."""

    name: str
    port: int = 0
    objects: dict[str, bytes] = field(default_factory=dict)
    sent: int = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def running_s3(name: str) -> Iterator[Bucket]:
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # of a test before, with another port
    bucket = Bucket(name)
    with listening(_Handler, bucket=bucket) as bucket.port:
        yield bucket


class _Handler(QuietHandler):
    protocol_version = "HTTP/1.1"  # who writes waits for 100 Continue
    bucket: Bucket

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        _, bucket, *key = unquote(url.path).split("/", 2)
        if bucket != self.bucket.name:
            self.answer(404, b"<Error><Code>NoSuchBucket</Code></Error>")
        elif not key or not key[0]:
            self.listing(parse_qs(url.query).get("prefix", [""])[0])
        elif key[0] not in self.bucket.objects:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            self.object(self.bucket.objects[key[0]])

    def do_PUT(self) -> None:
        _, bucket, key = unquote(urlsplit(self.path).path).split("/", 2)
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.bucket.objects[key] = data
        self.answer(200, b"", {"ETag": f'"{_etag(data)}"'})

    def listing(self, prefix: str) -> None:
        keys = [key for key in sorted(self.bucket.objects) if key.startswith(prefix)]
        inside = {
            prefix + key.removeprefix(prefix).partition("/")[0] + "/"
            for key in keys
            if "/" in key[len(prefix) :]
        }
        own = [key for key in keys if "/" not in key[len(prefix) :]]
        contents = "".join(
            f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{_etag(self.bucket.objects[key])}&quot;</ETag><Size>{len(self.bucket.objects[key])}</Size>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
            for key in own
        )
        folders = "".join(
            f"<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>" for name in sorted(inside)
        )
        text = (
            '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{self.bucket.name}</Name><Prefix>{prefix}</Prefix><Delimiter>/</Delimiter><MaxKeys>1000</MaxKeys>"
            f"<KeyCount>{len(own) + len(inside)}</KeyCount><IsTruncated>false</IsTruncated>{contents}{folders}"
            "</ListBucketResult>"
        )
        self.answer(200, text.encode(), {"Content-Type": "application/xml"})

    def object(self, body: bytes) -> None:
        headers = {"ETag": f'"{_etag(body)}"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        whole, status = len(body), 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or ""):
            start, stop = int(wanted[1]), min(int(wanted[2] or whole) + 1, whole)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{whole}"
            body, status = body[start:stop], 206
        if self.command == "GET":
            self.bucket.sent += len(body)
        self.answer(status, body, headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _etag(body: bytes) -> str:
    return hashlib.md5(body).hexdigest()
