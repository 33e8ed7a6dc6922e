-- What each engine rank did and how full it was, one row per target, engine rank and minute.
with

steps as (

    select * from scrape_steps(getvariable('window_start'), getvariable('window_end'))

),

samples as not materialized (

    select *
    from stg_engine_samples
    where scraped_at >= getvariable('window_start') - interval 1 hour and scraped_at < getvariable('window_end')

),

before as (

    select samples.*
    from steps
    inner join samples
        on samples.target = steps.target and samples.scraped_at = steps.previous_at

),

attempts as (

    select target, utc_step(60, scraped_at) as minute_at, count(*) as scrape_count
    from stg_scrapes
    where scraped_at >= getvariable('window_start') and scraped_at < getvariable('window_end')
    group by all

),

grown as (

    -- A counter's growth since the scrape before belongs to the minute of the later scrape.
    select
        now_is.*,
        steps.minute_at,
        case when before.target is not null then steps.gap_seconds end as gap_seconds,
        steps.is_restart
            or coalesce(now_is.generation_tokens_total < before.generation_tokens_total, false)
            or coalesce(now_is.prompt_tokens_total < before.prompt_tokens_total, false) as has_restarted,
        counter_step(before.cpu_seconds_total, now_is.cpu_seconds_total, steps.is_restart) as cpu_seconds,
        counter_step(before.prompt_tokens_total, now_is.prompt_tokens_total, steps.is_restart) as prompt_tokens,
        counter_step(before.generation_tokens_total, now_is.generation_tokens_total, steps.is_restart)
            as generation_tokens,
        counter_step(before.realtime_tokens_total, now_is.realtime_tokens_total, steps.is_restart) as realtime_tokens,
        counter_step(before.prefix_cache_queries_total, now_is.prefix_cache_queries_total, steps.is_restart)
            as prefix_cache_queries,
        counter_step(before.prefix_cache_hits_total, now_is.prefix_cache_hits_total, steps.is_restart)
            as prefix_cache_hits,
        counter_step(before.external_cache_queries_total, now_is.external_cache_queries_total, steps.is_restart)
            as external_cache_queries,
        counter_step(before.external_cache_hits_total, now_is.external_cache_hits_total, steps.is_restart)
            as external_cache_hits,
        counter_step(before.cached_tokens_device_total, now_is.cached_tokens_device_total, steps.is_restart)
            as cached_tokens_device,
        counter_step(before.cached_tokens_host_total, now_is.cached_tokens_host_total, steps.is_restart)
            as cached_tokens_host,
        counter_step(before.cached_tokens_storage_total, now_is.cached_tokens_storage_total, steps.is_restart)
            as cached_tokens_storage,
        counter_step(before.cached_tokens_remote_total, now_is.cached_tokens_remote_total, steps.is_restart)
            as cached_tokens_remote,
        counter_step(before.preemptions_total, now_is.preemptions_total, steps.is_restart) as preemptions,
        counter_step(before.requests_started_total, now_is.requests_started_total, steps.is_restart)
            as requests_started,
        counter_step(before.requests_finished_total, now_is.requests_finished_total, steps.is_restart)
            as requests_finished,
        counter_step(before.requests_length_total, now_is.requests_length_total, steps.is_restart) as requests_length,
        counter_step(before.requests_aborted_total, now_is.requests_aborted_total, steps.is_restart)
            as requests_aborted,
        counter_step(before.requests_failed_total, now_is.requests_failed_total, steps.is_restart) as requests_failed,
        counter_step(before.requests_rejected_total, now_is.requests_rejected_total, steps.is_restart)
            as requests_rejected,
        counter_step(before.requests_invalid_total, now_is.requests_invalid_total, steps.is_restart)
            as requests_invalid,
        counter_step(before.http_requests_total, now_is.http_requests_total, steps.is_restart) as http_requests,
        counter_step(before.http_4xx_total, now_is.http_4xx_total, steps.is_restart) as http_4xx,
        counter_step(before.http_5xx_total, now_is.http_5xx_total, steps.is_restart) as http_5xx,
        counter_step(before.prefill_seconds_total, now_is.prefill_seconds_total, steps.is_restart) as prefill_seconds,
        counter_step(before.prefill_tokens_total, now_is.prefill_tokens_total, steps.is_restart) as prefill_tokens,
        counter_step(before.decode_seconds_total, now_is.decode_seconds_total, steps.is_restart) as decode_seconds,
        counter_step(before.queue_seconds_total, now_is.queue_seconds_total, steps.is_restart) as queue_seconds,
        counter_step(before.steps_total, now_is.steps_total, steps.is_restart) as steps,
        counter_step(before.spec_draft_tokens_total, now_is.spec_draft_tokens_total, steps.is_restart)
            as spec_draft_tokens,
        counter_step(before.spec_accepted_tokens_total, now_is.spec_accepted_tokens_total, steps.is_restart)
            as spec_accepted_tokens,
        counter_step(before.estimated_flops_total, now_is.estimated_flops_total, steps.is_restart) as estimated_flops,
        counter_step(before.estimated_read_bytes_total, now_is.estimated_read_bytes_total, steps.is_restart)
            as estimated_read_bytes

    from steps

    inner join samples as now_is
        on now_is.target = steps.target and now_is.scraped_at = steps.scraped_at

    left join before
        on
            before.target = steps.target
            and before.scraped_at = steps.previous_at
            and before.engine_rank = now_is.engine_rank

),

