"""A webhook on loopback that keeps what it is sent."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Iterator

from loopback import QuietHandler, listening


@dataclass
class Hook:
    """url: its address as apprise writes it, with a secret in its path. status: what it answers."""

    url: str = ""
    status: int = 200
    sent: list[dict[str, Any]] = field(default_factory=list)

    @property
    def titles(self) -> list[str]:
        return [message["title"] for message in self.sent]


@contextmanager
def webhook() -> Iterator[Hook]:
    hook = Hook()

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if hook.status == 200:
                hook.sent.append(json.loads(body))
            self.send_response(hook.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

    with listening(Handler) as port:
        hook.url = f"json://127.0.0.1:{port}/S3CR3T"
        yield hook
