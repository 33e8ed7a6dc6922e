"""LMCache, both families: the connector inside an engine (`lmcache:*`) and the multi-process server (`lmcache_mp_*`).

The server from recorded pages of 0.5.6, the connector from its source and documentation. Tiers: l1 host memory,
l2 storage, remote, and `all` for what is counted over them. The two rate gauges of the connector ("since the last
log") lose what falls between two scrapes; the counters are used.
"""

from __future__ import annotations

from collections.abc import Mapping

from optiinfra_pipelines.engines.dialect import (
    Alternatives,
    Combine,
    Dialect,
    Expression,
    Histogram,
    Ignored,
    Need,
    Take,
    first,
    take,
)


def _counter(*names: str) -> Alternatives:
    """prometheus_client prints counters with _total; some builds kept gauges under the bare name."""
    return tuple(Take(f"lmcache:{name}{suffix}") for name in names for suffix in ("_total", ""))


_CONNECTOR_TIERS: Mapping[str, Mapping[str, Alternatives]] = {
    "all": {
        "lookup_requests_total": _counter("num_lookup_requests"),
        "requested_tokens_total": _counter("num_lookup_tokens", "num_lookup_requested_tokens", "num_requested_tokens"),
        "hit_tokens_total": _counter("num_lookup_hits", "num_lookup_hit_tokens", "num_hit_tokens"),
        "stored_tokens_total": _counter("num_stored_tokens", "num_store_stored_tokens"),
        "is_healthy": take("lmcache:lmcache_is_healthy", fold="same"),
    },
    "l1": {
        "used_bytes": take("lmcache:local_cache_usage"),
        "evicted_chunks_total": _counter("local_cpu_evict_keys_count", "local_cpu_evict_count"),
        "failures_total": _counter("local_cpu_evict_failed_count"),
    },
    "l2": {"used_bytes": take("lmcache:local_storage_usage")},
    "remote": {
        "used_bytes": take("lmcache:remote_cache_usage"),
        "read_bytes_total": _counter("num_remote_read_bytes"),
        "write_bytes_total": _counter("num_remote_write_bytes"),
    },
}

LMCACHE = Dialect(
    engine="lmcache",
    prefixes=("lmcache:",),
    vantage="cache",
    model_label="model_name",
    histograms=(
        Histogram("cache_load_seconds", ("lmcache:time_to_retrieve",), vantage="cache"),
        Histogram("cache_store_seconds", ("lmcache:time_to_store",), vantage="cache"),
        Histogram("cache_lookup_seconds", ("lmcache:time_to_lookup",), vantage="cache"),
    ),
    tiers=_CONNECTOR_TIERS,
    needs=(
        Need(("lmcache:num_lookup_tokens", "lmcache:num_lookup_requested_tokens", "lmcache:num_requested_tokens")),
        Need(("lmcache:num_lookup_hits", "lmcache:num_lookup_hit_tokens", "lmcache:num_hit_tokens")),
    ),
    ignored=(
        Ignored("rates since the last log: lossy", ("lmcache:*_hit_rate", "lmcache:request_cache_*")),
        Ignored(
            "requests and tokens of operations other than lookups",
            (
                "lmcache:num_retrieve_*",
                "lmcache:num_store_*",
                "lmcache:num_remote_*_requests",
                "lmcache:num_requested_tokens",
                "lmcache:num_hit_tokens",
                "lmcache:num_vllm_hit_tokens",
                "lmcache:num_prompt_tokens",
                "lmcache:num_*_by_backend",
            ),
        ),
        Ignored("speeds, and times of one backend", ("lmcache:*_speed", "lmcache:remote_time_*", "lmcache:*_time*")),
        Ignored("objects and queues inside the connector", ("lmcache:*_count", "lmcache:*_objs*", "lmcache:*_queue*")),
        Ignored("the controller's and the chunk statistics' own", ("lmcache:cache_controller_*", "lmcache:chunk_*")),
        Ignored("tasks in flight", ("lmcache:*_num", "lmcache:*_ping_*", "lmcache:*_tasks", "lmcache:lookup_0_hit_*")),
    ),
)

_L1_BYTES = Take("lmcache_mp_l1_memory_usage_bytes")
_L1_RATIO = Take("lmcache_mp_l1_usage_ratio", fold="same")


