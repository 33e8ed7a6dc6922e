"""Triton Inference Server with the TensorRT-LLM backend: its metric names.

From Triton's metrics documentation and the backend's README; no page was recorded. Times are cumulative microseconds,
so they give means only. A request that passes an ensemble is counted by every model in it, so the generic counters
are read of the models that the TensorRT-LLM backend serves, where it names any.
"""

from __future__ import annotations

from optiinfra_pipelines.engines.dialect import (
    Combine,
    Dialect,
    Fold,
    Histogram,
    Ignored,
    Need,
    Scope,
    Summary,
    Take,
    first,
    is_,
    is_not,
    take,
)

_MICROSECONDS = 1e-6
_FAILURES = "nv_inference_request_failure"


def _requests(kind: str) -> tuple[Take, ...]:
    return (Take("nv_trt_llm_request_metrics", where=(is_("request_type", kind),)),)


def _blocks(kind: str, fold: Fold = "sum") -> Take:
    return Take("nv_trt_llm_kv_cache_block_metrics", where=(is_("kv_cache_block_type", kind),), fold=fold)


_PER_BLOCK = _blocks("tokens_per", fold="same")

TRITON = Dialect(
    engine="triton",
    prefixes=("nv_inference_", "nv_trt_llm_"),
    vantage="engine",
    model_label="model",
    scope=Scope("model", named_by="nv_trt_llm_", limits="nv_inference_"),
    columns={
        "requests_running": _requests("scheduled"),
        "requests_waiting": (*_requests("waiting"), Take("nv_inference_pending_request_count")),
        "max_running_requests": _requests("max"),
        # "used" and "free" need not add up to "max"; a share above 1 would be such a case.
        "kv_cache_usage_ratio": first(
            _blocks("fraction", fold="max"), Combine("share", _blocks("used"), _blocks("max"))
        ),
        "kv_cache_used_tokens": first(Combine("times", _blocks("used"), _PER_BLOCK)),
        "kv_cache_capacity_tokens": first(Combine("times", _blocks("max"), _PER_BLOCK)),
        "kv_cache_block_size_tokens": first(_PER_BLOCK),
        "requests_finished_total": take("nv_inference_request_success"),
        "requests_failed_total": (
            Take(_FAILURES, where=(is_not("reason", "REJECTED", "CANCELED"),), zero_when_absent=True),
        ),
        "requests_rejected_total": (Take(_FAILURES, where=(is_("reason", "REJECTED"),)),),
        "requests_aborted_total": (Take(_FAILURES, where=(is_("reason", "CANCELED"),)),),
        "queue_seconds_total": first(Take("nv_inference_queue_duration_us", scale=_MICROSECONDS)),
        "steps_total": (
            Take("nv_trt_llm_general_metrics", where=(is_("general_type", "iteration_counter"),)),
            Take("nv_inference_exec_count"),
        ),
    },
    histograms=(
        # Printed for decoupled (streaming) models when --metrics-config histogram_latencies=true.
        Histogram("time_to_first_token_seconds", ("nv_inference_first_response_histogram_ms",), scale=1e-3),
    ),
    summaries=(
        Summary(
            "request_duration_seconds",
            total=Take("nv_inference_request_duration_us", scale=_MICROSECONDS),
            count=Take("nv_inference_request_success"),
            source="nv_inference_request_duration_us / nv_inference_request_success",
        ),
    ),
    needs=(
        Need(("nv_inference_request_success",), flag="--allow-metrics=true"),
        Need(("nv_inference_queue_duration_us",), flag="--metrics-config counter_latencies=true"),
        Need(("nv_trt_llm_request_metrics",), flag="the TensorRT-LLM backend, Triton 23.11 and later"),
        Need(("nv_trt_llm_kv_cache_block_metrics",), flag="the TensorRT-LLM backend, Triton 23.11 and later"),
        Need(
            ("nv_inference_first_response_histogram_ms",),
            flag="--metrics-config histogram_latencies=true (decoupled models)",
            is_required=False,
        ),
    ),
    ignored=(
        Ignored("inputs of a batch, not requests", ("nv_inference_count",)),
        Ignored("phases of execution, as sums", ("nv_inference_compute_*",)),
        Ignored("quantiles that cannot be aggregated", ("nv_inference_*_summary_us",)),
        Ignored("loading of models", ("nv_inference_load_*",)),
        Ignored("memory and batch detail of one iteration", ("nv_trt_llm_runtime_memory_metrics",)),
        Ignored(
            "detail of one iteration",
            ("nv_trt_llm_inflight_batcher_metrics", "nv_trt_llm_v1_metrics", "nv_trt_llm_disaggregated_*"),
        ),
    ),
    notes=(
        "Triton's times are cumulative sums: means, no quantiles",
        "Triton prints no token counters",
    ),
)
