"""Cache advice: refusals name the ceiling, a tier is advised only where it pays, and waste is counted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from optiinfra_pipelines.analysis.kv_cache.curve import Reuse, measure_reuse, summarize_reuse
from optiinfra_pipelines.analysis.kv_cache.sizing import (
    GIB,
    curve_from_reuse_histogram,
    fragmentation_ratio,
    memory_waste,
    recommend_cache,
    refuse_goal,
)
from optiinfra_pipelines.domain.kv_cache import CacheAdvice, Memory

BLOCK = 16
BYTES_PER_TOKEN = 2 * GIB / BLOCK / 100  # 100 blocks to 2 GiB: sizes are easy to read


def loop(distinct: int, requests: int = 3000) -> Reuse:
    """One-block requests over `distinct` blocks in turn: LRU serves nothing under `distinct`, all from there."""
    ids = [[number % distinct] for number in range(requests)]
    return measure_reuse(pl.DataFrame({"hash_ids": ids}), block_size=BLOCK)


def advice(reuse: Reuse, *tiers: Memory, **changed: Any) -> CacheAdvice:
    given: dict[str, Any] = {
        "bytes_per_token": BYTES_PER_TOKEN,
        "present_gpu_bytes": 1 * GIB,
        "prefill_tokens_per_second": 1000.0,
        "input_tokens_per_hour": 1e6,
        "usd_per_replica_hour": 3.6,
    }
    return recommend_cache("chat", reuse, tiers=tiers, **(given | changed))


def cpu(**changed: Any) -> Memory:
    given = {"tier": "cpu", "max_bytes": 64 * GIB, "load_bytes_per_second": 25e9, "usd_per_gib_hour": 0.01}
    return Memory(**(given | changed))


def test_a_tier_is_sized_at_the_step_of_the_curve_and_its_payback_adds_up() -> None:
    """200 blocks in turn need 200 blocks, 4 GiB: all reuse is served, less the time to load it."""
    tier = advice(loop(200), cpu()).tiers[0]

    assert tier.size_bytes == 4 * GIB
    hit_ratio = 1 - 200 / 3000
    assert (tier.hit_ratio_before, tier.hit_ratio_after) == (0, pytest.approx(hit_ratio))
    seconds = 1e6 * hit_ratio * (1 / 1000 - BYTES_PER_TOKEN / 25e9)
    assert tier.saved_prefill_seconds_per_hour == pytest.approx(seconds)
    assert tier.saved_gpu_usd_per_hour == pytest.approx(seconds / 1000)
    assert (tier.memory_usd_per_hour, tier.pays) == (pytest.approx(0.04), True)


def test_a_tier_slower_than_computing_is_not_advised() -> None:
    """Loading must beat recomputing: the comparison per token is the reason given."""
    tier = advice(loop(200), cpu(load_bytes_per_second=BYTES_PER_TOKEN * 900)).tiers[0]
    assert (tier.size_bytes, tier.pays) == (0, False)
    assert "loading a token takes 1111.1 us, computing it again 1000.0 us" in tier.reason


def test_memory_that_costs_more_than_it_saves_is_not_advised() -> None:
    """Prices decide where they are known."""
    tier = advice(loop(200), cpu(usd_per_gib_hour=1.0)).tiers[0]
    assert (tier.size_bytes, tier.pays) == (0, False)


def test_without_a_price_whether_it_pays_is_unknown() -> None:
    """The size that serves most of the ceiling is shown; no verdict is invented."""
    tier = advice(loop(200), cpu(usd_per_gib_hour=None)).tiers[0]
    assert (tier.size_bytes, tier.pays, tier.memory_usd_per_hour) == (4 * GIB, None, None)
    unknown_speed = advice(loop(200), cpu(load_bytes_per_second=None)).tiers[0]
    assert (unknown_speed.size_bytes, unknown_speed.pays) == (0, None)
    assert "load speed" in unknown_speed.reason


def test_a_tier_behind_a_larger_one_adds_nothing() -> None:
    """Tiers hold copies: what the GPU serves already is not served again by 1 GiB of CPU memory."""
    tier = advice(loop(20), cpu(max_bytes=1 * GIB)).tiers[0]
    assert (tier.size_bytes, tier.pays) == (0, False)
    beyond = advice(loop(20), cpu()).tiers[0]
    assert (beyond.size_bytes, beyond.pays) == (0, False)


def test_thin_evidence_is_an_abstention() -> None:
    """A few hundred requests are mostly first uses; blocks without a size are no bytes."""
    assert "requests: too few" in (advice(loop(5, requests=300), cpu()).abstention or "")
    bare = measure_reuse(pl.DataFrame({"hash_ids": [[n % 7] for n in range(2000)]}))
    assert "block size is unknown" in (advice(bare, cpu()).abstention or "")
    assert "no block was used twice" in (advice(loop(4000), cpu()).abstention or "")


def test_an_impossible_goal_is_refused_with_the_ceiling() -> None:
    """90 % of the recorded conversations' tokens cannot be hits with any cache."""
    folder = os.environ.get("OPTIINFRA_DATA")
    if not folder:
        pytest.skip("OPTIINFRA_DATA is not set: the public traces are not part of the project")
    trace = pl.read_parquet(Path(folder) / "data/mooncake_conversation_blocks512.parquet")
    reuse = measure_reuse(trace)

    refusal = refuse_goal(summarize_reuse(reuse), 0.9)
    assert refusal is not None
    assert refusal.startswith("90% is impossible on this workload: the ceiling is 35.2%")
    assert refuse_goal(summarize_reuse(reuse), 0.35) is None
    assert advice(reuse, goal_hit_ratio=0.9).refusals == (refusal,)


