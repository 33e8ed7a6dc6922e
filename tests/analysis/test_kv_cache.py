"""The reuse curve: equal to a direct LRU simulation, bounded by its ceiling, and true to the published check values."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiinfra_pipelines.analysis.kv_cache import stack as kv_cache_stack
from optiinfra_pipelines.analysis.kv_cache.accesses import AccessError, block_trace
from optiinfra_pipelines.analysis.kv_cache.curve import (
    hit_ratio_by_period,
    hit_ratio_curve,
    measure_reuse,
    optimal_hit_ratio,
    summarize_reuse,
)

requests_of_blocks = st.lists(st.lists(st.integers(0, 12), max_size=6), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def data() -> Path:
    folder = os.environ.get("OPTIINFRA_DATA")
    if not folder:
        pytest.skip("OPTIINFRA_DATA is not set: the public traces are not part of the project")
    return Path(folder) / "data"


@pytest.fixture(scope="module")
def conversation(data: Path) -> pl.DataFrame:
    return pl.read_parquet(data / "mooncake_conversation_blocks512.parquet")


@pytest.fixture(scope="module")
def agent(data: Path) -> pl.DataFrame:
    return pl.read_parquet(data / "taubench_agent_prefix_blocks16.parquet").rename({"input_tokens_est": "input_tokens"})


def accesses(requests: list[list[int]]) -> pl.DataFrame:
    return pl.DataFrame({"hash_ids": requests}, schema={"hash_ids": pl.List(pl.Int64)})


def simulated_hits(requests: list[list[int]], capacity: int) -> list[int]:
    """Hits per request of a plain LRU cache, written the slow and obvious way."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = []
    for request in requests:
        hits.append(sum(block in cache for block in request))
        for block in reversed(request):
            cache.pop(block, None)
            cache[block] = None
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits


@given(requests_of_blocks)
def test_the_curve_equals_a_direct_simulation_at_every_capacity(requests: list[list[int]]) -> None:
    """Stack distances answer every cache size at once, with what one simulation per size would say."""
    capacities = list(range(15))
    curve = hit_ratio_curve(accesses(requests), capacities=capacities)
    references = sum(map(len, requests))
    for capacity, block_ratio, request_ratio in curve.select(
        "capacity_blocks", "block_hit_ratio", "request_hit_ratio"
    ).iter_rows():
        hits = simulated_hits(requests, capacity)
        if references:
            assert block_ratio == pytest.approx(sum(hits) / references, abs=1e-12)
        else:
            assert block_ratio is None
        shares = [hit / len(request) if request else 0.0 for hit, request in zip(hits, requests, strict=True)]
        assert request_ratio == pytest.approx(sum(shares) / len(requests), abs=1e-12)


@given(requests_of_blocks)
def test_the_curve_never_falls_and_ends_at_the_ceiling(requests: list[list[int]]) -> None:
    """More cache never serves less, and none serves more than the references that are not first uses."""
    reuse = measure_reuse(accesses(requests))
    ratios = hit_ratio_curve(reuse)["block_hit_ratio"].drop_nulls()
    assert ratios.is_sorted()
    references = sum(map(len, requests))
    if references:
        uses: dict[int, set[int]] = {}
        for number, request in enumerate(requests):
            for block in request:
                uses.setdefault(block, set()).add(number)
        again = sum(
            block in request and min(uses[block]) < n for n, request in enumerate(requests) for block in request
        )
        assert reuse.ceiling("block") == pytest.approx(again / references)
        assert ratios[-1] == pytest.approx(again / references)


@settings(deadline=None)  # the first call compiles
@given(requests_of_blocks)
def test_compiled_and_interpreted_kernels_agree(requests: list[list[int]]) -> None:
    """Tiny traces are interpreted, large ones compiled; the answer does not depend on which."""
    trace = block_trace(accesses(requests))
    sampled = np.arange(trace.unique_blocks) % 3
    small = (
        trace.dense,
        kv_cache_stack.stack_distances(trace.dense, trace.offsets, trace.unique_blocks),
        *kv_cache_stack.sampled_distances(trace.dense, trace.offsets, sampled, 2),
        kv_cache_stack.optimal_hits(trace.dense, trace.offsets, trace.unique_blocks, 3),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache_stack, "INTERPRETED_REFERENCES", -1)
        large = (
            kv_cache_stack.dense_ids(trace.ids)[0],
            kv_cache_stack.stack_distances(trace.dense, trace.offsets, trace.unique_blocks),
            *kv_cache_stack.sampled_distances(trace.dense, trace.offsets, sampled, 2),
            kv_cache_stack.optimal_hits(trace.dense, trace.offsets, trace.unique_blocks, 3),
        )
    for interpreted, compiled in zip(small, large, strict=True):
        np.testing.assert_array_equal(interpreted, compiled)


