"""TensorRT-LLM's trtllm-serve (`/prometheus/metrics`): its metric names.

From metrics/collector.py on its main branch (2026); no page was recorded. The prefix is `trtllm_`; Dynamo 0.7 and its
mocker print `trtllm:`. Releases around 1.1 have five families only.
"""

from __future__ import annotations

from optiinfra_pipelines.engines.dialect import (
    Alternatives,
    Combine,
    Dialect,
    Expression,
    Fold,
    Histogram,
    Ignored,
    Need,
    Take,
    Where,
    is_,
    is_not,
)

_PREFIXES = ("trtllm_", "trtllm:")


def _take(name: str, *where: Where, fold: Fold = "sum", zero_when_absent: bool = False) -> Alternatives:
    return tuple(Take(p + name, where=where, fold=fold, zero_when_absent=zero_when_absent) for p in _PREFIXES)


def _times(left: str, right: str) -> Alternatives:
    return tuple(Combine("times", Take(p + left), Take(p + right, fold="same")) for p in _PREFIXES)


def _given(left: str, right: str) -> Alternatives:
    return tuple(Combine("given", Take(p + left), Take(p + right)) for p in _PREFIXES)


def _histogram(metric: str, name: str) -> Histogram:
    return Histogram(metric, tuple(p + name for p in _PREFIXES))


def _need(name: str, flag: str | None = None, is_required: bool = True) -> Need:
    return Need(tuple(p + name for p in _PREFIXES), flag, is_required)


def _ignored(reason: str, *names: str) -> Ignored:
    return Ignored(reason, tuple(p + name for name in names for p in _PREFIXES))


def _outcome(*reasons: str) -> Alternatives:
    return _take("request_success_total", is_("finished_reason", *reasons), zero_when_absent=True)


def _errors(*codes: str) -> Alternatives:
    return _take("request_error_total", is_("http_code", *codes), zero_when_absent=True)


_TIER = "prompt_cache_hit_tokens_total"
_DEVICE: tuple[Expression, ...] = (
    *_take(_TIER, is_("cache_tier", "gpu*")),
    *_take("prompt_cached_tokens_total"),
)
_PERF = "return_perf_metrics: true in the server's configuration"
_STATS = "enable_iter_perf_stats: true in the server's configuration"

