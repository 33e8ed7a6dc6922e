"""NVIDIA Dynamo: the frontend (which includes the router's queue) and the worker (beside the engine's own families).

From recorded pages of 1.6.1. Two vantages: the frontend sees a request from its first byte, the worker's engine from
its scheduling; they are never averaged. A worker's port also prints `vllm:*`, `sglang:*` or `trtllm*`: those
families fill the engine columns by their own dialect, and the `dynamo_component_*` ones only what they leave unknown.
"""

from __future__ import annotations

from optiinfra_pipelines.engines.dialect import (
    Alternatives,
    Combine,
    Dialect,
    Histogram,
    Ignored,
    Need,
    Take,
    first,
    is_,
    is_not,
    take,
)

_ENDED = "dynamo_frontend_requests_total"
_OUTPUT = Take("dynamo_frontend_output_sequence_tokens_sum")
_OUTPUT_COUNT = Take("dynamo_frontend_output_sequence_tokens_count")
# Prompts that arrive as token ids are not measured: the sum is of every prompt only when it was observed as often as
# the output was.
_PROMPT = Combine(
    "given",
    Take("dynamo_frontend_input_sequence_tokens_sum"),
    Combine("at_least", Take("dynamo_frontend_input_sequence_tokens_count"), _OUTPUT_COUNT),
)
_CACHED = Take("dynamo_frontend_cached_tokens_sum")
_BLOCK = Take("dynamo_frontend_model_kv_cache_block_size", fold="same", zero_is_unset=True)
_BLOCKS = Take("dynamo_frontend_model_total_kv_blocks", fold="same", zero_is_unset=True)


def _errors(*kinds: str) -> Alternatives:
    return (Take(_ENDED, where=(is_("error_type", *kinds),), zero_when_absent=True),)


def _limit(name: str) -> Alternatives:
    return (Take(f"dynamo_frontend_model_{name}", fold="same", zero_is_unset=True),)


_RUNTIME = Ignored(
    "the runtime's own health: event loop, threads, transport",
    (
        "dynamo_tokio_*",
        "dynamo_transport_*",
        "dynamo_request_plane_*",
        "dynamo_frontend_event_loop_*",
        "dynamo_work_handler_*",
    ),
)
_ROUTER = Ignored(
    "the router's own bookkeeping and its predictions, not what the engine did",
    ("dynamo_component_router_*", "dynamo_router_*", "dynamo_frontend_router_*", "dynamo_frontend_worker_*"),
)
_EVENTS = Ignored(
    "KV events between workers and router", ("dynamo_component_kv_*", "dynamo_component_ckf_*", "dynamo_kvstats_*")
)

