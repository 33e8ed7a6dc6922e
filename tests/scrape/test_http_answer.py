"""The HTTP answer reader against the answers RFC 9112 allows, and those it does not, cut at every place."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resources.scrape.answer import MAX_HEAD_BYTES, AnswerReader, BadAnswerError

PAGE = b"up 1\n" * 40
GOOD = {
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\n" + PAGE,
    "chunked": b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n64\r\n"
    + PAGE[:100]
    + b"\r\n64 ;a=b\r\n"
    + PAGE[100:]
    + b"\r\n0\r\nX-Trailer: 1\r\n\r\n",
    "interim": b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200\r\nContent-Length:200\r\n\r\n" + PAGE,
    "bare line feeds": b"HTTP/1.1 200 OK\nContent-Length: 200\n\n" + PAGE,
    "length said twice alike": b"HTTP/1.1 200 OK\r\nContent-Length: 200, 200\r\nContent-Length: 200\r\n\r\n" + PAGE,
}
UNTIL_CLOSE = b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n" + PAGE


def read(data: bytes, cuts: list[int]) -> tuple[AnswerReader, bytes]:
    reader = AnswerReader()
    body = b""
    edges = [0, *sorted(cuts), len(data)]
    for start, end in pairwise(edges):
        if start < end:
            reader.feed(data[start:end])
            body += reader.take()
    return reader, body


@pytest.mark.parametrize("name", GOOD)
@given(cuts=st.lists(st.integers(0, 300), max_size=12))
def test_an_answer_is_the_same_however_the_network_cuts_it(name: str, cuts: list[int]) -> None:
    """TCP has no messages: the page must not depend on which bytes came together."""
    reader, body = read(GOOD[name], [cut for cut in cuts if cut < len(GOOD[name])])

    assert body == PAGE
    assert reader.is_complete
    assert reader.is_reusable
    assert reader.head is not None
    assert reader.head.status == 200


@given(cuts=st.lists(st.integers(0, len(UNTIL_CLOSE)), max_size=8))
def test_without_a_length_the_close_is_the_end(cuts: list[int]) -> None:
    """Old exporters say nothing about length; such a connection is never used again."""
    reader, body = read(UNTIL_CLOSE, cuts)
    assert not reader.is_complete

    reader.eof()

    assert reader.is_complete
    assert not reader.is_reusable
    assert body == PAGE


@pytest.mark.parametrize("name", GOOD)
@given(data=st.data())
def test_an_answer_cut_short_is_never_taken_for_a_whole_one(name: str, data: st.DataObject) -> None:
    """Half a page would be half of the counters: every proper prefix is an error at the close."""
    kept = data.draw(st.integers(0, len(GOOD[name]) - 1))
    reader, _ = read(GOOD[name][:kept], [])

    assert not reader.is_complete
    with pytest.raises(BadAnswerError, match="the connection was closed"):
        reader.eof()


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (b"up 1\nup 2\n\n", "not with an HTTP"),
        (b"HTTP/2 200 OK\r\n\r\n", "not with an HTTP"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "switches protocols"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", "not one number"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", "not one number"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", "is not chunked"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "size in hex"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", "size in hex"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcdef\r\n", "longer than its size"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 2_000, "longer than 1024"),
        (b"HTTP/1.1 200 OK\r\nno colon here\r\n\r\n", "is not a header"),
        (b"HTTP/1.1 200 OK\r\nfolded: a\r\n b\r\n\r\n", "is not a header"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"a" * MAX_HEAD_BYTES, "longer than 65536"),
    ],
)
def test_what_is_no_answer_is_refused_with_its_cause(answer: bytes, cause: str) -> None:
    """A wrong port may speak anything; the row must say what came instead."""
    with pytest.raises(BadAnswerError, match=cause):
        AnswerReader().feed(answer)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nsurplus",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_a_connection_is_kept_only_when_its_answer_allows_it(answer: bytes) -> None:
    """Surplus bytes, or a length that could be read in two ways, would be taken for the next target's page."""
    reader = AnswerReader()
    reader.feed(answer)

    assert reader.is_complete
    assert not reader.is_reusable


def test_no_content_has_no_body() -> None:
    """A 204 is complete with its head, whatever it claims."""
    reader = AnswerReader()
    reader.feed(b"HTTP/1.1 204 No Content\r\nContent-Length: 10\r\n\r\n")

    assert reader.is_complete
    assert reader.take() == b""
