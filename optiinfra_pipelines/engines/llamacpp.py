"""llama.cpp's llama-server (`--metrics`): few families, no labels, no histograms.

From recorded pages of build 11669. Latencies are known as means only, and there is no time to first token.
"""

from __future__ import annotations

from optiinfra_pipelines.engines.dialect import Combine, Dialect, Ignored, Need, Take, first, take

_COMPUTED = Take("llamacpp:prompt_tokens_total")
_CACHED = Take("llamacpp:prompt_tokens_cached_total")
# prompt_tokens_total leaves cached tokens out; every other engine's counter has them.
_PROMPT = Combine("plus", _COMPUTED, _CACHED)
_FLAG = "--metrics"

LLAMACPP = Dialect(
    engine="llamacpp",
    prefixes=("llamacpp:",),
    vantage="engine",
    model_label="model",
    columns={
        "requests_running": take("llamacpp:requests_processing"),
        "requests_waiting": take("llamacpp:requests_deferred"),
        "kv_cache_usage_ratio": take("llamacpp:kv_cache_usage_ratio", fold="max"),
        "kv_cache_used_tokens": take("llamacpp:kv_cache_tokens"),
        "generation_tokens_per_second": take("llamacpp:predicted_tokens_seconds"),
        "busy_slots_per_step": take("llamacpp:n_busy_slots_per_decode", fold="max"),
        "prompt_tokens_total": first(_PROMPT),
        "generation_tokens_total": take("llamacpp:tokens_predicted_total"),
        "prefix_cache_queries_total": first(_PROMPT),
        "prefix_cache_hits_total": first(_CACHED),
        "cached_tokens_device_total": first(_CACHED),
        "prefill_seconds_total": take("llamacpp:prompt_seconds_total"),
        "prefill_tokens_total": first(_COMPUTED),
        "decode_seconds_total": take("llamacpp:tokens_predicted_seconds_total"),
        "steps_total": take("llamacpp:n_decode_total"),
        "spec_draft_tokens_total": take("llamacpp:spec_decode_num_draft_tokens_total"),
        "spec_accepted_tokens_total": take("llamacpp:spec_decode_num_accepted_tokens_total"),
    },
    needs=(
        Need(("llamacpp:requests_processing",), flag=_FLAG),
        Need(("llamacpp:requests_deferred",), flag=_FLAG),
        Need(("llamacpp:prompt_tokens_total",), flag=_FLAG),
        Need(("llamacpp:tokens_predicted_total",), flag=_FLAG),
        Need(
            ("llamacpp:prompt_tokens_cached_total",),
            flag="a newer build; without it the whole prompt count is unknown",
            is_required=False,
        ),
    ),
    ignored=(
        Ignored("a maximum that is typed as a counter", ("llamacpp:n_tokens_max", "llamacpp:n_past_max")),
        Ignored("throughput of a window that the server chooses", ("llamacpp:prompt_tokens_seconds",)),
        Ignored("detail of speculative decoding", ("llamacpp:spec_decode_*",)),
    ),
    notes=(
        "llama.cpp prints no histograms: latencies are means, and there is no time to first token",
        "llama.cpp's throughput gauges fall to 0 between scrapes; the counters do not",
    ),
)