def test_fragmentation_is_the_empty_part_of_last_blocks() -> None:
    """Half-empty last blocks on real lengths: 13.4 % at 512 tokens, under 0.6 % at 16."""
    assert fragmentation_ratio(pl.Series([8, 16]), 16) == pytest.approx(8 / 32)
    assert fragmentation_ratio(pl.Series([], dtype=pl.Int64), 16) is None
    folder = os.environ.get("OPTIINFRA_DATA")
    if folder:
        azure = pl.read_parquet(Path(folder) / "data/azure_llm_2023_conv_requests.parquet")
        lengths = azure["input_tokens"] + azure["output_tokens"]
        assert fragmentation_ratio(lengths, 512) == pytest.approx(0.134, abs=0.001)
        assert fragmentation_ratio(lengths, 16) == pytest.approx(0.0054, abs=0.0001)


def test_memory_free_at_the_peak_is_waste() -> None:
    """An engine that peaks at 47 % of its KV memory holds 53 % for nothing."""
    waste = memory_waste(100 * GIB, 0.47)
    assert waste.unused_at_peak_ratio == pytest.approx(0.53)
    assert waste.fragmentation_ratio is None
    with pytest.raises(ValueError, match="from 0 to 1"):
        memory_waste(1, 47)


def test_a_reuse_histogram_is_the_curve_at_its_bounds() -> None:
    """Buckets of stack distances, cumulative, are hit counts at each size; without lookups only shares are known."""
    curve = curve_from_reuse_histogram([10, 100, float("inf")], [30, 60, 80], lookups=200)
    assert curve["capacity_objects"].to_list() == [11, 101]
    assert curve["hit_ratio"].to_list() == [0.15, 0.3]
    assert curve["reuse_share_ratio"].to_list() == [0.375, 0.75]
    assert curve_from_reuse_histogram([10, float("inf")], [0, 0], None)["hit_ratio"].to_list() == [None]
    with pytest.raises(ValueError, match="Inf"):
        curve_from_reuse_histogram([10, 100], [1, 2], None)
