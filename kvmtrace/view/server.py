"""A web server for one reader on this machine: a page, and what its script asks of the recording.

It listens on the loopback address alone; every address begins with a token that only the one who started it knows; a
foreign Host header (a web site whose name was made to point here) is refused; it reads no files.
"""

from __future__ import annotations

import hmac
import json
import secrets
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ADDRESS = "127.0.0.1"
PAGE, STRETCH, FIND = "", "stretch", "find"
TYPES = {PAGE: "text/html; charset=utf-8", STRETCH: "application/octet-stream", FIND: "application/json"}
SILENT_S = 60.0  # a connection without a request
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class ViewServer(ThreadingHTTPServer):
    """Serves answers to whoever knows the token.

    Parameters
    ----------
    port : 0 for any that is free
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int = 0) -> None:
        super().__init__((ADDRESS, port), _Handler)
        self.token = secrets.token_urlsafe(24)
        self.answers: dict[str, Callable[[Mapping[str, str]], bytes]] = {}

    @property
    def path(self) -> str:
        """What every address begins with."""
        return f"/{self.token}/"

    @property
    def url(self) -> str:
        """The page's address."""
        return f"http://{ADDRESS}:{self.server_port}{self.path}"


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "kvmtrace", ""
    timeout = SILENT_S

    def do_GET(self) -> None:
        """Answer, or refuse."""
        try:
            status, kind, body = self._answer()
        except ValueError as error:  # what was asked for is none
            status, kind, body = HTTPStatus.BAD_REQUEST, "text/plain", f"{error}\n".encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 (the base class names it so)

    def _answer(self) -> tuple[HTTPStatus, str, bytes]:
        port = self.server.server_port
        if self.headers.get("Host") not in {f"{ADDRESS}:{port}", f"localhost:{port}"}:
            return HTTPStatus.FORBIDDEN, "text/plain", b"not the host of this viewer\n"
        asked = urlsplit(self.path)
        token, _, name = asked.path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()) or name not in self.server.answers:
            return HTTPStatus.NOT_FOUND, "text/plain", b"nothing here\n"
        given = {key: values[0] for key, values in parse_qs(asked.query).items()}
        return HTTPStatus.OK, TYPES[name], self.server.answers[name](given)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class names it so)
        """Say nothing: the terminal is the user's."""


def number(given: Mapping[str, str], name: str, low: int, high: int) -> int:
    """Return a number that was given, within bounds.

    Raises
    ------
    ValueError
        There is none.
    """
    text = given.get(name, "")
    if not text.removeprefix("-").isascii() or not text.removeprefix("-").isdigit() or len(text) > 20:
        raise ValueError(f"{name}: a number is needed")
    return min(max(int(text), low), high)


def as_json(value: object) -> bytes:
    """Return a value as the page's script reads it."""
    return json.dumps(value).encode()
