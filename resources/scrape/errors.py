"""Why a scrape gave no page: the closed list of kinds, and the words for each cause.

Here: naming what went wrong, with its remedy. Pure but for httpx's exception and request types. Asking is
`metrics_endpoint`.
"""

from __future__ import annotations

import errno
import socket
import ssl
from typing import Literal

import httpx

from resources.scrape.transport import ClosedEarlyError

ErrorKind = Literal[
    "connect_refused",
    "connect_timeout",
    "connect_failed",
    "dns",
    "tls",
    "deadline",
    "http_status",
    "redirect_refused",
    "too_large",
    "bad_encoding",
    "not_http",
    "not_utf8",
    "empty",
    "html",
    "malformed",
    "unknown_engine",
    "closed_early",
    "breaker_open",
    "internal",
    "idle_slot",
]
# "idle_slot" is no fault: a place for candidates of rollouts, in which nothing should run now.
# The endpoint answered in time and in full: what it serves is wrong, asking again costs nobody anything, and a
# repaired page should be seen in the next tick. And "internal" says nothing about the target. None opens the breaker.
NO_REASON_TO_WAIT: frozenset[ErrorKind] = frozenset(
    {"not_utf8", "empty", "html", "malformed", "unknown_engine", "internal"}
)

MAX_DETAIL_CHARACTERS = 300  # raw_scrapes.error_detail
_STATUS_REMEDY = {
    401: "; put the credentials under headers in fleet.yaml as ${NAME}",
    403: "; put the credentials under headers in fleet.yaml as ${NAME}",
    404: "; is the path right? Most engines serve /metrics, trtllm-serve /prometheus/metrics",
}


class FetchError(Exception):
    """A target's fault while fetching, already classified."""

    def __init__(self, kind: ErrorKind, detail: str) -> None:
        super().__init__(detail)
        self.kind: ErrorKind = kind


def classify(error: httpx.HTTPError) -> tuple[ErrorKind, str]:
    """The kind and the cause in words of what httpx raised."""
    cause = error.__cause__
    if isinstance(error, ClosedEarlyError):
        return "closed_early", str(error)
    if isinstance(error, httpx.ConnectError):
        if isinstance(cause, socket.gaierror):
            return "dns", f"the host name cannot be resolved: {cause.strerror or cause}"
        if isinstance(cause, UnicodeError):
            return "dns", impossible_host(cause)
        if isinstance(cause, ssl.SSLError):
            reason = getattr(cause, "verify_message", None) or cause.reason or str(cause)
            return "tls", f"TLS failed: {reason}; a private authority's certificate goes into SSL_CERT_FILE"
        # Several addresses (localhost) refused: asyncio then joins the messages and drops the number.
        if isinstance(cause, ConnectionRefusedError) or f"[Errno {errno.ECONNREFUSED}]" in str(error):
            return "connect_refused", "connection refused: nothing listens on that port"
        if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE):
            return "internal", "the collector has no file descriptors left; raise its limit (ulimit -n)"
        if isinstance(cause, TimeoutError):
            return "connect_timeout", "no connection: the network gave up; is the host up and the port open?"
        return "connect_failed", str(error) or type(error).__name__
    if isinstance(error, httpx.TimeoutException):
        return "deadline", str(error) or type(error).__name__
    if isinstance(error, httpx.RemoteProtocolError):
        return "not_http", str(error)
    return "closed_early", str(error) or type(error).__name__


def impossible_host(error: Exception) -> str:
    return f"no host can have this name: {error}; is it spelled right in fleet.yaml?"


def one_line(text: str) -> str:
    """Printable, on one line, at most 300 characters: what raw_scrapes.error_detail holds."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= MAX_DETAIL_CHARACTERS else line[: MAX_DETAIL_CHARACTERS - 1] + "…"


def same_origin(redirected: httpx.Request, asked: httpx.Request) -> httpx.Request:
    """The next request when the redirect stays on the same host and port (or goes from http to https there)."""
    old, new = asked.url, redirected.url
    if new.userinfo:
        raise FetchError("redirect_refused", f"redirect to {new.host} with credentials in the URL")
    is_upgrade = old.scheme == "http" and new.scheme == "https" and old.port is None and new.port is None
    if old.host == new.host and (is_upgrade or (old.scheme == new.scheme and old.port == new.port)):
        return redirected
    where = f"{new.scheme}://{new.netloc.decode('ascii')}"
    raise FetchError("redirect_refused", f"redirect to {where}; put the final URL into fleet.yaml if it is meant")


def status_detail(response: httpx.Response) -> str:
    code = response.status_code
    return f"HTTP {code} {response.reason_phrase}".rstrip() + _STATUS_REMEDY.get(code, "")
