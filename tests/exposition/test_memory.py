"""What a reader remembers: one layout per shape, never more than it may, and fast because of it."""

import gc
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from optiinfra_pipelines.exposition import Layout, Page, Reader, parse

FIXTURES = Path(__file__).parents[1] / "fixtures" / "exposition"
VLLM = (FIXTURES / "vllm_0.32.0_loaded_1.prom").read_text()
VLLM_LATER = (FIXTURES / "vllm_0.32.0_loaded_2.prom").read_text()
NODE = (FIXTURES / "node_exporter_1.5.0.prom").read_text()


def replica_page(replica: object) -> str:
    """The vLLM page of another replica: the same shape, other label values."""
    text = VLLM.replace('engine="0"', f'engine="replica {replica}"')
    assert text != VLLM
    return text


def test_a_shape_has_one_layout_however_its_pages_arrive() -> None:
    """With a key, without, under another key, as bytes, after pages of other shapes: a plan per layout stays valid."""
    reader = Reader()
    layout = reader.read(VLLM, "a").layout
    other = reader.read(NODE, "a").layout

    readings = [
        reader.read(VLLM_LATER, "a"),
        reader.read(VLLM_LATER),
        reader.read(VLLM, "b"),
        reader.read(VLLM.encode(), "c"),
    ]

    assert all(page.layout is layout for page in readings)
    assert other is not layout
    assert reader.read(NODE, "b").layout is other
    assert reader.layout_count == 2
    assert weakref.WeakKeyDictionary({layout: "plan"})[reader.read(VLLM).layout] == "plan"


def test_what_is_not_shape_does_not_make_a_layout() -> None:
    """Comments that change with every scrape, HELP texts, spacing and timestamps leave the layout as it is."""
    reader = Reader()
    layout = reader.read('# TYPE m gauge\nm{a="b"} 1\n', "t").layout

    for text in (
        '# made at 12:00:01\n# TYPE m gauge\nm{a="b"} 2\n',
        '# made at 12:00:02\n# HELP m Other words.\n# TYPE m gauge\nm { a = "b", }  3 1395066363000\n',
        '# TYPE m gauge\nm{a="b"} 4 # {trace_id="x"} 1\n# EOF',
    ):
        assert reader.read(text, "t").layout is layout
    assert reader.read('# TYPE m counter\nm{a="b"} 1\n', "t").layout is not layout


def test_a_page_held_by_its_user_is_not_touched_by_later_reading() -> None:
    """Values are a new list each time."""
    reader = Reader()
    first = reader.read("m 1\n")

    second = reader.read("m 2\n")

    assert (first.values, second.values) == ([1.0], [2.0])
    assert isinstance(first, Page)
    assert isinstance(first.layout, Layout)


@pytest.mark.parametrize(("max_layouts", "max_bytes"), [(4, 2**40), (10**6, 2 * 2**20)])
def test_churn_of_labels_does_not_grow_the_memory(max_layouts: int, max_bytes: int) -> None:
    """30 replicas come and go, each with labels of its own: what is held stays within the bound that was set."""
    reader = Reader(max_layouts=max_layouts, max_bytes=max_bytes)
    reader.read(replica_page("warm up"))
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for replica in range(30):
            reader.read(replica_page(replica), replica)
        gc.collect()
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()

    assert 0 < reader.layout_count <= max_layouts
    assert reader.byte_count <= max_bytes
    assert reader.key_count <= reader.layout_count
    assert held < 1.2 * min(reader.byte_count, max_bytes)


@pytest.mark.parametrize(
    "line",
    [
        "m_{0}_{1} 1",
        'm{{a="{0}",b="{0}",c="{0}",d="{0}",e="{1}"}} 1',
        'm{{a="日本語日本語{0}{1}"}} 1',
        "# {0} {1}\n",
        "# TYPE m_{0}_{1} gauge",
    ],
)
def test_the_estimate_of_memory_holds_for_any_kind_of_page(line: str) -> None:
    """Many names, labels, types or comments, wide characters: what is really held is at most a fifth above it."""
    reader = Reader()
    reader.read("m 1\n")
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(4):
            reader.read("\n".join(line.format(number, position) for position in range(500)))
        gc.collect()
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()

    assert reader.layout_count == 5
    assert held < 1.2 * reader.byte_count


def test_a_layout_nobody_needs_any_more_is_gone() -> None:
    """Evicted and not held by a page: the plans that hang on it go too."""
    reader = Reader(max_layouts=1)
    gone = weakref.ref(reader.read("m 1\n", "a").layout)

    reader.read("n 1\n", "b")
    gc.collect()

    assert gone() is None
    assert (reader.layout_count, reader.key_count) == (1, 1)


def test_the_least_recently_read_shape_is_forgotten_first() -> None:
    """A target that is scraped again and again keeps its layout while others come and go."""
    reader = Reader(max_layouts=3)
    layout = reader.read("steady 1\n", "s").layout

    for number in range(50):
        reader.read(f"passing_{number} 1\n", "p")
        assert reader.read(f"steady {number}\n", "s").layout is layout


def test_a_page_larger_than_all_the_memory_is_read_and_not_remembered() -> None:
    """The bound is a bound on what is kept, not on what can be read."""
    reader = Reader(max_bytes=10_000)

    assert len(reader.read(VLLM, "t").values) == 505
    assert (reader.layout_count, reader.byte_count) == (0, 0)


def test_keys_without_end_are_bounded() -> None:
    """A caller that names each scrape anew costs speed at worst."""
    reader = Reader(max_keys=100)

    for key in range(1_000):
        assert reader.read("m 1\n", key).values == [1.0]
        assert reader.key_count <= 100


def test_threads_may_share_a_reader() -> None:
    """Four threads read and evict each other's shapes; every answer is right."""
    reader = Reader(max_layouts=2)
    texts = {
        f"m_{number}": f"m_{number} {number}\nx{{a='b'}}\n".replace("'", '"').replace("}\n", "} 7\n")
        for number in range(6)
    }
    wrong: list[object] = []

    def work() -> None:
        for turn in range(600):
            name = f"m_{turn % 6}"
            page = reader.read(texts[name], name)
            if page.layout.names[0] != name or page.values != [turn % 6, 7]:
                wrong.append((name, page))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []
    assert reader.layout_count <= 2


def cpu_seconds(work: Callable[[], object], runs: int) -> float:
    """Least CPU time of one run: what the work costs when nothing disturbs it."""
    best = float("inf")
    for _ in range(runs):
        start = time.process_time_ns()
        work()
        best = min(best, time.process_time_ns() - start)
    return best / 1e9


def test_a_recorded_vllm_page_reads_thirty_times_as_fast_as_with_prometheus_client() -> None:
    """CPU time, warm, side by side; the pages' values differ from one reading to the next."""
    reader = Reader()

    def read_both() -> None:
        reader.read(VLLM, "t")
        reader.read(VLLM_LATER, "t")

    def parse_both() -> None:
        parse(VLLM)
        parse(VLLM_LATER)

    read_both()
    parse_both()
    reference = 2 * cpu_seconds(lambda: list(text_string_to_metric_families(VLLM)), 8)

    assert reference / cpu_seconds(read_both, 40) > 30
    assert reference / cpu_seconds(parse_both, 40) > 30