DYNAMO_FRONTEND = Dialect(
    engine="dynamo_frontend",
    prefixes=("dynamo_",),
    vantage="frontend",
    model_label="model",
    columns={
        "requests_running": take("dynamo_frontend_inflight_requests"),
        "requests_waiting": take("dynamo_frontend_queued_requests"),
        "kv_cache_capacity_tokens": first(Combine("times", _BLOCKS, _BLOCK)),
        "kv_cache_block_size_tokens": first(_BLOCK),
        "max_running_requests": _limit("max_num_seqs"),
        "max_batched_tokens": _limit("max_num_batched_tokens"),
        "prompt_tokens_total": first(_PROMPT),
        "generation_tokens_total": first(_OUTPUT),
        # Below the finished requests' tokens it has missed some (answers that the frontend does not detokenize).
        "realtime_tokens_total": first(Combine("at_least", Take("dynamo_frontend_output_tokens_total"), _OUTPUT)),
        "prefix_cache_queries_total": first(Combine("given", _PROMPT, _CACHED)),
        "prefix_cache_hits_total": first(Combine("given", _CACHED, _PROMPT)),
        "requests_started_total": take("dynamo_frontend_requests_started_total"),
        "requests_finished_total": (Take(_ENDED, where=(is_("status", "success"),), zero_when_absent=True),),
        "requests_aborted_total": _errors("cancelled"),
        "requests_failed_total": (
            Take(
                _ENDED,
                where=(
                    is_not("status", "success"),
                    is_not("error_type", "cancelled", "overload", "validation", "not_found", "not_implemented"),
                ),
                zero_when_absent=True,
            ),
        ),
        "requests_rejected_total": _errors("overload"),
        "requests_invalid_total": _errors("validation", "not_found", "not_implemented"),
        "disconnected_clients": take("dynamo_frontend_disconnected_clients"),
    },
    histograms=(
        Histogram("time_to_first_token_seconds", ("dynamo_frontend_time_to_first_token_seconds",)),
        Histogram("inter_token_latency_seconds", ("dynamo_frontend_inter_token_latency_seconds",)),
        Histogram("request_duration_seconds", ("dynamo_frontend_request_duration_seconds",)),
        Histogram("queue_seconds", ("dynamo_frontend_stage_duration_seconds",), where=(is_("stage", "route"),)),
        Histogram("prompt_tokens", ("dynamo_frontend_input_sequence_tokens",)),
        Histogram("generation_tokens", ("dynamo_frontend_output_sequence_tokens",)),
        Histogram("cached_prompt_tokens", ("dynamo_frontend_cached_tokens",)),
    ),
    config_gauges=(
        "dynamo_frontend_model_total_kv_blocks",
        "dynamo_frontend_model_kv_cache_block_size",
        "dynamo_frontend_model_max_num_seqs",
        "dynamo_frontend_model_max_num_batched_tokens",
        "dynamo_frontend_model_context_length",
        "dynamo_frontend_model_migration_limit",
    ),
    needs=(
        Need(("dynamo_frontend_inflight_requests",), flag="it appears when a worker registers its model"),
        Need(("dynamo_frontend_queued_requests",), flag="it appears with the first request"),
        Need(("dynamo_frontend_requests_total",), flag="it appears with the first finished request"),
        Need(("dynamo_frontend_time_to_first_token_seconds",), flag="it appears with the first request"),
        Need(("dynamo_frontend_request_duration_seconds",), flag="it appears with the first request"),
    ),
    ignored=(
        _RUNTIME,
        _ROUTER,
        _EVENTS,
        Ignored("what requests contain beside text", ("dynamo_frontend_*_per_request",)),
        Ignored(
            "tokenization, templates and their cache",
            (
                "dynamo_frontend_detokenize_*",
                "dynamo_frontend_tokenize*",
                "dynamo_frontend_template_*",
            ),
        ),
        Ignored("requests by stage now", ("dynamo_frontend_stage_requests", "dynamo_frontend_active_requests")),
        Ignored("readiness, which a probe tells", ("dynamo_frontend_model_ready",)),
        Ignored("requests moved to another worker", ("dynamo_frontend_model_migration", "dynamo_frontend_*_rejection")),
        Ignored(
            "a worker's families on an in-process frontend",
            ("dynamo_component_*", "dynamo_engine_*", "dynamo_rejection_*", "dynamo_request_queue"),
        ),
    ),
    notes=(
        "The frontend's running requests are all in flight, queued ones included",
        "The frontend measures first token and prompt length only of requests that it tokenizes itself",
        "A frontend histogram that stays at count 0 while requests end is unknown, not fast",
    ),
)

_GENERATE = (is_("dynamo_endpoint", "generate"),)

DYNAMO_WORKER = Dialect(
    engine="dynamo_worker",
    prefixes=("dynamo_",),
    vantage="engine",
    model_label="model",
    columns={
        "requests_running": take("dynamo_component_inflight_requests", where=_GENERATE),
        "requests_waiting": take("dynamo_request_queue"),
        "requests_started_total": take("dynamo_component_requests_total", where=_GENERATE),
        "requests_aborted_total": take("dynamo_component_cancellation_total", where=_GENERATE),
        "requests_rejected_total": first(
            Combine("plus", Take("dynamo_rejection_request_total"), Take("dynamo_work_handler_enqueue_rejected_total")),
            Take("dynamo_work_handler_enqueue_rejected_total"),
        ),
    },
    histograms=(
        Histogram("request_duration_seconds", ("dynamo_component_request_duration_seconds",), where=_GENERATE),
    ),
    needs=(Need(("dynamo_component_requests_total",), flag="it appears with the first request", is_required=False),),
    ignored=(
        _RUNTIME,
        _ROUTER,
        _EVENTS,
        Ignored("time since start; it would say a new start at every scrape", ("dynamo_component_uptime_seconds",)),
        Ignored("bytes on the request plane", ("dynamo_component_request_bytes", "dynamo_component_response_bytes")),
        Ignored("requests in the engine, as running and waiting have them", ("dynamo_engine_request",)),
        Ignored("errors on the request plane, by kind", ("dynamo_component_errors", "dynamo_component_error*")),
        Ignored("the block manager's own tiers", ("dynamo_kvbm_*",)),
    ),
    notes=("Engine columns of a Dynamo worker come from the engine's own families on the same page",),
)