def best_hits(requests: list[list[int]], capacity: int) -> int:
    """The most hits any policy can have, by trying every content the cache could keep."""
    states = {frozenset[int](): 0}
    for request in requests:
        following: dict[frozenset[int], int] = {}
        for kept, hits in states.items():
            gained = hits + sum(block in kept for block in request)
            held = sorted(kept | set(request))
            for choice in range(1 << len(held)):
                content = frozenset(block for bit, block in enumerate(held) if choice >> bit & 1)
                if len(content) <= capacity and following.get(content, -1) < gained:
                    following[content] = gained
        states = following
    return max(states.values())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), max_size=3, unique=True), min_size=1, max_size=7), st.integers(0, 3))
def test_beladys_bound_is_the_best_that_any_policy_reaches(requests: list[list[int]], capacity: int) -> None:
    """Keeping what is needed soonest is optimal, so the bound is tight, not just above LRU."""
    references = sum(map(len, requests))
    ratio = optimal_hit_ratio(accesses(requests), [capacity])["block_hit_ratio"][0]
    if references:
        assert ratio * references == pytest.approx(best_hits(requests, capacity))


def test_tail_first_touching_keeps_the_head_of_a_prefix() -> None:
    """After a request of three blocks, a cache of one holds its first block: prefixes hit from the front."""
    curve = hit_ratio_curve(accesses([[1, 2, 3], [1], [3]]), capacities=[1, 2, 3])

    assert curve["block_hit_ratio"].to_list() == [0.2, 0.2, 0.4]


def test_a_block_of_the_same_request_is_no_hit() -> None:
    """All blocks are looked up at arrival, so a block named twice by its first request misses twice."""
    assert measure_reuse(accesses([[7, 7]])).ceiling("block") == 0.0


def test_a_partial_last_block_counts_for_its_tokens_and_a_rest_for_none() -> None:
    """The token ratio is a share of input tokens: 5 of 15 here, where 1 of 3 blocks hits a block of 10."""
    frame = accesses([[1], [1, 2]]).with_columns(input_tokens=pl.Series([5, 15]))
    assert measure_reuse(frame, block_size=10).ceiling("token") == pytest.approx(10 / 20)
    rest = accesses([[1], [1]]).with_columns(input_tokens=pl.Series([19, 11]))
    assert measure_reuse(rest, block_size=10).ceiling("token") == pytest.approx(10 / 30)


def test_unsigned_64_bit_hashes_are_told_apart() -> None:
    """Engines hash blocks to unsigned 64 bits, of which half do not fit a signed integer."""
    high = 2**64 - 1
    frame = pl.DataFrame({"hash_ids": [[high, 1], [high]]}, schema={"hash_ids": pl.List(pl.UInt64)})

    assert measure_reuse(frame).ceiling("block") == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("frame", "remedy"),
    [
        (pl.DataFrame({"ids": [[1]]}), "hash_ids"),
        (pl.DataFrame({"hash_ids": [[1, 2]], "input_tokens": [5], "block_size": [16]}), "is block_size right"),
        (pl.DataFrame({"hash_ids": [[1], [2]], "block_size": [16, 32]}), "one replica configuration at a time"),
        (pl.DataFrame({"hash_ids": [[1, None]]}), "null"),
        (pl.DataFrame({"hash_ids": [["a"]]}), "integers"),
        (pl.DataFrame({"hash_ids": [[1], [1]], "timestamp_ms": [5, 4]}), "sort"),
        (pl.DataFrame({"hash_ids": [[1, 2, 3]], "input_tokens": [7]}), "pass block_size"),
    ],
)
def test_impossible_accesses_name_the_remedy(frame: pl.DataFrame, remedy: str) -> None:
    """A trace that contradicts itself is refused with what to do about it."""
    with pytest.raises(AccessError, match=remedy):
        block_trace(frame)


def test_nothing_in_is_nothing_known_out() -> None:
    """Without requests there is no hit ratio: NULL, not zero."""
    empty = accesses([])
    curve = hit_ratio_curve(empty, capacities=[10])
    assert curve["block_hit_ratio"].to_list() == [None]
    assert summarize_reuse(empty).block_ceiling_ratio is None
    assert summarize_reuse(empty).sizes == ()
    assert hit_ratio_by_period(empty, [10]).is_empty()


