"""A real HTTP server on 127.0.0.1 that can misbehave: what a scrape meets out there, byte by byte.

Each route is a handler that gets an Exchange and writes whatever it likes to the socket.
"""

from __future__ import annotations

import gzip
import itertools
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Self

Handler = Callable[["Exchange"], None]


@dataclass
class Exchange:
    """One request on one connection. `ordinal`: requests of this path so far, from 0."""

    connection: socket.socket
    path: str
    headers: Mapping[str, str]
    ordinal: int
    stopped: threading.Event
    close: bool = False

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)


@dataclass
class Loopback:
    """Serves `routes` until the `with` block ends; counts connections accepted and keeps what was asked, in order."""

    routes: dict[str, Handler]
    connections: int = 0
    requests: list[str] = field(default_factory=list)
    seen_headers: list[Mapping[str, str]] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._stopped = threading.Event()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._open):
            connection.close()
        self._thread.join(5)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                self._converse(connection)
            except OSError:
                pass  # the client hung up, which is what many tests are about
            finally:
                self._open.discard(connection)

    def _converse(self, connection: socket.socket) -> None:
        pending = b""
        while not self._stopped.is_set():
            while b"\r\n\r\n" not in pending:
                data = connection.recv(65_536)
                if not data:
                    return
                pending += data
                if pending.startswith(b"\x16\x03"):  # a TLS hello: servers without TLS answer in plain text
                    connection.sendall(answer(b"", code="400 Bad Request"))
                    return
            head, pending = pending.split(b"\r\n\r\n", 1)
            lines = head.decode("latin-1").split("\r\n")
            path = lines[0].split(" ")[1]
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
            exchange = Exchange(connection, path, headers, self.requests.count(path), self._stopped)
            self.requests.append(path)
            self.seen_headers.append(headers)
            self.routes.get(path, status(404))(exchange)
            if exchange.close:
                return


def answer(body: bytes, *headers: str, code: str = "200 OK", length: int | None = None) -> bytes:
    """A well-formed answer with a Content-Length (or a wrong one, where `length` says so)."""
    lines = [f"HTTP/1.1 {code}", *headers, f"Content-Length: {len(body) if length is None else length}", "", ""]
    return "\r\n".join(lines).encode() + body


def page(body: str | bytes, *headers: str) -> Handler:
    """A page, served as a real exporter does."""
    data = body.encode() if isinstance(body, str) else body
    return lambda exchange: exchange.send(answer(data, "Content-Type: text/plain; version=0.0.4", *headers))


def gzipped(body: bytes, *, keep: int | None = None) -> Handler:
    """A gzip page; with `keep`, only its first bytes, sent as if that were all."""
    return page(gzip.compress(body)[:keep], "Content-Encoding: gzip")


def status(code: int) -> Handler:
    return lambda exchange: exchange.send(answer(b"no", code=f"{code} Whatever"))


def redirect(location: str, code: int = 302) -> Handler:
    return lambda exchange: exchange.send(answer(b"", f"Location: {location}", code=f"{code} Found"))


def raw(data: bytes) -> Handler:
    """Exactly these bytes, then the connection is closed."""

    def handle(exchange: Exchange) -> None:
        exchange.send(data)
        exchange.close = True

    return handle


def chunked(pieces: list[bytes], *headers: str) -> Handler:
    def handle(exchange: Exchange) -> None:
        exchange.send("\r\n".join(["HTTP/1.1 200 OK", "Transfer-Encoding: chunked", *headers, "", ""]).encode())
        for piece in pieces:
            exchange.send(b"%x;ext=1\r\n%s\r\n" % (len(piece), piece))
        exchange.send(b"0\r\nTrailer: x\r\n\r\n")

    return handle


def silent(exchange: Exchange) -> None:
    """Takes the request and never answers."""
    exchange.stopped.wait(30)
    exchange.close = True


def endless(exchange: Exchange) -> None:
    """A valid page without an end, as fast as the socket takes it."""
    exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
    for number in itertools.count():
        if exchange.stopped.is_set():
            break
        exchange.send(b"".join(b'x_total{n="%d_%d"} 1\n' % (number, i) for i in range(4_000)))


def drip(exchange: Exchange) -> None:
    """A byte now and then, so that no single read ever times out."""
    exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while not exchange.stopped.wait(0.05):
        exchange.send(b"#")


def once_then_close(body: bytes) -> Handler:
    """Answers as if the connection stayed open, and then closes it: what uvicorn does to an idle client."""

    def handle(exchange: Exchange) -> None:
        exchange.send(answer(body))
        exchange.close = True

    return handle
