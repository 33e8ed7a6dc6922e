"""A lean HTTP/1.1 transport under httpx: GET over plain asyncio, keep-alive, nothing else.

Why: httpx's own transport (httpcore, h11, anyio) costs several times the CPU per page, and looks through its whole
pool at every request, so that a large fleet costs it the square: benchmarks/scrape_1000_targets.py prints both.
Here: connecting, the pool, sending, streaming the body under back-pressure. Not here: deadlines (the caller's
`asyncio.timeout`), redirects, content codings, proxies.
"""

from __future__ import annotations

import asyncio
import resource
import ssl
import time
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

import httpx

from resources.scrape.answer import AnswerReader, BadAnswerError

# One read may take a whole 62 kB page out of the kernel's buffer; shared by all connections of a loop because
# asyncio hands the filled part over before it reads again.
READ_BUFFER_BYTES = 262_144
# A reader that has fallen this far behind stops the socket instead of filling memory.
BACKLOG_BYTES = 1_048_576
# Longer than the longest cadence a fleet may set would keep sockets of targets that are gone.
IDLE_SECONDS = 90.0
# File descriptors left to everything else in the process: databases, logs, Dagster's own sockets.
RESERVED_DESCRIPTORS = 256


class Origin(NamedTuple):
    """What a pooled connection is good for."""

    scheme: str
    host: str
    port: int


class ClosedEarlyError(httpx.RemoteProtocolError):
    """The peer closed before the answer was complete."""


class _Connection(asyncio.BufferedProtocol):
    """One socket and the answer being read from it."""

    def __init__(self, origin: Origin, buffer: memoryview, on_closed: Callable[[_Connection], None]) -> None:
        self.origin = origin
        self._buffer = buffer
        self._on_closed = on_closed
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._is_paused = False
        self._backlog = 0
        self.reader = AnswerReader()
        self.is_closed = False
        self.idle_since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        try:
            self.reader.feed(bytes(self._buffer[:nbytes]))
        except BadAnswerError as error:
            self._fail(httpx.RemoteProtocolError(str(error)))
            return
        self._backlog += nbytes
        if self._backlog > BACKLOG_BYTES and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        try:
            self.reader.eof()
        except BadAnswerError as error:
            self._fail(ClosedEarlyError(str(error)))
        self.is_closed = True
        self._wake()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True
        if not self.reader.is_complete and self._error is None:
            try:
                self.reader.eof()
            except BadAnswerError as error:
                self._error = ClosedEarlyError(str(exc or error))
        self._on_closed(self)
        self._wake()

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self.close()
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _more(self) -> None:
        """Wait until bytes, the end or an error came."""
        if self._is_paused and self._transport is not None and not self.is_closed:
            self._is_paused = False
            self._transport.resume_reading()
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def send(self, request: bytes) -> None:
        self.reader = AnswerReader()
        self._backlog = 0
        if self._transport is not None:
            self._transport.write(request)

    async def head(self) -> None:
        """Wait for the head; raises ClosedEarlyError or RemoteProtocolError."""
        while self.reader.head is None:
            if self._error is not None:
                raise self._error
            if self.is_closed:
                raise ClosedEarlyError("the connection was closed before an answer")
            await self._more()

    async def body(self) -> AsyncIterator[bytes]:
        while True:
            if self.reader.has_body_bytes:
                self._backlog = 0
                yield self.reader.take()
            elif self.reader.is_complete:
                return
            elif self._error is not None:
                raise self._error
            else:
                await self._more()

    def close(self) -> None:
        self.is_closed = True
        if self._transport is not None:
            self._transport.abort()


class _Body(httpx.AsyncByteStream):
    """The body as httpx streams it; closing it gives the connection back or ends it."""

    def __init__(self, connection: _Connection, release: Callable[[_Connection], None]) -> None:
        self._connection = connection
        self._release = release

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._connection.body():
            yield piece

    async def aclose(self) -> None:
        self._release(self._connection)


