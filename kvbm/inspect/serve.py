# SPDX-License-Identifier: Apache-2.0
"""`serve`: what `top` shows, as one web page.

Three addresses: ``/`` is the page, ``/instances.json`` the names on this host, ``/frame.json`` one
picture of an instance. The page asks for pictures and draws the charts itself; nothing is read from
a segment while nobody asks. It needs nothing from elsewhere, so it works without a network.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import threading
from collections.abc import Callable, Iterable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from kvbm.closing import end_asked_for
from kvbm.errors import InspectError
from kvbm.inspect.follow import Follower
from kvbm.inspect.frame import frame
from kvbm.inspect.report import SCHEMA

REQUEST_SECS = 2.0
"""A client that sends nothing for so long is let go."""

# The page needs its own style, script and pictures, and nothing else may run or be asked in it.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
)


class PageServer(ThreadingHTTPServer):
    """Serves the page and its data until it is closed.

    Parameters
    ----------
    instances : callable
        Names of the instances to show.
    port : int
        0: one that is free.
    address : str
        Where to listen.

    Raises
    ------
    OSError
        The port is in use, or the address is none of this host.
    """

    daemon_threads = False  # so that closing waits for those that read a segment

    def __init__(self, instances: Callable[[], Iterable[str]], port: int, address: str) -> None:
        self.instances = instances
        self.page = files("kvbm.inspect").joinpath("page.html").read_bytes()
        self._follower = Follower()
        self._lock = threading.Lock()
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family = found[0][0]
        super().__init__((address, port), Handler)

    def server_bind(self) -> None:
        """Bind without asking a name server what this host is called."""
        TCPServer.server_bind(self)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server_address[1])

    @property
    def is_local(self) -> bool:
        """Whether only this host can reach it."""
        return ipaddress.ip_address(str(self.server_address[0])).is_loopback

    def picture(self, instance: str) -> dict[str, Any]:
        """One picture of an instance.

        Raises
        ------
        InspectError
            There is no such instance among those that are shown, or it cannot be read.
        """
        names = list(self.instances())
        if instance not in names:
            raise InspectError(f"there is no instance {instance!r}")
        with self._lock:
            self._follower.keep(names)
            return frame(*self._follower.look_with_disk(instance))

    def server_close(self) -> None:
        """Stop listening, and close what is followed."""
        super().server_close()
        with self._lock:
            self._follower.close()


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    server: PageServer
    timeout = REQUEST_SECS

    def do_GET(self) -> None:
        """Send the page or one of its documents."""
        if not self._is_asked_by_name_of_this_host():
            self._send_json({"error": "this page is for this host alone"}, HTTPStatus.FORBIDDEN)
            return
        address = urlsplit(self.path)
        if address.path == "/":
            self._send("text/html; charset=utf-8", self.server.page)
        elif address.path == "/instances.json":
            self._send_json({"command": "list", "instances": sorted(self.server.instances())})
        elif address.path == "/frame.json":
            self._send_frame(parse_qs(address.query).get("instance", [""])[0])
        else:
            self._send_json({"error": f"there is no {address.path}"}, HTTPStatus.NOT_FOUND)

    def _is_asked_by_name_of_this_host(self) -> bool:
        """No other site may read a local page by a name of its own that it lets point here."""
        if not self.server.is_local:
            return True
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        return host in ("localhost", "127.0.0.1", "::1", self.server.server_address[0])

    def _send_frame(self, instance: str) -> None:
        try:
            self._send_json({"command": "top", **self.server.picture(instance)})
        except InspectError as error:
            self._send_json({"error": str(error)}, HTTPStatus.NOT_FOUND)

    def _send_json(self, body: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        document = json.dumps({"schema": SCHEMA, **body}).encode()
        self._send("application/json", document, status)

    def _send(self, kind: str, body: bytes, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing: a page asks twice a second."""


def run(
    instances: Callable[[], Iterable[str]],
    port: int,
    address: str,
    listening: Callable[[str], None],
) -> None:
    """Serve until a signal ends it.

    Parameters
    ----------
    instances : callable
        Names of those that may be looked at.
    port, address
        Where to listen; port 0 is one that is free.
    listening : callable
        Told the page's address once it can be asked for.

    Raises
    ------
    InspectError
        The address cannot be listened on.
    """
    try:
        server = PageServer(instances, port, address)
    except OSError as error:
        raise InspectError(f"cannot listen on {address}:{port}: {error.strerror}") from None
    with end_asked_for() as wait:
        thread = threading.Thread(target=server.serve_forever, name="kvbm-serve")
        thread.start()
        host = f"[{address}]" if ":" in address else address
        listening(f"http://{host}:{server.port}/")
        wait()
        server.shutdown()
        thread.join()
        server.server_close()
