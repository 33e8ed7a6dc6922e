"""Turn the body of an answer into a page of text: undo gzip or deflate, hold the size cap, refuse what is no page.

Pure: bytes in, text or a PageError out. Fetching is `metrics_endpoint`; what the text means is
`optiinfra_pipelines.exposition`.
"""

from __future__ import annotations

import zlib
from typing import Literal

PageErrorKind = Literal["too_large", "bad_encoding", "not_utf8", "empty", "html"]

# zlib's wbits: 31 reads a gzip wrapper, 15 a zlib one, -15 raw deflate (which some servers mean by "deflate").
_GZIP, _ZLIB, _RAW = 31, 15, -15


class PageError(Exception):
    """The body is not a page; `kind` from the closed list of error kinds, the message says what was found."""

    def __init__(self, kind: PageErrorKind, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class PageBody:
    """Collects a body piece by piece and never holds more than `max_bytes` after decompression.

    coding: the Content-Encoding header ('' when there is none). A compressed bomb is stopped at the cap while it is
    being unpacked. Raises PageError from `add` and `text`.
    """

    def __init__(self, coding: str, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._pieces: list[bytes] = []
        self._size = 0
        self._coding = coding.strip().lower().removeprefix("x-") or "identity"
        self._unpacker: zlib._Decompress | None = None
        self._has_started = False
        if self._coding not in ("identity", "gzip", "deflate"):
            raise PageError("bad_encoding", f"Content-Encoding is {coding[:40]!r}; gzip was asked for")
        if self._coding != "identity":
            self._unpacker = zlib.decompressobj(_GZIP if self._coding == "gzip" else _ZLIB)

    @property
    def size(self) -> int:
        """Bytes of the page so far, after decompression."""
        return self._size

    def add(self, data: bytes) -> None:
        if self._unpacker is None:
            self._keep(data)
            return
        while data:
            # One byte past the cap is enough to know; without max_length 64 kB can unpack to 64 MB at once.
            page = self._unpack(data)
            self._keep(page)
            data = self._unpacker.unconsumed_tail
            if self._unpacker.eof:
                data = self._unpacker.unused_data
                if not data.strip(b"\0"):  # the end, or the zeros that pad it
                    return
                self._unpacker = zlib.decompressobj(_GZIP)  # a gzip body may have several members (RFC 1952)
                self._has_started = False

    def _unpack(self, data: bytes) -> bytes:
        assert self._unpacker is not None
        limit = self._max_bytes - self._size + 1
        try:
            page = self._unpacker.decompress(data, limit)
        except zlib.error as error:
            if self._coding == "deflate" and not self._has_started:
                self._unpacker = zlib.decompressobj(_RAW)
                self._has_started = True
                return self._unpack(data)
            raise PageError("bad_encoding", f"the {self._coding} body cannot be unpacked: {error}") from None
        self._has_started = True
        return page

    def _keep(self, page: bytes) -> None:
        self._size += len(page)
        if self._size > self._max_bytes:
            self._pieces.clear()
            raise PageError("too_large", f"the page is larger than {self._max_bytes} bytes")
        self._pieces.append(page)

    def text(self) -> str:
        """The whole page, once every piece is in."""
        if self._unpacker is not None and not self._unpacker.eof and self._has_started:
            raise PageError("bad_encoding", f"the {self._coding} body ends in its middle, after {self._size} bytes")
        body = b"".join(self._pieces)
        try:
            text = body.decode("utf-8")
        except UnicodeDecodeError as error:
            line = body.count(b"\n", 0, error.start) + 1
            raise PageError(
                "not_utf8", f"line {line}, byte {error.start}: 0x{body[error.start]:02x} is not UTF-8"
            ) from None
        start = text[:512].lstrip("\ufeff \t\r\n")[:1]
        if not start and not text.strip():
            raise PageError("empty", "the answer has no content")
        if start == "<":
            title = " ".join(text[:80].split())
            raise PageError("html", f"an HTML or XML document, not metrics: {title!r}; is the path right?")
        return text