class LeanTransport(httpx.AsyncBaseTransport):
    """HTTP/1.1 GET over asyncio with a keep-alive pool; use from one event loop.

    ssl_context: called once, when the first https target is asked.
    Raises httpx.ConnectError (the OSError is its __cause__), httpx.RemoteProtocolError, ClosedEarlyError.
    A request extension "on_connected" (a callable) is called once the request is on its way.
    """

    def __init__(
        self,
        *,
        ssl_context: Callable[[], ssl.SSLContext] = httpx.create_ssl_context,
        monotonic: Callable[[], float] = time.monotonic,
        max_idle: int | None = None,
    ) -> None:
        self._make_ssl_context = ssl_context
        self._ssl_context: ssl.SSLContext | None = None
        self._monotonic = monotonic
        self._max_idle = default_max_idle() if max_idle is None else max_idle
        self._idle: dict[Origin, list[_Connection]] = {}
        self._idle_count = 0
        self._open: set[_Connection] = set()
        self._buffer = memoryview(bytearray(READ_BUFFER_BYTES))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        origin = Origin(url.scheme, url.host, url.port or (443 if url.scheme == "https" else 80))
        wire = _wire(request)
        connection = self._reuse(origin)
        if connection is not None:
            try:
                return await self._exchange(connection, wire, request)
            except ClosedEarlyError:
                # Servers drop idle connections at will (uvicorn after 5 s, our very cadence) and the request may
                # cross the close: when not a byte came back, a GET is asked once more on a fresh connection.
                if connection.reader.has_bytes:
                    raise
        return await self._exchange(await self._connect(origin), wire, request)

    async def _exchange(self, connection: _Connection, wire: bytes, request: httpx.Request) -> httpx.Response:
        on_connected = request.extensions.get("on_connected")
        if on_connected is not None:
            on_connected()
        connection.send(wire)
        try:
            await connection.head()
        except BaseException:
            self._drop(connection)
            raise
        head = connection.reader.head
        assert head is not None
        return httpx.Response(head.status, headers=head.headers, stream=_Body(connection, self._release))

    async def _connect(self, origin: Origin) -> _Connection:
        context = self._tls() if origin.scheme == "https" else None
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(origin, self._buffer, self._forget),
                origin.host,
                origin.port,
                ssl=context,
                happy_eyeballs_delay=0.25,  # RFC 8305: localhost may be ::1 while the exporter listens on 127.0.0.1
            )
        except (OSError, UnicodeError) as error:  # ssl.SSLError, socket.gaierror; a name that IDNA cannot encode
            raise httpx.ConnectError(str(error)) from error
        self._open.add(connection)
        return connection

    def _tls(self) -> ssl.SSLContext:
        if self._ssl_context is None:
            self._ssl_context = self._make_ssl_context()
        return self._ssl_context

    def _reuse(self, origin: Origin) -> _Connection | None:
        connections = self._idle.get(origin)
        while connections:
            connection = connections.pop()
            self._idle_count -= 1
            is_fresh = self._monotonic() - connection.idle_since < IDLE_SECONDS
            # Bytes nobody asked for may have come meanwhile: such a connection answers the wrong question.
            if is_fresh and connection.reader.is_reusable and not connection.is_closed:
                return connection
            self._drop(connection)
        return None

    def _release(self, connection: _Connection) -> None:
        # A full pool closes what comes last: a fleet is asked in turn, so throwing out the oldest would make
        # every connection cold just before its turn.
        if connection.reader.is_reusable and not connection.is_closed and self._idle_count < self._max_idle:
            connection.idle_since = self._monotonic()
            self._idle.setdefault(connection.origin, []).append(connection)
            self._idle_count += 1
        else:
            self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        self._open.discard(connection)
        connection.close()

    def _forget(self, connection: _Connection) -> None:
        """The socket is gone; if it was idle, its place in the pool is free."""
        self._open.discard(connection)
        idle = self._idle.get(connection.origin, [])
        if connection in idle:
            idle.remove(connection)
            self._idle_count -= 1

    async def aclose(self) -> None:
        for connection in list(self._open):
            self._drop(connection)
        self._idle.clear()
        self._idle_count = 0
        await asyncio.sleep(0)  # abort() closes the sockets in the loop's next turn


def default_max_idle() -> int:
    """Connections that may be kept: what the descriptor limit leaves beside everything else, at least 16."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, (soft if soft != resource.RLIM_INFINITY else 65_536) // 2 - RESERVED_DESCRIPTORS)


def _wire(request: httpx.Request) -> bytes:
    lines = [b"%s %s HTTP/1.1" % (request.method.encode("ascii"), request.url.raw_path)]
    lines += [b"%s: %s" % header for header in request.headers.raw]
    return b"\r\n".join(lines) + b"\r\n\r\n"
