"""How much cache to have per replica: GPU, CPU and disk tier against what their reuse saves, and what is wasted now.

Pure: a reuse curve and measured speeds in, advice with its arithmetic out. The curve itself is `kv_cache`.
Tiers are read as inclusive (LMCache and engine offload keep copies of what the GPU holds): a tier of S bytes serves
what an LRU of S bytes serves, and only what exceeds the tier before it is its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import polars as pl

from optiinfra_pipelines.analysis.kv_cache.curve import Reuse, summarize_reuse
from optiinfra_pipelines.domain.kv_cache import CacheAdvice, Memory, MemoryWaste, ReuseSummary, TierAdvice

GIB = 1024**3
# Below this the curve is mostly first uses: the recorded conversation trace shows 20 % after 5 minutes (about 1,000
# requests) and 37 % after an hour.
MIN_REQUESTS = 1000
# Where memory has no price, the size that reaches this share of the ceiling: past it each point costs ever more
# (on the recorded conversation trace 95 -> 99 % takes half as much memory again).
UNPRICED_SHARE = 0.95


def refuse_goal(summary: ReuseSummary, goal_hit_ratio: float) -> str | None:
    """Why a hit-ratio goal (share of input tokens, 0-1) cannot be met on this workload; None where it can."""
    ceiling = summary.token_ceiling_ratio
    if ceiling is None:
        ceiling = summary.block_ceiling_ratio
    if ceiling is None or goal_hit_ratio <= ceiling:
        return None
    return (
        f"{goal_hit_ratio:.0%} is impossible on this workload: the ceiling is {ceiling:.1%}, which an infinite cache "
        f"would reach; {summary.unique_blocks:,} of {summary.references:,} block references are first uses"
    )


def recommend_cache(
    deployment: str,
    reuse: Reuse,
    *,
    bytes_per_token: float,
    present_gpu_bytes: float,
    tiers: Sequence[Memory],
    prefill_tokens_per_second: float | None,
    input_tokens_per_hour: float | None,
    usd_per_replica_hour: float | None,
    goal_hit_ratio: float | None = None,
) -> CacheAdvice:
    """Sizes per replica, tier by tier from the GPU outwards, with what each saves and costs.

    bytes_per_token: KV bytes of one token on the whole replica. tiers: what may be had, ordered outwards.
    prefill_tokens_per_second, input_tokens_per_hour: measured on one replica. usd_per_replica_hour: its GPUs.
    A tier beyond the GPU is advised only where loading a token is faster than computing it again, and with prices
    known, at the size where saved GPU time exceeds the memory's cost the most.
    """
    summary = summarize_reuse(reuse, bytes_per_token=bytes_per_token, weight="token")
    refusal = None if goal_hit_ratio is None else refuse_goal(summary, goal_hit_ratio)
    refusals = () if refusal is None else (refusal,)
    abstention = _abstention(summary)
    if abstention:
        return CacheAdvice(deployment=deployment, summary=summary, tiers=(), refusals=refusals, abstention=abstention)
    advised: list[TierAdvice] = []
    held = present_gpu_bytes
    for memory in tiers:
        advice = _advise(
            reuse, memory, held, bytes_per_token, prefill_tokens_per_second, input_tokens_per_hour, usd_per_replica_hour
        )
        advised.append(advice)
        held = max(held, advice.size_bytes)
    return CacheAdvice(deployment=deployment, summary=summary, tiers=tuple(advised), refusals=refusals)


def _abstention(summary: ReuseSummary) -> str | None:
    if summary.requests < MIN_REQUESTS:
        return f"{summary.requests} of {MIN_REQUESTS} requests: too few to tell first uses from reuse"
    if summary.block_size_tokens is None:
        return "the block size is unknown, so blocks cannot be turned into bytes: pass block_size"
    if not summary.token_ceiling_ratio:
        return "no block was used twice: no cache of any size would serve anything"
    return None


def _advise(
    reuse: Reuse,
    memory: Memory,
    held_bytes: float,
    bytes_per_token: float,
    prefill_tokens_per_second: float | None,
    input_tokens_per_hour: float | None,
    usd_per_replica_hour: float | None,
) -> TierAdvice:
    block_bytes = bytes_per_token * (reuse.trace.block_size or 1)
    before = _hit_ratio(reuse, held_bytes / block_bytes)
    saved_seconds_per_token = None if prefill_tokens_per_second is None else 1 / prefill_tokens_per_second
    load = None if memory.load_bytes_per_second is None else bytes_per_token / memory.load_bytes_per_second

    def nothing(reason: str, pays: bool | None) -> TierAdvice:
        return TierAdvice(
            tier=memory.tier,
            size_bytes=round(held_bytes) if memory.tier == "gpu" else 0,
            hit_ratio_before=before,
            hit_ratio_after=before,
            saved_prefill_seconds_per_hour=None if pays is None else 0.0,
            saved_gpu_usd_per_hour=None if pays is None else 0.0,
            memory_usd_per_hour=None if pays is None else 0.0,
            pays=pays,
            reason=reason,
        )

    if memory.max_bytes <= held_bytes:
        return nothing(
            f"{memory.max_bytes / GIB:.1f} GiB is no more than the {held_bytes / GIB:.1f} GiB held already", False
        )
    if memory.tier != "gpu":
        if load is None or saved_seconds_per_token is None:
            missing = "load speed of this tier" if load is None else "prefill speed of this replica"
            return nothing(f"the {missing} is not measured, so loading cannot be weighed against recomputing", None)
        if load >= saved_seconds_per_token:
            return nothing(
                f"loading a token takes {load * 1e6:.1f} us, computing it again {saved_seconds_per_token * 1e6:.1f} us",
                False,
            )
        saved_seconds_per_token -= load

    sizes = np.unique(np.concatenate([reuse.needs[reuse.needs * block_bytes <= memory.max_bytes], [0.0]])) * block_bytes
    sizes = np.ceil(np.concatenate([sizes[sizes > held_bytes], [memory.max_bytes]]) / GIB) * GIB
    sizes = np.unique(np.minimum(sizes, memory.max_bytes))
    after = reuse.hit_ratio((sizes / block_bytes).astype(np.int64), "token")
    priced = None not in (saved_seconds_per_token, input_tokens_per_hour, usd_per_replica_hour, memory.usd_per_gib_hour)
    seconds = usd = cost = None
    if priced:
        all_seconds = (after - before) * float(input_tokens_per_hour or 0) * float(saved_seconds_per_token or 0)
        all_usd = all_seconds / 3600 * float(usd_per_replica_hour or 0)
        all_cost = (sizes - (held_bytes if memory.tier == "gpu" else 0)) / GIB * float(memory.usd_per_gib_hour or 0)
        best = int(np.argmax(all_usd - all_cost))
        seconds, usd, cost = float(all_seconds[best]), float(all_usd[best]), float(all_cost[best])
        if usd <= cost:
            return nothing(
                f"at best it saves {usd:.4f} USD of GPU time an hour and costs {cost:.4f} "
                f"({sizes[best] / GIB:.0f} GiB, {before:.1%} -> {after[best]:.1%})",
                False,
            )
        reason = f"saves {usd:.4f} USD of GPU time an hour for {cost:.4f} of memory"
    else:
        ceiling = reuse.ceiling("token") or 0.0
        enough = after >= min(UNPRICED_SHARE * ceiling, float(after[-1]))
        best = int(np.argmax(enough))
        if after[best] <= before:
            return nothing(f"no reuse lies beyond the {held_bytes / GIB:.1f} GiB held already", False)
        if saved_seconds_per_token is not None and input_tokens_per_hour is not None:
            seconds = float((after[best] - before) * input_tokens_per_hour * saved_seconds_per_token)
        reason = f"the least that serves {after[best] / ceiling:.0%} of the ceiling; a price is missing to weigh it"
    return TierAdvice(
        tier=memory.tier,
        size_bytes=math.ceil(sizes[best]),
        hit_ratio_before=before,
        hit_ratio_after=min(float(after[best]), 1.0),
        saved_prefill_seconds_per_hour=seconds,
        saved_gpu_usd_per_hour=usd,
        memory_usd_per_hour=cost,
        pays=None if usd is None or cost is None else usd > cost,
        reason=reason,
    )


def _hit_ratio(reuse: Reuse, blocks: float) -> float:
    return min(float(reuse.hit_ratio(np.array([int(blocks)]), "token")[0]), 1.0)


def fragmentation_ratio(sequence_tokens: pl.Series, block_size: int) -> float | None:
    """Share of allocated KV tokens that hold nothing because the last block of a sequence is not full.

    sequence_tokens: length of each sequence (prompt and output). None without any sequence.
    """
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it is a number of tokens, at least 1")
    tokens = sequence_tokens.drop_nulls().to_numpy()
    allocated = int((-(-tokens // block_size) * block_size).sum())
    return 1 - float(tokens.sum()) / allocated if allocated else None


def memory_waste(
    reserved_bytes: float, peak_usage_ratio: float, sequence_tokens: pl.Series | None = None, block_size: int = 16
) -> MemoryWaste:
    """KV memory that a replica reserves and does not use: free even at the peak, and lost to fragmentation.

    peak_usage_ratio: highest KV-cache usage seen, 0-1, over a period that holds the busy hours.
    """
    if not 0 <= peak_usage_ratio <= 1:
        raise ValueError(f"peak_usage_ratio is {peak_usage_ratio}; KV-cache usage is a ratio from 0 to 1")
    return MemoryWaste(
        reserved_bytes=reserved_bytes,
        unused_at_peak_ratio=1 - peak_usage_ratio,
        unused_at_peak_bytes=reserved_bytes * (1 - peak_usage_ratio),
        fragmentation_ratio=None if sequence_tokens is None else fragmentation_ratio(sequence_tokens, block_size),
    )


def curve_from_reuse_histogram(bounds: Sequence[float], counts: Sequence[float], lookups: float | None) -> pl.DataFrame:
    """The reuse curve that a histogram of stack distances holds (LMCache's real_reuse_gap_objects).

    bounds: upper bucket bounds in objects, ascending, +Inf last; counts: reuses at or under each (cumulative);
    lookups: all lookups of the same time, first uses included, or None. Columns: capacity_objects, reuse_share_ratio
    (of reuses served at that size) and hit_ratio (NULL without lookups). Exact at the bounds, nothing in between.
    """
    if len(bounds) != len(counts) or list(bounds) != sorted(bounds) or not bounds or not math.isinf(bounds[-1]):
        raise ValueError("a histogram needs ascending bounds that end in +Inf, and as many cumulative counts")
    total = counts[-1]
    rows = [
        {
            "capacity_objects": bound + 1,  # distance d is served by d + 1 objects
            "reuse_share_ratio": count / total if total else None,
            "hit_ratio": count / lookups if lookups else None,
        }
        for bound, count in zip(bounds, counts, strict=True)
        if not math.isinf(bound)
    ]
    schema = {"capacity_objects": pl.Float64, "reuse_share_ratio": pl.Float64, "hit_ratio": pl.Float64}
    return pl.DataFrame(rows, schema=schema)
