"""vLLM, V0 (0.6 to 0.8) through V1 0.33: its metric names over the releases.

Read from the sources of 16 releases and from recorded pages of 0.6.6, 0.7.3, 0.8.5 and 0.32. Deprecated names live on
beside their successors for a minor release or two, so aliases go by precedence: newest first.
"""

from __future__ import annotations

from optiinfra_pipelines.engines.dialect import (
    Combine,
    Dialect,
    Histogram,
    Ignored,
    IsZero,
    Need,
    Setting,
    Take,
    first,
    is_,
    is_not,
    take,
)
from optiinfra_pipelines.engines.process import http_columns

_OUTCOMES = "vllm:request_success_total"
_WAITING = "vllm:num_requests_waiting_by_reason"
_CACHED = "vllm:prompt_tokens_cached_by_source_total"
_SOURCES = "vllm:prompt_tokens_by_source_total"


def _outcome(*reasons: str) -> tuple[Take, ...]:
    return (Take(_OUTCOMES, where=(is_("finished_reason", *reasons),), zero_when_absent=True),)


VLLM = Dialect(
    engine="vllm",
    prefixes=("vllm:",),
    vantage="engine",
    model_label="model_name",
    rank_label="engine",
    columns={
        "requests_running": take("vllm:num_requests_running"),
        "requests_waiting": take("vllm:num_requests_waiting"),
        "requests_waiting_capacity": take(_WAITING, where=(is_("reason", "capacity"),)),
        "requests_waiting_deferred": take(_WAITING, where=(is_("reason", "deferred"),)),
        "requests_swapped": take("vllm:num_requests_swapped"),
        "kv_cache_usage_ratio": take("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", fold="max"),
        "kv_cache_host_usage_ratio": take("vllm:cpu_cache_usage_perc", fold="max"),
        # What the engine reports: V1 keeps one block back as the null block and still counts it here.
        "kv_cache_capacity_tokens": first(
            Setting("kv_cache_size_tokens"), Combine("times", Setting("num_gpu_blocks"), Setting("block_size"))
        ),
        "kv_cache_block_size_tokens": first(Setting("block_size")),
        "is_sleeping": first(IsZero(Take("vllm:engine_sleep_state", where=(is_("sleep_state", "awake"),)))),
        # V0 only, and -1 when prefix caching is off, which is unknown and not a ratio.
        "prefix_cache_hit_ratio": take("vllm:gpu_prefix_cache_hit_rate", fold="max"),
        "generation_tokens_per_second": take("vllm:avg_generation_throughput_toks_per_s"),
        "prompt_tokens_total": take("vllm:prompt_tokens_total"),
        "generation_tokens_total": take("vllm:generation_tokens_total"),
        "prefix_cache_queries_total": take(
            "vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries"
        ),
        "prefix_cache_hits_total": take(
            "vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits"
        ),
        "external_cache_queries_total": take("vllm:external_prefix_cache_queries_total"),
        "external_cache_hits_total": take("vllm:external_prefix_cache_hits_total"),
        "cached_tokens_device_total": first(
            Take(_CACHED, where=(is_("source", "device"),)), Take(_SOURCES, where=(is_("source", "local_cache_hit"),))
        ),
        "cached_tokens_host_total": take(_CACHED, where=(is_("source", "host"),)),
        "cached_tokens_storage_total": take(_CACHED, where=(is_("source", "disk"),)),
        "cached_tokens_remote_total": first(
            Take(_CACHED, where=(is_("source", "p2p", "external_unspecified"),)),
            Take(_SOURCES, where=(is_("source", "external_kv_transfer"),)),
        ),
        "preemptions_total": take("vllm:num_preemptions_total"),
        "requests_finished_total": first(
            Take(_OUTCOMES, where=(is_not("finished_reason", "abort", "error"),), zero_when_absent=True)
        ),
        "requests_length_total": _outcome("length"),
        "requests_aborted_total": _outcome("abort"),
        "requests_failed_total": _outcome("error"),
        "requests_rejected_total": take("vllm:admission_rejections_total"),
        **http_columns("http_requests_total", "handler", "status"),
        "steps_total": take("vllm:iteration_tokens_total_count"),
        "spec_draft_tokens_total": take("vllm:spec_decode_num_draft_tokens_total"),
        "spec_accepted_tokens_total": take("vllm:spec_decode_num_accepted_tokens_total"),
        # Printed as 0 for ever unless the flag is set: a zero that says nothing.
        "estimated_flops_total": first(Take("vllm:estimated_flops_per_gpu_total", zero_is_unset=True)),
        "estimated_read_bytes_total": first(Take("vllm:estimated_read_bytes_per_gpu_total", zero_is_unset=True)),
    },
    histograms=(
        Histogram("time_to_first_token_seconds", ("vllm:time_to_first_token_seconds",)),
        # Up to 0.13 the family named after TPOT observed every gap between tokens, which is ITL.
        Histogram(
            "inter_token_latency_seconds", ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds")
        ),
        Histogram("time_per_output_token_seconds", ("vllm:request_time_per_output_token_seconds",)),
        Histogram("request_duration_seconds", ("vllm:e2e_request_latency_seconds",)),
        Histogram("queue_seconds", ("vllm:request_queue_time_seconds", "vllm:time_in_queue_requests")),
        Histogram("prefill_seconds", ("vllm:request_prefill_time_seconds",)),
        Histogram("decode_seconds", ("vllm:request_decode_time_seconds",)),
        Histogram("inference_seconds", ("vllm:request_inference_time_seconds",)),
        Histogram("prompt_tokens", ("vllm:request_prompt_tokens",)),
        Histogram("generation_tokens", ("vllm:request_generation_tokens",)),
        Histogram("uncached_prompt_tokens", ("vllm:request_prefill_kv_computed_tokens",)),
        Histogram("max_tokens_param", ("vllm:request_params_max_tokens",)),
        Histogram("step_tokens", ("vllm:iteration_tokens_total",)),
        Histogram("kv_block_lifetime_seconds", ("vllm:kv_block_lifetime_seconds",)),
        Histogram("kv_block_idle_seconds", ("vllm:kv_block_idle_before_evict_seconds",)),
        Histogram("kv_block_reuse_gap_seconds", ("vllm:kv_block_reuse_gap_seconds",)),
    ),
    tiers={
        # vLLM's own offload to host memory. Its usage gauge counts blocks pinned by running copies, not what is held,
        # so used_bytes and usage_ratio stay unknown.
        "l1": {
            "read_bytes_total": first(
                Take("vllm:kv_offload_load_bytes_total"),
                Take("vllm:kv_offload_total_bytes_total", where=(is_("transfer_type", "CPU_to_GPU"),)),
            ),
            "write_bytes_total": first(
                Take("vllm:kv_offload_store_bytes_total"),
                Take("vllm:kv_offload_total_bytes_total", where=(is_("transfer_type", "GPU_to_CPU"),)),
            ),
        },
    },
    info=("vllm:cache_config_info",),
    needs=(
        Need(("vllm:num_requests_running",)),
        Need(("vllm:num_requests_waiting",)),
        Need(("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")),
        Need(("vllm:prompt_tokens_total",)),
        Need(("vllm:generation_tokens_total",)),
        Need((_OUTCOMES,)),
        Need(("vllm:num_preemptions_total",)),
        Need(("vllm:time_to_first_token_seconds",)),
        Need(("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds")),
        Need(("vllm:e2e_request_latency_seconds",)),
        Need(("vllm:cache_config_info",)),
        Need(("vllm:kv_block_lifetime_seconds",), flag="--kv-cache-metrics (vLLM 0.12 and later)", is_required=False),
        Need(
            ("vllm:estimated_flops_per_gpu_total",),
            flag="--enable-mfu-metrics (vLLM 0.17 and later)",
            is_required=False,
            zero_is_off=True,
        ),
    ),
    ignored=(
        Ignored("LoRA adapters in use: state of requests, not load", ("vllm:lora_requests_info",)),
        Ignored("sums and shares of counters that are mapped", ("vllm:tokens", "vllm:prompt_tokens_cached")),
        Ignored("0.17 only; what preemption computes again", ("vllm:prompt_tokens_recomputed",)),
        Ignored("V0: host tier's hit rate without counters", ("vllm:cpu_prefix_cache_hit_rate",)),
        Ignored(
            "V0: deprecated, or declared and never filled",
            ("vllm:avg_prompt_throughput_toks_per_s", "vllm:model_forward_time_*", "vllm:model_execute_time_*"),
        ),
        Ignored(
            "request parameters and counts that no question asks for yet",
            ("vllm:request_max_num_generation_tokens", "vllm:request_params_n", "vllm:request_num_preemptions"),
        ),
        Ignored("detail of speculative decoding beyond drafted and accepted tokens", ("vllm:spec_decode_*",)),
        Ignored("memory writes: roofline needs reads and FLOPs", ("vllm:estimated_write_bytes_per_gpu",)),
        Ignored("multi-modal input cache, apart from KV", ("vllm:mm_cache_*",)),
        Ignored("NaN logits: quality, not load", ("vllm:corrupted_requests",)),
        Ignored("KV connectors' own transfer detail", ("vllm:nixl_*", "vllm:mooncake_*", "vllm:kv_offload_*")),
        Ignored("stage detail of asynchronous KV loads", ("vllm:num_requests_kv_fetch_by_stage",)),
        Ignored("rare administrative operations", ("vllm:sleep_mode_*",)),
        Ignored("expert-parallel balance", ("vllm:eplb_*",)),
    ),
)


def generation_of(families: frozenset[str]) -> str | None:
    """Which generation of names a vLLM page speaks, as far as the names tell; the page never prints a version."""
    if "vllm:num_requests_swapped" in families:
        return "V0 names (0.8 and before)"
    if "vllm:gpu_cache_usage_perc" in families and "vllm:prefix_cache_queries_total" in families:
        return "V1 names with deprecated aliases (0.9 to 0.11)"
    if "vllm:kv_cache_usage_perc" in families:
        return "V1 names"
    return None
