"""Read one HTTP/1.x answer from bytes as they arrive (RFC 9112).

Pure: bytes in, head and body pieces out; no socket, no clock. Connections, pooling and time limits are
`transport`; content codings (gzip) and what a page may be are `metrics_endpoint`.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

# Real heads are under 1 KiB; nginx and Go answer with at most 8 KiB and 1 MiB. Past 64 KiB it is not an exporter.
MAX_HEAD_BYTES = 65_536
# A chunk's size line is a few hex digits and seldom an extension.
MAX_CHUNK_LINE_BYTES = 1_024

_STATUS_LINE = re.compile(rb"HTTP/(1\.[01]) ([1-5][0-9]{2})(?: [^\r\n]*)?\Z")
_HEADER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*(.*?)[ \t]*\Z")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?\Z")
_DIGITS = re.compile(rb"[0-9]{1,15}\Z")

Framing = Literal["none", "length", "chunked", "until_close"]
Phase = Literal["head", "body", "chunk_size", "chunk_data", "chunk_end", "trailers", "complete"]


class BadAnswerError(ValueError):
    """What arrived is not an HTTP/1.x answer; the message says why."""


class Head(NamedTuple):
    """Status and headers of the final (not 1xx) answer."""

    status: int
    headers: list[tuple[bytes, bytes]]
    framing: Framing
    length: int
    is_keep_alive: bool


class AnswerReader:
    """Feed it what the socket gives; read `head` when it is there and `take()` the body as it comes.

    `is_complete` is True once the whole answer is in; `is_reusable` then says whether another request may
    follow on the connection. `eof()` tells it that the peer closed: an answer cut short raises BadAnswerError.
    """

    def __init__(self) -> None:
        self.head: Head | None = None
        self.has_bytes = False
        self._phase: Phase = "head"
        self._pending = bytearray()
        self._left = 0
        self._pieces: list[bytes] = []
        self._has_leftover = False

    @property
    def is_complete(self) -> bool:
        return self._phase == "complete"

    @property
    def is_reusable(self) -> bool:
        return self.is_complete and self.head is not None and self.head.is_keep_alive and not self._has_leftover

    @property
    def has_body_bytes(self) -> bool:
        return bool(self._pieces)

    def take(self) -> bytes:
        """Body bytes read since the last call, framing removed, content coding still on."""
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        return body

    def feed(self, data: bytes) -> None:
        self.has_bytes = True
        if self._phase == "body":
            self._body(data)
        elif self._phase == "complete":
            self._has_leftover = True
        else:
            self._pending += data
            self._advance()

    def eof(self) -> None:
        if self._phase == "body" and self.head is not None and self.head.framing == "until_close":
            self._phase = "complete"
        elif self._phase != "complete":
            raise BadAnswerError(f"the connection was closed {self._where()}")

    def _where(self) -> str:
        if self._phase == "head":
            return "inside the headers" if self._pending else "before an answer"
        if self._phase == "body":
            return f"{self._left} bytes before the end that Content-Length names"
        return "inside a chunked body"

    def _body(self, data: bytes) -> None:
        if self.head is not None and self.head.framing == "until_close":
            self._pieces.append(data)
            return
        if len(data) > self._left:
            self._has_leftover = True
            data = data[: self._left]
        self._left -= len(data)
        self._pieces.append(data)
        if self._left == 0:
            self._phase = "complete"

    def _advance(self) -> None:
        """Run the states that read lines until they want more bytes."""
        while True:
            if self._phase == "head":
                if not self._read_head():
                    return
            elif self._phase == "body":
                rest = bytes(self._pending)
                self._pending.clear()
                if rest:
                    self._body(rest)
                return
            elif self._phase == "chunk_data":
                if not self._read_chunk_data():
                    return
            elif self._phase == "complete":
                self._has_leftover = bool(self._pending)
                return
            elif not self._read_chunk_line():
                return

    def _line(self, limit: int) -> bytes | None:
        end = self._pending.find(b"\n")
        if end < 0:
            if len(self._pending) > limit:
                raise BadAnswerError(f"a line of a chunked body is longer than {limit} bytes")
            return None
        line = bytes(self._pending[:end]).removesuffix(b"\r")
        del self._pending[: end + 1]
        return line

    def _read_chunk_line(self) -> bool:
        line = self._line(MAX_HEAD_BYTES if self._phase == "trailers" else MAX_CHUNK_LINE_BYTES)
        if line is None:
            return False
        if self._phase == "chunk_end":
            if line:
                raise BadAnswerError("a chunk is longer than its size says")
            self._phase = "chunk_size"
        elif self._phase == "trailers":
            if not line:
                self._phase = "complete"
        else:
            size = _CHUNK_SIZE.match(line)
            if size is None:
                raise BadAnswerError(f"a chunk starts with {line[:40]!r}, not with its size in hex digits")
            self._left = int(size[1], 16)
            self._phase = "chunk_data" if self._left else "trailers"
        return True

    def _read_chunk_data(self) -> bool:
        data = bytes(self._pending[: self._left])
        if not data:
            return False
        del self._pending[: len(data)]
        self._left -= len(data)
        self._pieces.append(data)
        if self._left == 0:
            self._phase = "chunk_end"
        return True

    def _read_head(self) -> bool:
        match = re.search(rb"\r?\n\r?\n", self._pending)
        if match is None:
            if len(self._pending) > MAX_HEAD_BYTES:
                raise BadAnswerError(f"the headers are longer than {MAX_HEAD_BYTES} bytes")
            return False
        text = bytes(self._pending[: match.start()])
        del self._pending[: match.end()]
        head = parse_head(text)
        if head.status == 101:
            raise BadAnswerError("the server switches protocols (101), which nobody asked for")
        if head.status >= 200:  # 1xx: the final head is still to come
            self.head = head
            self._left = head.length
            if head.framing == "chunked":
                self._phase = "chunk_size"
            elif head.framing == "none" or (head.framing == "length" and head.length == 0):
                self._phase = "complete"
            else:
                self._phase = "body"
        return True


def parse_head(text: bytes) -> Head:
    """Status line and headers without the empty line that ends them. Raises BadAnswerError."""
    lines = text.replace(b"\r\n", b"\n").split(b"\n")
    start = _STATUS_LINE.match(lines[0])
    if start is None:
        raise BadAnswerError(f"the answer starts with {lines[0][:40]!r}, not with an HTTP/1.x status line")
    headers: list[tuple[bytes, bytes]] = []
    lengths: set[bytes] = set()
    codings: list[bytes] = []
    connection: set[bytes] = set()
    for line in lines[1:]:
        header = _HEADER.match(line)
        if header is None:
            raise BadAnswerError(f"{line[:40]!r} is not a header")
        name, value = header[1].lower(), header[2]
        headers.append((header[1], value))
        if name == b"content-length":
            lengths.update(part.strip() for part in value.split(b","))
        elif name == b"transfer-encoding":
            codings += [part.strip().lower() for part in value.split(b",")]
        elif name == b"connection":
            connection.update(part.strip().lower() for part in value.split(b","))
    status = int(start[2])
    framing, length = _framing(status, lengths, codings)
    is_keep_alive = (
        framing != "until_close"
        and b"close" not in connection
        and (start[1] == b"1.1" or b"keep-alive" in connection)
        and not (lengths and codings)  # RFC 9112 6.3: such an answer may be smuggling; never reuse
    )
    return Head(status, headers, framing, length, is_keep_alive)


def _framing(status: int, lengths: set[bytes], codings: list[bytes]) -> tuple[Framing, int]:
    """How the body ends (RFC 9112 section 6.3); the answer to a GET."""
    if status < 200 or status in (204, 304):
        return "none", 0
    if codings:
        if codings != [b"chunked"]:
            raise BadAnswerError(f"Transfer-Encoding {b', '.join(codings)[:40]!r} is not chunked")
        return "chunked", 0
    if not lengths:
        return "until_close", 0
    if len(lengths) > 1 or not _DIGITS.match(next(iter(lengths))):
        raise BadAnswerError(f"Content-Length is {b', '.join(sorted(lengths))[:40]!r}, not one number")
    return "length", int(next(iter(lengths)))