TRTLLM = Dialect(
    engine="trtllm",
    prefixes=_PREFIXES,
    vantage="engine",
    model_label="model_name",
    columns={
        "requests_running": _take("num_requests_running"),
        "requests_waiting": _take("num_requests_waiting"),
        # Dynamo's mocker prints the usage and preemptions of its scheduler under this prefix with vLLM's names.
        "kv_cache_usage_ratio": (
            *_take("kv_cache_utilization", fold="max"),
            *_take("kv_cache_usage_perc", fold="max"),
            *_take("gpu_cache_usage_perc", fold="max"),
        ),
        "preemptions_total": _take("num_preemptions_total"),
        "kv_cache_host_usage_ratio": _take("kv_cache_host_utilization", fold="max"),
        "kv_cache_used_tokens": _times("kv_cache_used_blocks", "kv_cache_tokens_per_block"),
        "kv_cache_capacity_tokens": _times("kv_cache_max_blocks", "kv_cache_tokens_per_block"),
        "kv_cache_block_size_tokens": _take("kv_cache_tokens_per_block", fold="same"),
        "max_running_requests": (*_take("max_batch_size_runtime"), *_take("max_num_active_requests")),
        "max_batched_tokens": _take("max_num_tokens_runtime"),
        "prefix_cache_hit_ratio": _take("kv_cache_hit_rate", fold="max"),
        "prompt_tokens_total": _take("prompt_tokens_total"),
        "generation_tokens_total": _take("generation_tokens_total"),
        "prefix_cache_queries_total": _given("prompt_tokens_total", "prompt_cached_tokens_total"),
        "prefix_cache_hits_total": _given("prompt_cached_tokens_total", "prompt_tokens_total"),
        "cached_tokens_device_total": _DEVICE,
        "cached_tokens_host_total": _take(_TIER, is_("cache_tier", "host*", "cpu*")),
        "cached_tokens_storage_total": _take(_TIER, is_("cache_tier", "disk*", "storage*")),
        "requests_finished_total": _take(
            "request_success_total",
            is_not("finished_reason", "abort", "cancelled", "canceled", "timeout", "error"),
            zero_when_absent=True,
        ),
        "requests_length_total": _outcome("length"),
        "requests_aborted_total": _outcome("abort", "cancelled", "canceled"),
        "requests_failed_total": (
            *(
                Combine("plus", failed, timed_out)
                for failed, timed_out in zip(_errors("5*"), _outcome("timeout", "error"), strict=True)
            ),
            *_outcome("timeout", "error"),
        ),
        "requests_rejected_total": _errors("429"),
        "requests_invalid_total": tuple(
            Take(
                f"{p}request_error_total",
                where=(is_("http_code", "4*"), is_not("http_code", "429")),
                zero_when_absent=True,
            )
            for p in _PREFIXES
        ),
        "spec_draft_tokens_total": _take("spec_decode_num_draft_tokens_total"),
        "spec_accepted_tokens_total": _take("spec_decode_num_accepted_tokens_total"),
    },
    histograms=(
        _histogram("time_to_first_token_seconds", "time_to_first_token_seconds"),
        _histogram("time_per_output_token_seconds", "time_per_output_token_seconds"),
        _histogram("inter_token_latency_seconds", "inter_token_latency_seconds"),
        _histogram("request_duration_seconds", "e2e_request_latency_seconds"),
        _histogram("queue_seconds", "request_queue_time_seconds"),
        _histogram("prefill_seconds", "request_prefill_time_seconds"),
        _histogram("decode_seconds", "request_decode_time_seconds"),
        _histogram("inference_seconds", "request_inference_time_seconds"),
        _histogram("cached_prompt_tokens", "prompt_cached_tokens_per_request"),
    ),
    tiers={
        "l1": {
            "read_bytes_total": _take("kv_cache_onboard_bytes_total"),
            "write_bytes_total": _take("kv_cache_offload_bytes_total"),
        },
    },
    info=tuple(
        f"{p}{kind}_config_info" for kind in ("model", "parallel", "speculative", "kv_cache") for p in _PREFIXES
    ),
    config_gauges=tuple(
        p + name
        for name in ("max_batch_size_static", "kv_cache_max_blocks", "kv_cache_tokens_per_block")
        for p in _PREFIXES
    ),
    needs=(
        _need("request_success_total", _PERF),
        _need("time_to_first_token_seconds", _PERF),
        _need("e2e_request_latency_seconds", _PERF),
        _need("num_requests_running", _STATS),
        _need("num_requests_waiting", _STATS),
        Need(tuple(p + name for name in ("kv_cache_utilization", "kv_cache_usage_perc") for p in _PREFIXES), _STATS),
        _need("prompt_tokens_total", "TensorRT-LLM later than 1.1; releases before print no token counters"),
        _need("generation_tokens_total", "TensorRT-LLM later than 1.1; releases before print no token counters"),
    ),
    ignored=(
        _ignored("blocks beside the token counters", "kv_cache_reused_blocks", "kv_cache_missed_blocks"),
        _ignored("per-iteration detail of the KV cache", "kv_cache_iter_*", "kv_cache_gen_alloc_blocks"),
        _ignored(
            "block movements without sizes or hits",
            "kv_cache_free_blocks",
            "kv_cache_disk_prefetch_blocks",
            "kv_cache_intra_device_copy_bytes",
        ),
        _ignored("requests by phase in one iteration", "num_context_requests", "num_generation_requests"),
        _ignored(
            "one iteration's state",
            "num_paused_requests",
            "num_scheduled_requests",
            "total_context_tokens",
            "avg_decoded_tokens_per_iter",
            "iteration_latency_seconds",
            "prefill_batch_*",
            "scheduled_batch_size",
        ),
        _ignored("every end, without its reason", "num_requests_completed"),
        _ignored("memory as the process sees it; GPU telemetry has it", "gpu_memory_usage_bytes"),
        _ignored("host memory as the process sees it", "cpu_memory_usage_bytes", "pinned_memory_usage_bytes"),
        _ignored("detail of speculative decoding", "spec_decode_*"),
        _ignored("quality, not load", "prefill_perplexity", "generation_perplexity"),
    ),
)
