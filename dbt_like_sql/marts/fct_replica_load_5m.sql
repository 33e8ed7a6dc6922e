-- What each replica was asked for and did, one row per target and five minutes.
with

minutes as (

    select *, utc_step(300, minute_at) as period_at
    from int_engine_minutes
    where minute_at >= getvariable('window_start') and minute_at < getvariable('window_end')

),

targets as (

    select
        target,
        utc_step(300, minute_at) as period_at,
        arg_max(deployment, minute_at) as deployment,
        arg_max(source, minute_at) as source,
        sum(scrape_count)::bigint as scrape_count,
        sum(up_count)::bigint as up_count

    from int_scrape_minutes

    where minute_at >= getvariable('window_start') and minute_at < getvariable('window_end')

    group by all

),

ranks as (

    -- Every sample weighs the same, in a minute with few of them too.
    select
        target,
        engine_rank,
        period_at,
        arg_max(engine, minute_at) as engine,
        arg_max(vantage, minute_at) as vantage,
        arg_max(model_name, minute_at) as model_name,
        arg_max(config_hash, minute_at) as config_hash,
        sum(sample_count)::bigint as sample_count,
        sum(restart_count)::bigint as restart_count,
        sum(observed_seconds) as observed_seconds,
        max(gap_seconds) as gap_seconds,
        weighted_mean(requests_running_mean, sample_count) as requests_running_mean,
        max(requests_running_max) as requests_running_max,
        weighted_mean(requests_waiting_mean, sample_count) as requests_waiting_mean,
        max(requests_waiting_max) as requests_waiting_max,
        arg_max(requests_waiting_last, minute_at) as requests_waiting_last,
        max(requests_waiting_capacity_max) as requests_waiting_capacity_max,
        weighted_mean(kv_cache_usage_mean_ratio, sample_count) as kv_cache_usage_mean_ratio,
        max(kv_cache_usage_max_ratio) as kv_cache_usage_max_ratio,
        max(kv_cache_reserved_max_ratio) as kv_cache_reserved_max_ratio,
        arg_max(kv_cache_capacity_tokens, minute_at) as kv_cache_capacity_tokens,
        arg_max(max_running_requests, minute_at) as max_running_requests,
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

    from minutes

    group by target, engine_rank, period_at

),

replicas as (

    -- Ranks of one replica work side by side: their requests, tokens and sizes add up, their time does not.
    select
        target,
        period_at,
        any_value(engine) as engine,
        any_value(vantage) as vantage,
        any_value(model_name) as model_name,
        case when count(distinct config_hash) <= 1 then any_value(config_hash) end as config_hash,
        count(*) as rank_count,
        max(sample_count) as sample_count,
        max(restart_count) as restart_count,
        max(observed_seconds) as observed_seconds,
        max(gap_seconds) as gap_seconds,
        sum(requests_running_mean) as requests_running_mean,
        sum(requests_running_max) as requests_running_max,
        sum(requests_waiting_mean) as requests_waiting_mean,
        sum(requests_waiting_max) as requests_waiting_max,
        sum(requests_waiting_last) as requests_waiting_last,
        sum(requests_waiting_capacity_max) as requests_waiting_capacity_max,
        avg(kv_cache_usage_mean_ratio) as kv_cache_usage_mean_ratio,
        max(kv_cache_usage_max_ratio) as kv_cache_usage_max_ratio,
        max(kv_cache_reserved_max_ratio) as kv_cache_reserved_max_ratio,
        sum(kv_cache_capacity_tokens) as kv_cache_capacity_tokens,
        sum(max_running_requests) as max_running_requests,
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

    from ranks

    group by target, period_at

),

rated as (

    select
        targets.deployment,
        targets.source,
        targets.scrape_count,
        targets.up_count,
        replicas.*,
        ratio(requests_finished, observed_seconds) as requests_per_second,
        ratio(prompt_tokens, observed_seconds) as prompt_tokens_per_second,
        ratio(coalesce(realtime_tokens, generation_tokens), observed_seconds) as generation_tokens_per_second

    from replicas

    left join targets using (target, period_at)

)

select * from rated
