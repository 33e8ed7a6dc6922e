"""Serve recorded metrics pages over loopback HTTP, in their true order and pace.

Here: finding the pages of a recording, and the server. Not here: what to watch (`demo_fleet` in `fleet`) or
where recordings come from (PROVENANCE.md beside them). A recording is always called one: its target's `source` is
`recorded`.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

# Snapshots that were taken without times are shown this far apart, and the demo's screen says so.
UNTIMED_STEP_SECONDS = 30.0


@dataclass(frozen=True)
class RecordedPage:
    """One page: seconds since its recording's first page, the phase it was taken in, and the file."""

    offset_seconds: float
    phase: str
    path: Path


@dataclass(frozen=True)
class Recording:
    """The pages of one process, oldest first. `is_timed` is False when the pace was not recorded."""

    name: str
    pages: tuple[RecordedPage, ...]
    is_timed: bool

    @property
    def duration_seconds(self) -> float:
        return self.pages[-1].offset_seconds

    def page_at(self, elapsed_seconds: float) -> RecordedPage:
        """The page that was current then; the first before the start, the last after the end."""
        index = bisect_right([page.offset_seconds for page in self.pages], elapsed_seconds)
        return self.pages[max(index - 1, 0)]


def load_recording(name: str, folders: Iterable[Path]) -> Recording:
    """The recording made of every page in these folders.

    A page is `<unix milliseconds>[_note].prom`; files whose name holds no time are snapshots, taken in name order.
    Raises FileNotFoundError when the folders hold no page, and ValueError when they hold pages of both kinds.
    """
    files = sorted(path for folder in folders for path in folder.glob("*.prom"))
    if not files:
        raise FileNotFoundError(f"recording {name!r} has no *.prom page; restore tests/fixtures/recordings")
    stamps = {path: path.stem.split("_")[0] for path in files}
    timed = [path for path in files if stamps[path].isdigit() and len(stamps[path]) == 13]
    if timed and len(timed) != len(files):
        raise ValueError(f"recording {name!r} mixes pages with and without a time; give each its own recording")
    if not timed:
        pages = [RecordedPage(i * UNTIMED_STEP_SECONDS, path.stem, path) for i, path in enumerate(files)]
        return Recording(name, tuple(pages), is_timed=False)
    ordered = sorted(timed, key=lambda path: int(stamps[path]))
    start = int(stamps[ordered[0]])
    pages = [RecordedPage((int(stamps[path]) - start) / 1000, path.parent.name, path) for path in ordered]
    return Recording(name, tuple(pages), is_timed=True)


class ReplayServer:
    """All recordings on one loopback port: `http://127.0.0.1:<port>/<recording>/metrics`.

    `elapsed` tells how far the replay is, in seconds; it is asked at each request, so a caller may run it live or
    step it. Use as a context manager; the port is free again afterwards.
    """

    def __init__(self, recordings: Iterable[Recording], elapsed: Callable[[], float]) -> None:
        self._recordings = {recording.name: recording for recording in recordings}
        self._elapsed = elapsed
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="replay", daemon=True)

    def url(self, recording: str) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/{recording}/metrics"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        recordings, elapsed = self._recordings, self._elapsed

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # keep-alive, as the engines do

            def do_GET(self) -> None:
                recording = recordings.get(self.path.strip("/").removesuffix("/metrics"))
                if recording is None:
                    self.send_error(404, "no such recording")
                    return
                body = recording.page_at(elapsed()).path.read_bytes()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Silence: the collector's log tells what was read."""

        return Handler
