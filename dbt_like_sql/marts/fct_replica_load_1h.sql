-- What each replica was asked for and did, one row per target and hour.
with

periods as (

    select *
    from fct_replica_load_5m
    where period_at >= getvariable('window_start') and period_at < getvariable('window_end')

),

hours as (

    select
        arg_max(deployment, period_at) as deployment,
        arg_max(source, period_at) as source,
        sum(scrape_count)::bigint as scrape_count,
        sum(up_count)::bigint as up_count,
        target,
        utc_step(3600, period_at) as hour_at,
        arg_max(engine, period_at) as engine,
        arg_max(vantage, period_at) as vantage,
        arg_max(model_name, period_at) as model_name,
        arg_max(config_hash, period_at) as config_hash,
        max(rank_count) as rank_count,
        sum(sample_count)::bigint as sample_count,
        sum(restart_count)::bigint as restart_count,
        sum(observed_seconds) as observed_seconds,
        max(gap_seconds) as gap_seconds,
        weighted_mean(requests_running_mean, sample_count) as requests_running_mean,
        max(requests_running_max) as requests_running_max,
        weighted_mean(requests_waiting_mean, sample_count) as requests_waiting_mean,
        max(requests_waiting_max) as requests_waiting_max,
        weighted_mean(kv_cache_usage_mean_ratio, sample_count) as kv_cache_usage_mean_ratio,
        max(kv_cache_usage_max_ratio) as kv_cache_usage_max_ratio,
        arg_max(kv_cache_capacity_tokens, period_at) as kv_cache_capacity_tokens,
        sum(prompt_tokens) as prompt_tokens,
        sum(generation_tokens) as generation_tokens,
        sum(realtime_tokens) as realtime_tokens,
        sum(requests_started) as requests_started,
        sum(requests_finished) as requests_finished,
        sum(requests_length) as requests_length,
        sum(requests_aborted) as requests_aborted,
        sum(requests_failed) as requests_failed,
        sum(requests_rejected) as requests_rejected,
        sum(requests_invalid) as requests_invalid,
        sum(http_requests) as http_requests,
        sum(http_4xx) as http_4xx,
        sum(http_5xx) as http_5xx,
        sum(preemptions) as preemptions,
        sum(prefill_seconds) as prefill_seconds,
        sum(prefill_tokens) as prefill_tokens,
        sum(decode_seconds) as decode_seconds,
        sum(queue_seconds) as queue_seconds,
        sum(steps) as steps,
        sum(spec_draft_tokens) as spec_draft_tokens,
        sum(spec_accepted_tokens) as spec_accepted_tokens,
        sum(prefix_cache_queries) as prefix_cache_queries,
        sum(prefix_cache_hits) as prefix_cache_hits,
        sum(external_cache_queries) as external_cache_queries,
        sum(external_cache_hits) as external_cache_hits,
        sum(cached_tokens_device) as cached_tokens_device,
        sum(cached_tokens_host) as cached_tokens_host,
        sum(cached_tokens_storage) as cached_tokens_storage,
        sum(cached_tokens_remote) as cached_tokens_remote,
        sum(cpu_seconds) as cpu_seconds

    from periods

    group by target, hour_at

),

rated as (

    select
        *,
        ratio(requests_finished, observed_seconds) as requests_per_second,
        ratio(prompt_tokens, observed_seconds) as prompt_tokens_per_second,
        ratio(coalesce(realtime_tokens, generation_tokens), observed_seconds) as generation_tokens_per_second

    from hours

)

select * from rated
