"""Logging: one line a person can read, or one JSON object a machine can; and only when something changed.

Here: how log lines look, what must never be in them, and `ChangeLog`, which turns a state seen in every tick into one
line per change. Which states there are is the callers' matter.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TextIO

import structlog

Change = Literal["up", "down", "down_otherwise", "back"]

_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@|(?i:\b(bearer|basic|token)\s+)[A-Za-z0-9+/_.=~\-]{4,}")
_SECRET_KEY = re.compile(r"authorization|password|secret|api_?key|(?<!num_)\btoken\b", re.IGNORECASE)
HIDDEN = "***"


def configure_logging(environ: Mapping[str, str], stream: TextIO | None = None) -> None:
    """Set the format from OPTIINFRA_LOG_FORMAT: `readable` (default) or `json`. Writes to `stream`, else stderr.

    Raises ValueError naming the variable when it holds anything else.
    """
    form = environ.get("OPTIINFRA_LOG_FORMAT") or "readable"
    if form not in ("readable", "json"):
        raise ValueError(f"OPTIINFRA_LOG_FORMAT is {form!r}; set it to 'readable' or 'json', or unset it")
    out = stream or sys.stderr
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
    ]
    # Tracebacks without local variables: those of a scrape hold request headers.
    processors += [structlog.processors.format_exc_info, hide_secrets]
    if form == "json":
        processors.append(structlog.processors.JSONRenderer(default=str))
    else:
        processors.append(structlog.dev.ConsoleRenderer(colors=out.isatty(), timestamp_key="at"))
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger("info"),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=False,
    )


def hide_secrets(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """structlog processor, the last line of defense: credentials in any text, and keys that name one, become ***."""
    for key, value in event.items():
        if _SECRET_KEY.search(key):
            event[key] = HIDDEN
        elif isinstance(value, str):
            event[key] = _CREDENTIALS.sub(_hidden, value)
    return event


def _hidden(match: re.Match[str]) -> str:
    return f"{match[1]} {HIDDEN}" if match[1] else f"{HIDDEN}@"


@dataclass(slots=True)
class _Seen:
    cause: str | None
    since: datetime


class ChangeLog:
    """Says once what changed about each named thing: down and why, down for another reason, back and after how long.

    subject: what the things are ("target", "host"), the key their name is logged under. Thread-safe.
    """

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._seen: dict[str, _Seen] = {}
        self._lock = threading.Lock()
        self._log = structlog.get_logger("optiinfra")

    def saw(self, name: str, cause: str | None, at: datetime, detail: str | None = None) -> Change | None:
        """Take note of one observation; returns what changed and logs it, or None when nothing did.

        cause: None when up, else a short word that stays the same while the reason does; detail may vary freely.
        """
        with self._lock:
            before = self._seen.get(name)
            if before is not None and before.cause == cause:
                return None
            is_first_trouble = before is None or before.cause is None
            since = at if before is None or is_first_trouble else before.since
            self._seen[name] = _Seen(cause, at if cause is None else since)
        about = {self._subject: name}
        if cause is None:
            if before is None:
                # Only for who asks: at the start of a large fleet these would be a thousand lines without news.
                self._log.debug(f"{self._subject}_up", **about)
                return "up"
            seconds = round((at - before.since).total_seconds(), 1)
            self._log.info(f"{self._subject}_back", **about, down_seconds=seconds, last_cause=before.cause)
            return "back"
        event = f"{self._subject}_down" if is_first_trouble else f"{self._subject}_down_otherwise"
        self._log.warning(event, **about, cause=cause, detail=detail)
        return "down" if is_first_trouble else "down_otherwise"

    def forget(self, keep: set[str]) -> None:
        """Drop what is remembered of things that are no longer watched."""
        with self._lock:
            self._seen = {name: seen for name, seen in self._seen.items() if name in keep}
