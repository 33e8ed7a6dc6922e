"""One tick over N loopback targets with recorded vLLM pages: wall and CPU of the collector, and Prometheus' beside it.

    python benchmarks/scrape_1000_targets.py RECORDINGS [--targets 1000] [--ticks 5]

RECORDINGS: a folder with recorded vLLM pages (*.prom, in subfolders), served in their order so that counters move.
Every target is its own port; the servers are separate processes whose CPU is not counted. They send gzip to whoever
asks for it, as vLLM does; both collectors ask. Prometheus is measured when it is installed (Debian: prometheus).
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median

import httpx

from optiinfra_pipelines.domain.fleet import Cadence, Fleet, Target
from optiinfra_pipelines.exposition import Page, Reader
from resources.scrape.engine_scraper import EngineScraper
from resources.scrape.metrics_endpoint import MetricsEndpoints
from resources.warehouse import Warehouse

SERVER_PROCESSES = 4
# Replicas of a fleet share a few dozen models; a label that differs makes the page another shape to the reader.
MODELS = 20
INTERVAL_SECONDS = 5
# What a tick over 1,000 targets may cost.
GOAL_WALL_SECONDS, GOAL_CPU_SECONDS = 5.0, 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", type=Path)
    parser.add_argument("--targets", type=int, default=1_000)
    parser.add_argument("--ticks", type=int, default=5)
    parser.add_argument("--prometheus", default=shutil.which("prometheus"), help="its binary; '' leaves it out")
    parser.add_argument("--serve", nargs=2, type=int, metavar=("FIRST", "COUNT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.recordings, *options.serve))
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ports = stack.enter_context(servers(options.recordings, options.targets))
        print(f"{options.targets} targets, {len(pages_of(options.recordings))} recorded pages, {os.cpu_count()} cores")
        ours = collector(folder, ports, options.ticks)
        httpx_own_transport(ports)
        if options.prometheus:
            theirs = prometheus(options.prometheus, folder, ports, options.ticks)
            print(f"CPU per page, ours / Prometheus: {ours:.3f} / {theirs:.3f} ms = {ours / theirs:.2f}")
        else:
            print("Prometheus is not installed: nothing to compare with")


def collector(folder: Path, ports: Sequence[int], ticks: int) -> float:
    """Print each warm tick's cost by step; returns CPU milliseconds per page, everything included (median tick)."""
    fleet = Fleet(targets=targets_of(ports), cadence=Cadence(scrape_concurrency=100))
    reader = TimedReader()
    warehouse = Warehouse(folder / "warehouse", clock=lambda: datetime.now(UTC))
    totals = []
    with MetricsEndpoints.of_fleet(fleet) as endpoints:
        scraper = EngineScraper(fleet, endpoints, reader)
        for tick in range(ticks + 2):  # the first two fill caches: connections, page shapes, plans
            begun = time.monotonic()
            reader.seconds = 0.0
            now = datetime.now(UTC)
            cpu = [time.process_time()]
            results = endpoints.scrape(fleet.targets, now)
            cpu.append(time.process_time())
            frames = scraper.frames_of(results)
            cpu.append(time.process_time())
            warehouse.append(f"tick-{tick}", frames)
            cpu.append(time.process_time())
            wall = time.monotonic() - begun
            up = sum(result.error_kind is None for result in results)
            fetch, frame, store = (1_000 * (after - before) / len(ports) for before, after in pairwise(cpu))
            parse = 1_000 * reader.seconds / len(ports)
            if tick >= 2:
                totals.append(cpu[-1] - cpu[0])
            print(
                f"{'tick' if tick >= 2 else 'cold'} {tick}: wall {wall:.2f} s, CPU {cpu[-1] - cpu[0]:.2f} s, {up} up; "
                f"ms CPU per page: fetch {fetch:.3f}, parse {parse:.3f}, normalize and frames {frame - parse:.3f}, "
                f"store {store:.3f}"
            )
            time.sleep(max(0.0, INTERVAL_SECONDS - wall))
    scaled = median(totals) * 1_000 / len(ports)
    print(
        f"median CPU for 1,000 targets: {scaled:.2f} s (goal {GOAL_CPU_SECONDS:g} s; wall goal {GOAL_WALL_SECONDS:g} s)"
    )
    return scaled