def test_bytes_and_tokens_are_unknown_without_a_block_size() -> None:
    """Only what was given is multiplied: no block size, no tokens; no bytes per token, no bytes."""
    bare = hit_ratio_curve(accesses([[1], [1]]), capacities=[2])
    assert bare["capacity_tokens"].to_list() == [None]
    assert bare["token_hit_ratio"].to_list() == [None]
    sized = hit_ratio_curve(accesses([[1], [1]]), capacities=[2], block_size=16, bytes_per_token=100)
    assert (sized["capacity_tokens"][0], sized["capacity_bytes"][0]) == (32, 3200)


def test_the_conversation_trace_has_its_known_curve(conversation: pl.DataFrame) -> None:
    """Kimi conversations, first 36 minutes: ceilings in three weights, LRU at four sizes, five sizes for shares."""
    reuse = measure_reuse(conversation)
    assert reuse.trace.block_size == 512
    for weight, percent in (("block", 34.59), ("token", 35.25), ("request", 36.65)):
        assert 100 * (reuse.ceiling(weight) or 0) == pytest.approx(percent, abs=0.005)
    curve = hit_ratio_curve(reuse, capacities=[1000, 10_000, 30_000, 50_000])
    assert (curve["block_hit_ratio"] * 100).round(2).to_list() == [4.36, 20.57, 31.48, 34.18]
    assert [size.capacity_blocks for size in summarize_reuse(reuse).sizes] == [8047, 19_484, 28_134, 35_090, 52_696]


def test_the_conversation_curve_equals_its_simulation(conversation: pl.DataFrame) -> None:
    """On the whole recorded trace too, stack distances and a plain LRU cache give the same number of hits."""
    requests = conversation["hash_ids"].to_list()
    for capacity in (1000, 30_000):
        ratio = hit_ratio_curve(conversation, capacities=[capacity])["block_hit_ratio"][0]
        assert ratio == sum(simulated_hits(requests, capacity)) / 174_485


def test_the_agent_trace_has_its_known_curve(agent: pl.DataFrame) -> None:
    """Tool-calling conversations reuse 94 % of their blocks, and 253 blocks are enough for 95 % of that."""
    reuse = measure_reuse(agent)
    assert (len(reuse.trace.dense), reuse.trace.unique_blocks, reuse.trace.block_size) == (260_711, 14_993, 16)
    assert 100 * (reuse.ceiling("block") or 0) == pytest.approx(94.25, abs=0.005)
    curve = hit_ratio_curve(reuse, capacities=[200, 500])
    assert (curve["block_hit_ratio"] * 100).round(2).to_list() == [84.22, 94.24]
    assert reuse.size_for(0.95, "block") == 253


def test_a_small_optimal_cache_serves_what_lru_needs_many_times_the_blocks_for(conversation: pl.DataFrame) -> None:
    """Eviction policy beats size: the offline optimum reaches the ceiling with 10,000 blocks, LRU 21 %."""
    optimum = optimal_hit_ratio(conversation, [1000, 10_000])["block_hit_ratio"]
    assert optimum[1] == measure_reuse(conversation).ceiling("block")
    assert optimum[0] > 4 * hit_ratio_curve(conversation, capacities=[1000])["block_hit_ratio"][0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["conversation", "agent"])
def test_a_tenth_of_the_blocks_gives_the_curve_within_half_a_point(
    name: str, seed: int, request: pytest.FixtureRequest
) -> None:
    """At every size, not on average, and the size for 95 % of the ceiling is within 5 %."""
    frame = request.getfixturevalue(name)
    exact = measure_reuse(frame)
    sampled = measure_reuse(frame, sample_ratio=0.1, seed=seed)
    assert sampled.tracked_blocks <= 0.1 * exact.trace.unique_blocks
    sizes = np.unique(np.geomspace(1, exact.trace.unique_blocks, 300).astype(np.int64))
    for weight in ("block", "token", "request"):
        error = np.abs(exact.hit_ratio(sizes, weight) - sampled.hit_ratio(sizes, weight))
        assert error.max() <= 0.005
        assert sampled.ceiling(weight) == pytest.approx(exact.ceiling(weight), abs=1e-9)
    truth = exact.size_for(0.95, "block")
    assert sampled.size_for(0.95, "block") == pytest.approx(truth, rel=0.05)


def test_the_second_half_finds_a_warm_cache(conversation: pl.DataFrame) -> None:
    """A hit ratio grows with the length of the trace: the halves and the first minutes are told apart."""
    halves = hit_ratio_by_period(conversation, [10_000]).filter(pl.col("capacity_blocks").is_null())
    cold, warm = halves["block_hit_ratio"]
    assert warm - cold > 0.05
    minutes = hit_ratio_by_period(conversation, [], period_ms=5 * 60_000)
    assert minutes["requests"].sum() == conversation.height
    assert minutes["block_hit_ratio"][0] < 0.25 < minutes["block_hit_ratio"][-1]
