"""CPU time to read recorded pages: this parser and prometheus_client, side by side in one run.

    python benchmarks/parse_pages.py FIXTURES

FIXTURES holds recordings laid out as vllm/…, sglang/…, dynamo/…, node_exporter/…. Prints microseconds of CPU per page
(the least of many runs) and ratios; then 1,000 targets of one page shape, with equal and with different labels.
Cold: a reader that has seen nothing. Warm: it knows the shape; every second page is another scrape of that shape.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from optiinfra_pipelines.exposition import Reader, frames, parse

PAGES = {
    "vLLM": "vllm/0.32.0/small_llama_kv8k/03_loaded_shared_prefix_c8/*.prom",
    "SGLang": "sglang/0.5.23/collectors_in_process/0[34]*.prom",
    "Dynamo": "dynamo/1.6.1/frontend_kv_router_mocker/04_overload_c64/*.prom",
    "node_exporter": "node_exporter/real_debian12_*.prom",
}
TARGETS = 1_000


def cpu_microseconds(work: Callable[[], object], runs: int) -> float:
    """Least CPU time of one run."""
    best = float("inf")
    for _ in range(runs):
        start = time.process_time_ns()
        work()
        best = min(best, time.process_time_ns() - start)
    return best / 1e3


def parse_cold(text: str) -> None:
    """`parse` in a process that has parsed nothing."""
    frames.forget()
    parse(text)


def read_cold(text: str) -> None:
    """A new reader's first page."""
    Reader().read(text)


def parse_all(texts: list[str]) -> None:
    """Each page into a frame."""
    for text in texts:
        parse(text)


def read_all(reader: Reader, texts: list[str]) -> None:
    """Each page as the collector reads it."""
    for text in texts:
        reader.read(text, "target")


def read_with_client(text: str) -> None:
    """The reference."""
    for _ in text_string_to_metric_families(text):
        pass


def compare(fixtures: Path) -> None:
    """One row per exporter."""
    print(
        f"{'page':<14}{'kB':>5}{'samples':>9}{'client us':>11}"
        f"{'parse cold':>12}{'warm':>8}{'ratio':>8}{'read cold':>11}{'warm':>8}{'ratio':>8}"
    )
    for name, pattern in PAGES.items():
        texts = [path.read_text() for path in sorted(fixtures.glob(pattern))[:2]]
        first = texts[0]
        client = cpu_microseconds(partial(read_with_client, first), 12)
        cold_parse = cpu_microseconds(partial(parse_cold, first), 20)
        cold_read = cpu_microseconds(partial(read_cold, first), 20)
        warm_parse = cpu_microseconds(partial(parse_all, texts), 150) / len(texts)
        warm_read = cpu_microseconds(partial(read_all, Reader(), texts), 150) / len(texts)
        samples = len(Reader().read(first).values)
        print(
            f"{name:<14}{len(texts[0]) / 1e3:>5.0f}{samples:>9}{client:>11.0f}"
            f"{cold_parse:>12.0f}{warm_parse:>8.0f}{client / warm_parse:>7.0f}x"
            f"{cold_read:>11.0f}{warm_read:>8.0f}{client / warm_read:>7.0f}x"
        )


def fleet(fixtures: Path) -> None:
    """One tick over 1,000 targets with vLLM pages, first and later."""
    first, later = (path.read_text() for path in sorted(fixtures.glob(PAGES["vLLM"]))[:2])
    label = 'engine="0"'
    for kind in ("equal", "different"):
        reader = Reader()
        for tick, text in (("first", first), ("second", later)):
            bodies = [
                text.replace(label, f'engine="{number}"' if kind == "different" else label).encode()
                for number in range(TARGETS)
            ]
            start = time.process_time_ns()
            for number, body in enumerate(bodies):
                reader.read(body, number)
            spent = (time.process_time_ns() - start) / 1e9
            print(
                f"{TARGETS} targets, {kind} labels, {tick} tick: {spent / TARGETS * 1e6:.0f} us of CPU a page; "
                f"{reader.layout_count} layouts, {reader.byte_count / 2**20:.0f} MiB remembered"
            )


if __name__ == "__main__":
    compare(Path(sys.argv[1]))
    fleet(Path(sys.argv[1]))
