"""SGLang: its metric names, and which of its many per-rank copies count.

From a recorded page of 0.5.23's own collectors and its source. Scheduler metrics are printed by every tensor-,
pipeline- and expert-parallel rank of a data-parallel rank: copies of one quantity. With data-parallel attention the
first tensor rank of dp_rank 1 is not 0, so the lowest of each dp_rank counts (the largest, for gauges).
"""

from __future__ import annotations

from optiinfra_pipelines.engines.dialect import (
    Combine,
    Dialect,
    Histogram,
    Ignored,
    Need,
    Setting,
    Take,
    first,
    is_,
    take,
)
from optiinfra_pipelines.engines.process import http_columns

_CACHED = "sglang:cached_tokens_total"
_PROMPT = Take("sglang:prompt_tokens_total")
_DEVICE = Take(_CACHED, where=(is_("cache_source", "device"),))
_FLAG = "--enable-metrics"

SGLANG = Dialect(
    engine="sglang",
    prefixes=("sglang:",),
    vantage="engine",
    model_label="model_name",
    rank_label="dp_rank",
    replica_labels=("tp_rank", "pp_rank", "moe_ep_rank", "moe_dp_rank", "attn_cp_rank", "pid"),
    total_label="priority",
    columns={
        "requests_running": take("sglang:num_running_reqs"),
        "requests_waiting": take("sglang:num_queue_reqs"),
        # The largest over the pools, and without what could be evicted: pressure, as vLLM's.
        "kv_cache_usage_ratio": take("sglang:token_usage", fold="max"),
        "kv_cache_host_usage_ratio": first(
            Combine("over", Take("sglang:hicache_host_used_tokens"), Take("sglang:hicache_host_total_tokens"))
        ),
        "kv_cache_used_tokens": take("sglang:kv_used_tokens", "sglang:num_used_tokens"),
        "kv_cache_capacity_tokens": first(
            Take("sglang:max_total_num_tokens", zero_is_unset=True),
            Combine("times", Setting("num_gpu_blocks"), Setting("block_size")),
            Combine("times", Setting("num_pages"), Setting("page_size")),
        ),
        "kv_cache_block_size_tokens": first(
            Take("sglang:page_size", fold="same", zero_is_unset=True), Setting("page_size"), Setting("block_size")
        ),
        "max_running_requests": first(
            Take("sglang:max_running_requests", zero_is_unset=True),
            Take("sglang:max_running_requests_under_SLO", zero_is_unset=True),
        ),
        "prefix_cache_hit_ratio": take("sglang:cache_hit_rate", fold="max"),
        "generation_tokens_per_second": take("sglang:gen_throughput"),
        "prompt_tokens_total": take("sglang:prompt_tokens_total"),
        "generation_tokens_total": take("sglang:generation_tokens_total"),
        "realtime_tokens_total": take("sglang:realtime_tokens_total", where=(is_("mode", "decode"),)),
        # Every prompt token is looked up in the radix tree, and both counters move when a request ends.
        "prefix_cache_queries_total": first(Combine("given", _PROMPT, _DEVICE)),
        "prefix_cache_hits_total": first(Combine("given", _DEVICE, _PROMPT)),
        "cached_tokens_device_total": first(_DEVICE),
        "cached_tokens_host_total": take(_CACHED, where=(is_("cache_source", "host"),)),
        "cached_tokens_storage_total": take(_CACHED, where=(is_("cache_source", "storage*"),)),
        "preemptions_total": take("sglang:num_retracted_requests_total"),
        "requests_finished_total": take("sglang:num_requests_total"),
        "requests_aborted_total": take("sglang:num_aborted_requests_total"),
        **http_columns("sglang:http_responses_total", "endpoint", "status_code"),
        "estimated_flops_total": first(Take("sglang:estimated_flops_per_gpu_total", zero_is_unset=True)),
        "estimated_read_bytes_total": first(Take("sglang:estimated_read_bytes_per_gpu_total", zero_is_unset=True)),
    },
    histograms=(
        Histogram("time_to_first_token_seconds", ("sglang:time_to_first_token_seconds",)),
        # Older releases named it after TPOT; each gap is the mean of its chunk either way.
        Histogram(
            "inter_token_latency_seconds",
            ("sglang:inter_token_latency_seconds", "sglang:time_per_output_token_seconds"),
        ),
        Histogram("time_per_output_token_seconds", ("sglang:request_time_per_output_token_seconds",)),
        Histogram("request_duration_seconds", ("sglang:e2e_request_latency_seconds",)),
        Histogram("queue_seconds", ("sglang:queue_time_seconds",)),
        Histogram("prompt_tokens", ("sglang:prompt_tokens_histogram",)),
        Histogram("uncached_prompt_tokens", ("sglang:uncached_prompt_tokens_histogram",)),
        Histogram("generation_tokens", ("sglang:generation_tokens_histogram",)),
    ),
    info=("sglang:cache_config_info",),
    config_gauges=("sglang:max_total_num_tokens", "sglang:page_size", "sglang:num_pages", "sglang:context_len"),
    needs=(
        Need(("sglang:num_running_reqs",), flag=_FLAG),
        Need(("sglang:num_queue_reqs",), flag=_FLAG),
        Need(("sglang:token_usage",), flag=_FLAG),
        Need(("sglang:prompt_tokens_total",), flag=f"{_FLAG}; it appears with the first finished request"),
        Need(("sglang:generation_tokens_total",), flag=f"{_FLAG}; it appears with the first finished request"),
        Need(("sglang:time_to_first_token_seconds",), flag=f"{_FLAG}; it appears with the first token"),
        Need(("sglang:inter_token_latency_seconds",), flag=f"{_FLAG}; it appears with the second token"),
        Need(("sglang:e2e_request_latency_seconds",), flag=f"{_FLAG}; it appears with the first finished request"),
        Need(
            ("sglang:estimated_flops_per_gpu_total",),
            flag="--enable-mfu-metrics",
            is_required=False,
            zero_is_off=True,
        ),
    ),
    ignored=(
        Ignored("the scheduler's own time and process", ("sglang:scheduler_*", "sglang:process_cpu_seconds")),
        Ignored("balance of data-parallel attention", ("sglang:dp_attention_*", "sglang:dp_cooperation_*")),
        Ignored(
            "detail of the pools behind token_usage",
            (
                "sglang:full_token_usage",
                "sglang:swa_*",
                "sglang:mamba_*",
                "sglang:kv_available_tokens",
                "sglang:kv_evictable_tokens",
                "sglang:num_used_tokens",
                "sglang:decode_sum_seq_lens",
                "sglang:pending_prealloc_token_usage",
                "sglang:prealloc_*",
                "sglang:new_token_ratio",
            ),
        ),
        Ignored(
            "queues of grammar compilation and of prefill-decode disaggregation",
            ("sglang:num_grammar_queue_reqs", "sglang:num_prefill_*", "sglang:num_decode_*", "sglang:kv_transfer_*"),
        ),
        Ignored(
            "retraction beside the counter of requests",
            ("sglang:num_retracted_reqs", "sglang:num_retracted_*_tokens", "sglang:num_retracted_input_tokens"),
        ),
        Ignored("retraction in tokens", ("sglang:num_retracted_output_tokens",)),
        Ignored("weight synchronization pauses", ("sglang:num_paused_reqs",)),
        Ignored("gauges of speculative decoding; it prints no counters", ("sglang:spec_*",)),
        Ignored("gauges of a window that the engine chooses", ("sglang:utilization", "sglang:fwd_occupancy")),
        Ignored("CUDA graph use", ("sglang:is_cuda_graph", "sglang:cuda_graph_passes")),
        Ignored("sticky routing", ("sglang:num_unique_running_routing_keys", "sglang:routing_key_*")),
        Ignored("prefill by cache outcome, again", ("sglang:prefill_effective_tokens",)),
        Ignored("memory writes: roofline needs reads and FLOPs", ("sglang:estimated_write_bytes_per_gpu",)),
        Ignored("stages of a request, and time on the GPU", ("sglang:per_stage_req_latency_seconds",)),
        Ignored("time on the GPU by kind", ("sglang:gpu_execution_seconds", "sglang:forward_execution_seconds")),
        Ignored(
            "tier traffic without sizes or hits",
            ("sglang:evicted_tokens", "sglang:load_back_*", "sglang:eviction_*", "sglang:backup_*", "sglang:prefetch*"),
        ),
        Ignored("HTTP requests before their outcome", ("sglang:http_requests", "sglang:http_requests_active")),
        Ignored("start-up and collector's own cost", ("sglang:engine_*", "sglang:grammar_*", "sglang:func_latency*")),
        Ignored("LoRA pool", ("sglang:lora_*",)),
    ),
    notes=(
        "SGLang's prompt and generation counters move when a request ends; live throughput is realtime_tokens_total",
        "SGLang prints no process start: a restart shows only as a counter that falls",
        "SGLang's first-token buckets begin at 0.1 s: nothing is known below",
    ),
)