minutes as (

    select
        target,
        engine_rank,
        minute_at,
        arg_max(engine, scraped_at) as engine,
        arg_max(vantage, scraped_at) as vantage,
        arg_max(model_name, scraped_at) as model_name,
        arg_max(config_hash, scraped_at) as config_hash,
        arg_max(process_started_at, scraped_at) as process_started_at,
        count(*) as sample_count,
        any_value(scrape_count) as scrape_count,
        count(*) filter (has_restarted) as restart_count,
        sum(gap_seconds) as observed_seconds,
        max(gap_seconds) as gap_seconds,
        avg(requests_running) as requests_running_mean,
        max(requests_running) as requests_running_max,
        arg_max(requests_running, scraped_at) as requests_running_last,
        avg(requests_waiting) as requests_waiting_mean,
        max(requests_waiting) as requests_waiting_max,
        arg_max(requests_waiting, scraped_at) as requests_waiting_last,
        avg(requests_waiting_capacity) as requests_waiting_capacity_mean,
        max(requests_waiting_capacity) as requests_waiting_capacity_max,
        max(requests_waiting_deferred) as requests_waiting_deferred_max,
        max(requests_swapped) as requests_swapped_max,
        avg(kv_cache_usage_ratio) as kv_cache_usage_mean_ratio,
        max(kv_cache_usage_ratio) as kv_cache_usage_max_ratio,
        arg_max(kv_cache_usage_ratio, scraped_at) as kv_cache_usage_last_ratio,
        max(kv_cache_host_usage_ratio) as kv_cache_host_usage_max_ratio,
        max(kv_cache_reserved_ratio) as kv_cache_reserved_max_ratio,
        max(kv_cache_used_tokens) as kv_cache_used_max_tokens,
        arg_max(kv_cache_capacity_tokens, scraped_at) as kv_cache_capacity_tokens,
        arg_max(max_running_requests, scraped_at) as max_running_requests,
        arg_max(max_batched_tokens, scraped_at) as max_batched_tokens,
        arg_max(is_sleeping, scraped_at) as is_sleeping,
        avg(prefix_cache_hit_ratio) as prefix_cache_hit_mean_ratio,
        avg(generation_tokens_per_second) as generation_mean_tokens_per_second,
        avg(busy_slots_per_step) as busy_slots_per_step_mean,
        max(disconnected_clients) as disconnected_clients_max,
        max(resident_memory_bytes) as resident_memory_max_bytes,
        sum(cpu_seconds) as cpu_seconds,
        sum(prompt_tokens) as prompt_tokens,
        sum(generation_tokens) as generation_tokens,
        sum(realtime_tokens) as realtime_tokens,
        sum(prefix_cache_queries) as prefix_cache_queries,
        sum(prefix_cache_hits) as prefix_cache_hits,
        sum(external_cache_queries) as external_cache_queries,
        sum(external_cache_hits) as external_cache_hits,
        sum(cached_tokens_device) as cached_tokens_device,
        sum(cached_tokens_host) as cached_tokens_host,
        sum(cached_tokens_storage) as cached_tokens_storage,
        sum(cached_tokens_remote) as cached_tokens_remote,
        sum(preemptions) as preemptions,
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
        sum(prefill_seconds) as prefill_seconds,
        sum(prefill_tokens) as prefill_tokens,
        sum(decode_seconds) as decode_seconds,
        sum(queue_seconds) as queue_seconds,
        sum(steps) as steps,
        sum(spec_draft_tokens) as spec_draft_tokens,
        sum(spec_accepted_tokens) as spec_accepted_tokens,
        sum(estimated_flops) as estimated_flops,
        sum(estimated_read_bytes) as estimated_read_bytes

    from grown

    left join attempts using (target, minute_at)

    group by target, engine_rank, minute_at

)

select * from minutes
