"""Forward HTTP/1.1 requests to the servers of a pool, streams included, and count what became of them.

One request per connection on both sides: after the answer both are closed, so the end of an answer needs no parsing.
A request that no server has begun to read is tried at another one; one that was sent is never sent twice. Bodies pass
through untouched. Choosing is `pool`.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from resources.gateway.pool import Pool, Server

MAX_HEAD_BYTES = 64 * 1024
# Prompts of a million tokens are some megabytes.
MAX_BODY_BYTES = 64 * 2**20
CHUNK_BYTES = 64 * 1024
CONNECT_SECONDS = 2.0
# Longest silence on a stream, and longest wait for a client to send what it announced.
SILENCE_SECONDS = 60.0
CHECK_SECONDS = 0.5
CHECK_TIMEOUT_SECONDS = 2.0
_LAST_CHUNK = b"0\r\n\r\n"


class _BadRequestError(Exception):
    """A request that cannot be forwarded; the text goes to the client."""


@dataclass(frozen=True)
class _Head:
    first: str
    headers: tuple[tuple[str, str], ...]

    def get(self, name: str) -> str | None:
        found = [value for key, value in self.headers if key.lower() == name]
        return found[0] if found else None

    def to_bytes(self) -> bytes:
        """With `Connection: close`, whatever was asked for."""
        kept = [f"{key}: {value}" for key, value in self.headers if key.lower() not in ("connection", "keep-alive")]
        return "\r\n".join([self.first, *kept, "Connection: close", "", ""]).encode("latin-1")


class _Length:
    """Tells whether an answer came to its end: by its announced length, or by the last chunk."""

    def __init__(self, head: _Head, *, has_body: bool) -> None:
        announced = head.get("content-length")
        self._announced = int(announced) if has_body and announced is not None and announced.isdigit() else None
        self._is_chunked = has_body and (head.get("transfer-encoding") or "").lower() == "chunked"
        self._passed = 0
        self._tail = b""

    def add(self, chunk: bytes) -> None:
        self._passed += len(chunk)
        self._tail = (self._tail + chunk)[-len(_LAST_CHUNK) :]

    @property
    def is_reached(self) -> bool:
        if self._is_chunked:
            return self._tail == _LAST_CHUNK
        return self._announced is None or self._passed == self._announced


async def _read_head(reader: asyncio.StreamReader) -> _Head:
    raw = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SILENCE_SECONDS)
    first, *lines = raw[:-4].decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return _Head(first, tuple((key.strip(), value.strip()) for key, _, value in pairs))


async def _read_body(reader: asyncio.StreamReader, head: _Head) -> bytes:
    if head.get("transfer-encoding") is not None:
        raise _BadRequestError("chunked requests are not forwarded; send Content-Length")
    length = head.get("content-length") or "0"
    if not length.isdigit() or int(length) > MAX_BODY_BYTES:
        raise _BadRequestError(f"Content-Length {length} is not between 0 and {MAX_BODY_BYTES}")
    return await asyncio.wait_for(reader.readexactly(int(length)), SILENCE_SECONDS)


class Proxy:
    """Serves the clients of one pool."""

    def __init__(self, pool: Pool, health_path: str) -> None:
        self._pool = pool
        self._health_path = health_path

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client connection: one request, one answer."""
        try:
            head = await _read_head(reader)
            await self._forward(head, await _read_body(reader, head), writer)
        except _BadRequestError as error:
            await _answer(writer, "400 Bad Request", str(error))
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError, ConnectionError):
            pass  # the client left, or never said what it wanted
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError, TimeoutError):
                await writer.wait_closed()

    async def _forward(self, head: _Head, body: bytes, client: asyncio.StreamWriter) -> None:
        tried: list[str] = []
        while (server := self._pool.choose(tried)) is not None:
            tried.append(server.name)
            try:
                opened = asyncio.open_connection(server.settings.host, server.settings.port, limit=MAX_HEAD_BYTES)
                upstream = await asyncio.wait_for(opened, CONNECT_SECONDS)
            except (OSError, TimeoutError):
                server.not_connected += 1
                continue
            server.requests += 1
            server.in_flight += 1
            try:
                await self._exchange(server, head.to_bytes() + body, upstream, client)
            finally:
                server.in_flight -= 1
                upstream[1].close()
            return
        await _answer(client, "503 Service Unavailable", f"no server of {self._pool.backend} can take a request")

    async def _exchange(
        self,
        server: Server,
        request: bytes,
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        client: asyncio.StreamWriter,
    ) -> None:
        reader, writer = upstream
        try:
            writer.write(request)
            await writer.drain()
            answer = await _read_head(reader)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            server.broken_off += 1
            await _answer(client, "502 Bad Gateway", f"{server.name} gave no answer")
            return
        status = answer.first.split(" ")[1:2]
        if status and status[0].startswith("5"):
            server.refused_by_server += 1
        client.write(answer.to_bytes())
        is_whole = await self._pass_on(reader, client, _Length(answer, has_body=not request.startswith(b"HEAD ")))
        if not is_whole:
            # What was promised did not come. Cutting the client off tells it; a clean end would not.
            server.broken_off += 1
            client.transport.abort()

    @staticmethod
    async def _pass_on(reader: asyncio.StreamReader, client: asyncio.StreamWriter, length: _Length) -> bool:
        """Pass the answer's body on as it comes; False when the server broke it off."""
        while True:
            try:
                chunk = await asyncio.wait_for(reader.read(CHUNK_BYTES), SILENCE_SECONDS)
            except (OSError, TimeoutError):
                return False
            if not chunk:
                return length.is_reached
            length.add(chunk)
            client.write(chunk)
            await client.drain()

    async def check_for_ever(self) -> None:
        """Ask every server for its health, again and again."""
        while True:
            servers = list(self._pool.servers.values())
            found = await asyncio.gather(*(self._is_healthy(one) for one in servers))
            for server, is_good in zip(servers, found, strict=True):
                server.checked(is_good)
            await asyncio.sleep(CHECK_SECONDS)

    async def _is_healthy(self, server: Server) -> bool:
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(CHECK_TIMEOUT_SECONDS):
                reader, writer = await asyncio.open_connection(server.settings.host, server.settings.port)
                try:
                    host = f"{server.settings.host}:{server.settings.port}"
                    ask = f"GET {self._health_path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
                    writer.write(ask.encode("latin-1"))
                    head = await _read_head(reader)
                    return head.first.split(" ")[1:2] == ["200"]
                finally:
                    writer.close()
        return False


async def _answer(writer: asyncio.StreamWriter, status: str, text: str) -> None:
    body = text.encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode("latin-1") + body)
    with contextlib.suppress(ConnectionError):
        await writer.drain()
