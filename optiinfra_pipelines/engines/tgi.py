"""Text Generation Inference 2 and 3 (one router, two backends): its metric names.

From the router's source at its last commit (2026-01-08, maintenance mode); no page was recorded. Families appear when
first touched. The exporter gives buckets to durations and lengths only; anything else is a summary.
"""

from __future__ import annotations

from optiinfra_pipelines.engines.dialect import (
    Combine,
    Dialect,
    Histogram,
    Ignored,
    Need,
    Summary,
    Take,
    first,
    is_,
    take,
)

_FAILURES = "tgi_request_failure"
_PREFILL = (is_("method", "prefill"),)
_DECODE = (is_("method", "decode"),)


def _failure(*kinds: str) -> tuple[Take, ...]:
    return (Take(_FAILURES, where=(is_("err", *kinds),), zero_when_absent=True),)


TGI = Dialect(
    engine="tgi",
    prefixes=("tgi_",),
    vantage="engine",
    model_label="model",
    columns={
        "requests_running": take("tgi_batch_current_size"),
        "requests_waiting": take("tgi_queue_size"),
        "kv_cache_reserved_ratio": first(
            Combine("over", Take("tgi_batch_current_max_tokens"), Take("tgi_batch_max_total_tokens"))
        ),
        "prompt_tokens_total": take("tgi_request_input_length_sum"),
        "generation_tokens_total": take("tgi_request_generated_tokens_sum"),
        "requests_started_total": take("tgi_request_count"),
        "requests_finished_total": take("tgi_request_success"),
        # 'dropped': the client no longer listens.
        "requests_aborted_total": _failure("dropped"),
        "requests_failed_total": _failure("generation", "incomplete"),
        "requests_rejected_total": _failure("overloaded"),
        "requests_invalid_total": _failure("validation", "template"),
        "steps_total": take("tgi_batch_inference_count"),
        "spec_accepted_tokens_total": take("tgi_request_skipped_tokens_sum"),
    },
    histograms=(
        # The router divides the whole inference time, prefill included, by the tokens: an upper bound of TPOT.
        Histogram("time_per_output_token_seconds", ("tgi_request_mean_time_per_token_duration",), is_proxy=True),
        Histogram("request_duration_seconds", ("tgi_request_duration",)),
        Histogram("queue_seconds", ("tgi_request_queue_duration",)),
        Histogram("inference_seconds", ("tgi_request_inference_duration",)),
        Histogram("prompt_tokens", ("tgi_request_input_length",)),
        Histogram("generation_tokens", ("tgi_request_generated_tokens",)),
        Histogram("max_tokens_param", ("tgi_request_max_new_tokens",)),
        Histogram("batch_requests", ("tgi_batch_next_size",)),
        Histogram("step_seconds", ("tgi_batch_inference_duration",), where=_DECODE),
    ),
    summaries=(
        # Queue and prefill are different populations (requests, batches): their buckets cannot be added, their sums
        # can. A prefill batch is counted once although all its requests wait for it, so the mean is a lower bound.
        Summary(
            "time_to_first_token_seconds",
            total=Combine(
                "plus",
                Take("tgi_request_queue_duration_sum"),
                Take("tgi_batch_inference_duration_sum", where=_PREFILL),
            ),
            count=Take("tgi_request_queue_duration_count"),
            source="tgi_request_queue_duration + tgi_batch_inference_duration{method=prefill}",
            is_proxy=True,
        ),
    ),
    config_gauges=("tgi_batch_max_total_tokens",),
    needs=(
        Need(("tgi_queue_size",), flag="it appears with the first request"),
        Need(("tgi_batch_current_size",), flag="it appears with the first batch"),
        Need(("tgi_request_count",), flag="it appears with the first request"),
        Need(("tgi_request_duration",), flag="it appears with the first finished request"),
        Need(("tgi_batch_max_total_tokens",), flag="the v3 backend; v2 does not print it", is_required=False),
    ),
    ignored=(
        Ignored("time in tokenization before the queue", ("tgi_request_validation_duration",)),
        Ignored(
            "phases of a step",
            (
                "tgi_batch_forward_duration",
                "tgi_batch_decode_duration",
                "tgi_batch_filter_duration",
                "tgi_batch_concat_duration",
            ),
        ),
        Ignored("reasons to join batches", ("tgi_batch_concat",)),
        Ignored("steps by outcome", ("tgi_batch_inference_success", "tgi_batch_inference_failure")),
    ),
    notes=(
        "TGI has no time to first token: here is a proxy, a lower bound of its mean (queue plus prefill batches)",
        "TGI's time per output token is a proxy: it includes prefill, an upper bound",
        "TGI prints neither KV-cache use nor prefix-cache hits",
    ),
)
