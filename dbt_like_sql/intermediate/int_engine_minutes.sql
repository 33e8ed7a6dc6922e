-- What each engine rank did and how full it was, one row per target, engine rank and minute.
with

steps as (

    -- A minute more on both sides: it tells what a counter said last, and whether a fall lasts.
    select *
    from scrape_steps(getvariable('window_start') - interval 1 minute, getvariable('window_end') + interval 1 minute)

),

samples as not materialized (

    select *
    from stg_engine_samples
    where
        scraped_at >= getvariable('window_start') - interval 1 hour
        and scraped_at < getvariable('window_end') + interval 1 minute

),

attempts as (

    select target, utc_step(60, scraped_at) as minute_at, count(*) as scrape_count
    from stg_scrapes
    where scraped_at >= getvariable('window_start') and scraped_at < getvariable('window_end')
    group by all

),

scraped as (

    select
        now_is.*,
        steps.* exclude (target, scraped_at, process_started_at)

    from steps

    inner join samples as now_is
        on now_is.target = steps.target and now_is.scraped_at = steps.scraped_at

),

summed as (

    -- All counters of a reading together: of two readings of one life the later has counted more.
    -- Estimates are left out: the others would vanish in a sum so large.
    select
        *,
        list_sum(list_value(*columns(lambda c: c like '%_total' and c not like 'estimated%'))) as counted

    from scraped

),

placed as (

    select
        *,
        is_out_of_place(counted, max(counted) over minute_before, max(counted) over minute_after) as is_out_of_place

    from summed

    window
        by_life as (partition by target, engine_rank, life order by scraped_at),
        minute_before as (by_life range between interval 1 minute preceding and interval 1 microsecond preceding),
        minute_after as (by_life range between interval 1 microsecond following and interval 1 minute following)

),

grown as (

    -- Each counter's growth goes by its name without _total, since the last reading that has it, and belongs to the
    -- minute of the later reading.
    select
        *,
        epoch(scraped_at) - epoch(
            coalesce(lag(scraped_at) over all_of_life, case when is_restart then lag(scraped_at) over by_target end)
        ) as gap_seconds,
        not is_out_of_place
        and (
            is_restart
            or coalesce(generation_tokens_total < lag(generation_tokens_total ignore nulls) over by_life, false)
            or coalesce(prompt_tokens_total < lag(prompt_tokens_total ignore nulls) over by_life, false)
        ) as has_restarted,
        case when not is_out_of_place then
            counter_step(lag(columns('(.+)_total$') ignore nulls) over by_life, columns('(.+)_total$'), is_from_zero)
        end as '\1'

    from placed

    window
        by_target as (partition by target, engine_rank order by scraped_at),
        all_of_life as (partition by target, engine_rank, life order by scraped_at),
        by_life as (partition by target, engine_rank, life, is_out_of_place order by scraped_at)

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

    where minute_at >= getvariable('window_start') and minute_at < getvariable('window_end')

    group by target, engine_rank, minute_at

)

select * from minutes
