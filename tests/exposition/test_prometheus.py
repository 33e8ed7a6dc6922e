"""A real Prometheus server and this parser give the same verdict on thousands of damaged pages.

Needs `prometheus` on PATH (2.x or 3.x); run `pytest -n 0 -m engine`. Each page is a target of its own: the server's
`health` is its verdict, its stored samples are what it read. Differences must belong to a kind that `grammar` names.
"""

import json
import random
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from optiinfra_pipelines.exposition import ExpositionError, Reader

PAGE_COUNT = 2_000
SEEDS = [
    "# HELP m_a some \\n text", "# TYPE m_a counter", "#nospace", "#  HELP m_a", "# TYPE\tm_a\tgauge", "# EOF",
    'm_a{b="c",d="e"} 12.5', "m_a 12.5 1395066363000", 'm_a{b="\\\\x\\n\\"",} NaN', 'm_a { b = "c" , d = "e" }  +Inf  ',
    'm_a{b="c"}\t-3.5e-07', "m_a{}  0x1", "m_a .5", "m_a 5.", 'm_a{b="ü}{,"} 7', 'm_a{b="c\\q"} 4', "m_a 1e400",
    'm_a{b="c",b="d"} 1', 'm_a{__name__="x"} 1', "m_a 0 9223372036854775807", "m_a 1 # x", "m_a 1 2\t", "m_a 1\r",
    'm_a{b="c"}{d="e"} 1', "m_a{b='c'} 1", 'm_a{b="c"', "# TYPE m_a unknown", "m_a 1_0", "m_a 0x1p3", "m_a +nan",
]  # fmt: skip
CHARACTERS = list(' \t{}",=\\#:_-+.eEnN019abm\r\x0b\u00fc\nI')


def damaged_pages() -> list[str]:
    """Pages of one good line, one damaged line, and sometimes another good line or no final line feed."""
    dice = random.Random(42)
    pages = [f"first 1\n{seed}\n" for seed in SEEDS]
    while len(pages) < PAGE_COUNT:
        line = list(dice.choice(SEEDS))
        for _ in range(dice.choice([1, 1, 1, 2, 3])):
            at = dice.randrange(len(line) + 1)
            line[at : at + dice.randrange(2)] = dice.choice([[], [dice.choice(CHARACTERS)]])
        pages.append("first 1\n" + "".join(line) + dice.choice(["\n", "", "\nlast 2\n"]))
    return pages


@contextmanager
def served(pages: list[str]) -> Iterator[int]:
    """The pages at /page/0, /page/1, … of a loopback port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = pages[int(self.path.rpartition("/")[2])].encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def answer(base: str, path: str, **query: str) -> Any:
    with urllib.request.urlopen(f"{base}{path}?{urllib.parse.urlencode(query)}") as reply:
        return json.load(reply)["data"]


def scraped(server: str, pages: list[str], folder: Path) -> tuple[dict[int, str], dict[int, dict[Any, str]]]:
    """The last scrape error of each page ("" when it was accepted), and its samples by name and labels."""
    with served(pages) as port:
        targets = [
            {"targets": [f"127.0.0.1:{port}"], "labels": {"__metrics_path__": f"/page/{number}", "page": str(number)}}
            for number in range(len(pages))
        ]
        job = {"job_name": "j", "honor_labels": True, "honor_timestamps": False, "static_configs": targets}
        config = {"global": {"scrape_interval": "15s", "scrape_timeout": "15s"}, "scrape_configs": [job]}
        (folder / "prometheus.yml").write_text(json.dumps(config))
        listen = f"127.0.0.1:{free_port()}"
        process = subprocess.Popen(
            [server, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
             f"--web.listen-address={listen}", "--log.level=error"]
        )  # fmt: skip
        try:
            base, deadline = f"http://{listen}/api/v1", time.monotonic() + 90
            while True:
                try:
                    active = answer(base, "/targets", state="active")["activeTargets"]
                except OSError:
                    active = []
                if len(active) == len(pages) and all(target["health"] != "unknown" for target in active):
                    break
                assert time.monotonic() < deadline, "the server did not scrape every page"
                assert process.poll() is None
                threading.Event().wait(0.5)
            found = answer(base, "/query", query='{page!="",__name__!~"up|scrape_.*"}')["result"]
        finally:
            process.terminate()
            process.wait()
    samples: dict[int, dict[Any, str]] = {number: {} for number in range(len(pages))}
    for series in found:
        labels = {name: value for name, value in series["metric"].items() if name not in ("job", "instance")}
        number, name = int(labels.pop("page")), labels.pop("__name__")
        samples[number][name, tuple(sorted(labels.items()))] = repr(float(series["value"][1]))
    return {int(target["labels"]["page"]): target["lastError"] for target in active}, samples


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_known_difference(page: str, error: str, cause: str) -> bool:
    """Whether `grammar` names this kind of difference; error is the server's, cause is ours, "" for accepted."""
    if error and not cause:
        signed = "expected timestamp or new record" in error and any(mark in page for mark in (" +", " -", "# {"))
        return signed or '{__name__=" ' in error or '{__name__="\\t' in error
    stricter = ("no comma between", "expected a blank after metric name", "is given twice")
    raw_line_feed = "not a complete text in double quotes" in cause or "not closed" in cause
    no_blank = "is none of" in cause and re.search(r"TYPE[ \t]+[\w:]+[^ \t\w:]", page) is not None
    return any(words in cause for words in stricter) or raw_line_feed or no_blank


@pytest.mark.engine
@pytest.mark.timeout(240)
def test_a_prometheus_server_gives_the_same_verdict_and_the_same_samples(tmp_path: Path) -> None:
    """Accepted by both with equal samples, refused by both, or different for a reason that is written down."""
    server = shutil.which("prometheus")
    if server is None:
        pytest.skip("no `prometheus` on PATH (Debian: apt-get install prometheus)")
    pages = damaged_pages()
    errors, samples = scraped(server, pages, tmp_path)
    reader, accepted, refused, known, surprises = Reader(), 0, 0, 0, []

    for number, text in enumerate(pages):
        cause, ours = "", {}
        try:
            page = reader.read(text, number)
            for name, labels, value in zip(page.layout.names, page.layout.labels, page.values, strict=True):
                ours.setdefault((name, tuple(sorted(pair for pair in labels if pair[1]))), repr(value))
        except ExpositionError as broken:
            cause = str(broken)
        if bool(errors[number]) != bool(cause):
            known += is_known_difference(text, errors[number], cause)
            if not is_known_difference(text, errors[number], cause):
                surprises.append((text, errors[number], cause))
        elif cause:
            refused += 1
        elif ours == samples[number]:
            accepted += 1
        else:
            surprises.append((text, samples[number], ours))

    assert surprises == []
    assert accepted > PAGE_COUNT / 5
    assert refused > PAGE_COUNT / 5
    assert known < PAGE_COUNT / 10