def _either(left: str, right: str) -> tuple[Expression, ...]:
    """The sum of two counters that appear at their first event; the one there is when the other has not appeared."""
    return (Combine("plus", Take(left), Take(right)), Take(left), Take(right))


LMCACHE_MP = Dialect(
    engine="lmcache_mp",
    prefixes=("lmcache_mp_",),
    vantage="cache",
    model_label="model_name",
    histograms=(
        Histogram("kv_block_lifetime_seconds", ("lmcache_mp_l1_chunk_lifetime_seconds",)),
        Histogram("kv_block_idle_seconds", ("lmcache_mp_l1_chunk_idle_before_evict_seconds",)),
        Histogram("kv_block_reuse_gap_seconds", ("lmcache_mp_l1_chunk_reuse_gap_seconds",)),
        # Accesses to other chunks between two reads of one: the distance that sizes a tier.
        Histogram(
            "kv_block_reuse_distance_blocks",
            ("lmcache_mp_real_reuse_gap_objects", "lmcache_mp_real_reuse_gap_objects_chunks"),
        ),
    ),
    tiers={
        "all": {
            "lookup_requests_total": take("lmcache_mp_lookups_requests_total"),
            "requested_tokens_total": take("lmcache_mp_lookup_requested_tokens_total"),
            "hit_tokens_total": take("lmcache_mp_lookup_hit_tokens_total"),
            "loaded_chunks_total": take("lmcache_mp_num_chunks_loaded_total"),
            "failures_total": take("lmcache_mp_timeouts_total"),
        },
        "l1": {
            "used_bytes": first(_L1_BYTES),
            # The server prints use in bytes and as a ratio, not the size.
            "capacity_bytes": first(Combine("over", _L1_BYTES, _L1_RATIO)),
            "usage_ratio": first(_L1_RATIO),
            "hit_tokens_total": take("lmcache_mp_lookup_hit_l1_tokens_total"),
            "stored_chunks_total": take("lmcache_mp_l1_write_chunks_total"),
            "loaded_chunks_total": take("lmcache_mp_l1_read_chunks_total"),
            "evicted_chunks_total": take("lmcache_mp_l1_evicted_chunks_total"),
            "failures_total": _either(
                "lmcache_mp_l1_allocation_failure_chunks_total", "lmcache_mp_l1_read_failure_chunks_total"
            ),
        },
        "l2": {
            "used_bytes": take("lmcache_mp_l2_usage_bytes"),
            "hit_tokens_total": take("lmcache_mp_lookup_hit_l2_tokens_total"),
            "stored_chunks_total": take(
                "lmcache_mp_l2_store_completed_objects_chunks_total", "lmcache_mp_l2_store_completed_objects_total"
            ),
            "loaded_chunks_total": take(
                "lmcache_mp_l2_prefetch_load_completed_chunks_total", "lmcache_mp_l2_prefetch_load_completed_total"
            ),
            "evicted_chunks_total": take("lmcache_mp_l2_evicted_chunks_total"),
            "failures_total": take("lmcache_mp_l2_prefetch_failure_chunks_total"),
        },
    },
    needs=(
        Need(("lmcache_mp_l1_memory_usage_bytes",)),
        Need(("lmcache_mp_l1_usage_ratio",)),
        Need(("lmcache_mp_lookup_requested_tokens_total",), flag="it appears with the first lookup", is_required=False),
    ),
    ignored=(
        Ignored("the eviction loop's and event bus's own health", ("lmcache_mp_l1_eviction_loop_*",)),
        Ignored("event bus and its log", ("lmcache_mp_event_bus_*", "lmcache_mp_kv_events_*")),
        Ignored("hit keys beside hit tokens", ("lmcache_mp_lookup_hit_*_keys",)),
        Ignored(
            "transfers started and ended, and their throughput",
            ("lmcache_mp_num_submitted_*", "lmcache_mp_num_finished_*", "lmcache_mp_l0_*"),
        ),
        Ignored("reuse gaps beside the mapped ones", ("lmcache_mp_real_reuse_gap_seconds", "lmcache_mp_l1_chunk_*")),
        Ignored("objects reserved and not admitted", ("lmcache_mp_l1_staging_*",)),
        Ignored("requests, tasks and adapters of the storage tier", ("lmcache_mp_l2_*", "lmcache_mp_active_*")),
    ),
)
