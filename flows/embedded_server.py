"""The embedded Prefect server as a process: `python -P -m mergeline.flows.embedded_server FD`,
where FD is a socket that listens.

Every local user and every web page can send requests to loopback. Prefect asks for the password that is in its
environment; what stands around it here refuses requests under another name than loopback's (DNS rebinding) and from
pages of other origins, and proves to clients, before they send the password, that it is the server that knows it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

PROOF = "/mergeline-proof"  # GET {PROOF}?NONCE answers with proof(login, NONCE)


def proof(login: str, nonce: str) -> str:
    """What shows, to who knows `login` and chose `nonce`, that it is known to the other side, without telling it."""
    return hmac.new(login.encode(), f"mergeline {nonce}".encode(), hashlib.sha256).hexdigest()


def guarded(app: ASGIApp, port: int, login: str) -> ASGIApp:
    """`app`, for requests to loopback's own names, from no page but its own; and the proof."""
    from starlette.datastructures import Headers
    from starlette.responses import PlainTextResponse

    hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
    origins = {f"http://{host}" for host in hosts}

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        named = headers.getlist("host")
        if len(named) != 1 or named[0] not in hosts or not origins.issuperset(headers.getlist("origin")):
            refusal = "This server answers on loopback and its own pages only.\n"
            await PlainTextResponse(refusal, status_code=403)(scope, receive, send)
        elif scope["path"] == PROOF:
            nonce = scope["query_string"].decode("latin-1")
            await PlainTextResponse(proof(login, nonce))(scope, receive, send)
        else:
            await app(scope, receive, send)

    return guard


def _end_with_owner() -> None:
    """End when the owner does, even by kill -9: it holds the other end of stdin."""
    while os.read(0, 1):
        pass
    os._exit(0)


def _serve(listening: socket.socket) -> None:
    threading.Thread(target=_end_with_owner, daemon=True).start()
    os.umask(0o077)  # before Prefect makes its database
    import uvicorn
    from prefect.server.api.server import create_app

    port = listening.getsockname()[1]
    login = os.environ["PREFECT_SERVER_API_AUTH_STRING"]
    config = uvicorn.Config(lambda: guarded(create_app(), port, login), factory=True, log_level="warning")
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