def httpx_own_transport(ports: Sequence[int]) -> None:
    """The same fetch through httpx's own transport, for the choice of ours."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    with MetricsEndpoints(deadline_seconds=60, transport=lambda: httpx.AsyncHTTPTransport(limits=limits)) as endpoints:
        for _ in range(3):
            cpu = time.process_time()
            results = endpoints.scrape(targets_of(ports), datetime.now(UTC))
            cpu = time.process_time() - cpu
    up = sum(result.error_kind is None for result in results)
    print(f"httpx's own transport: fetch {1_000 * cpu / len(ports):.3f} ms CPU per page, {up} up")


def prometheus(binary: str, folder: Path, ports: Sequence[int], ticks: int) -> float:
    """CPU milliseconds per page of a real Prometheus server over `ticks` intervals.

    Four intervals go before: series that are new cost more than series that go on.
    """
    config = {
        "global": {"scrape_interval": f"{INTERVAL_SECONDS}s", "scrape_timeout": f"{INTERVAL_SECONDS}s"},
        "scrape_configs": [
            {"job_name": "vllm", "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in ports]}]}
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    command = [
        binary,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        "--web.listen-address=127.0.0.1:0",
        "--log.level=error",
    ]
    with subprocess.Popen(command) as process:
        try:
            time.sleep(4 * INTERVAL_SECONDS)
            before, pages = cpu_seconds(process.pid), pages_served(ports)
            time.sleep(ticks * INTERVAL_SECONDS)
            used, scraped = cpu_seconds(process.pid) - before, pages_served(ports) - pages
        finally:
            process.terminate()
    version = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[:1]
    print(f"Prometheus: {used:.2f} s CPU for {scraped} pages of {ticks * len(ports)} due; {' '.join(version)}")
    return 1_000 * used / scraped


class TimedReader(Reader):
    """The collector's reader with a stopwatch of its thread's CPU."""

    seconds = 0.0

    def read(self, text: str | bytes, key: Hashable = None) -> Page:
        begun = time.thread_time()
        page = super().read(text, key)
        self.seconds += time.thread_time() - begun
        return page


def targets_of(ports: Sequence[int]) -> tuple[Target, ...]:
    return tuple(Target(name=f"replica-{i}", url=f"http://127.0.0.1:{port}/metrics") for i, port in enumerate(ports))


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pages_served(ports: Sequence[int]) -> int:
    """Pages that all servers have sent so far; any port of a server process knows its whole count."""
    each = len(ports) // SERVER_PROCESSES or 1
    firsts = [ports[start] for start in range(0, len(ports), each)][:SERVER_PROCESSES]
    return sum(int(httpx.get(f"http://127.0.0.1:{port}/count", trust_env=False).text) for port in firsts)


def pages_of(recordings: Path) -> list[Path]:
    found = sorted(recordings.rglob("*.prom"), key=lambda path: path.name)
    if not found:
        sys.exit(f"{recordings} holds no *.prom; name a folder with recorded vLLM pages")
    return found


@contextmanager
def servers(recordings: Path, count: int) -> Iterator[list[int]]:
    """Start the server processes; yields one port per target."""
    each = count // SERVER_PROCESSES or 1
    firsts = list(range(0, count, each))[:SERVER_PROCESSES]
    shares = [(first, (firsts[i + 1] if i + 1 < len(firsts) else count) - first) for i, first in enumerate(firsts)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(recordings), "--serve", str(first), str(share)], stdout=subprocess.PIPE
        )
        for first, share in shares
    ]
    try:
        yield [port for process in processes if process.stdout for port in json.loads(process.stdout.readline())]
    finally:
        for process in processes:
            process.terminate()
            process.wait()


async def serve(recordings: Path, first: int, count: int) -> None:
    """One server process: `count` ports, each a target that shows the recording from a place of its own."""
    texts = [path.read_bytes() for path in pages_of(recordings)]
    answers = {model: [answers_of(text, model) for text in texts] for model in range(min(MODELS, first + count))}
    served = [0]
    loop = asyncio.get_running_loop()
    ports = []
    for target in range(first, first + count):
        pages = answers[target % MODELS]
        start = target % len(pages)
        server = await loop.create_server(lambda p=pages, s=start: Server(p, s, served), "127.0.0.1", 0)  # type: ignore[misc]
        ports.append(server.sockets[0].getsockname()[1])
    print(json.dumps(ports), flush=True)
    await asyncio.Event().wait()


def answers_of(text: bytes, model: int) -> tuple[bytes, bytes]:
    """One recorded page of one model, as a whole answer: plain, and gzip as prometheus_client's own server packs it."""
    body = text.replace(b'model_name="small-llama"', b'model_name="small-llama-%d"' % model)
    head = b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/plain; version=0.0.4; charset=utf-8\r\n"
    packed = gzip.compress(body)
    return (
        head + b"content-length: %d\r\n\r\n" % len(body) + body,
        head + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(packed) + packed,
    )


class Server(asyncio.Protocol):
    """Answers each GET with the next page of the recording."""

    def __init__(self, pages: list[tuple[bytes, bytes]], start: int, served: list[int]) -> None:
        self._pages, self._next, self._served = pages, start, served
        self._pending = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._pending += data
        if not self._pending.endswith(b"\r\n\r\n"):
            return
        request, self._pending = self._pending, b""
        if request.startswith(b"GET /count"):
            count = b"%d" % self._served[0]
            self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(count) + count)
            return
        plain, packed = self._pages[self._next % len(self._pages)]
        self._next += 1
        self._served[0] += 1
        self._transport.write(packed if b"gzip" in request else plain)


if __name__ == "__main__":
    main()
