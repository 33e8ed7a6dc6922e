-- What each KV-cache tier held and moved, one row per target, tier and minute.
with

steps as (

    -- A minute more on both sides: it tells what a counter said last, and whether a fall lasts.
    select *
    from scrape_steps(getvariable('window_start') - interval 1 minute, getvariable('window_end') + interval 1 minute)

),

samples as not materialized (

    select *
    from stg_kv_tier_samples
    where
        scraped_at >= getvariable('window_start') - interval 1 hour
        and scraped_at < getvariable('window_end') + interval 1 minute

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
    select *, list_sum(list_value(*columns('.+_total$'))) as counted
    from scraped

),

placed as (

    select
        *,
        is_out_of_place(counted, max(counted) over minute_before, max(counted) over minute_after) as is_out_of_place

    from summed

    window
        by_life as (partition by target, tier, life order by scraped_at),
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
        case when not is_out_of_place then
            counter_step(lag(columns('(.+)_total$') ignore nulls) over by_life, columns('(.+)_total$'), is_from_zero)
        end as '\1'

    from placed

    window
        by_target as (partition by target, tier order by scraped_at),
        all_of_life as (partition by target, tier, life order by scraped_at),
        by_life as (partition by target, tier, life, is_out_of_place order by scraped_at)

),

minutes as (

    select
        target,
        tier,
        minute_at,
        arg_max(model_name, scraped_at) as model_name,
        count(*) as sample_count,
        sum(gap_seconds) as observed_seconds,
        max(gap_seconds) as gap_seconds,
        arg_max(used_bytes, scraped_at) as used_bytes,
        arg_max(capacity_bytes, scraped_at) as capacity_bytes,
        max(usage_ratio) as usage_max_ratio,
        bool_and(is_healthy) as is_healthy,
        sum(lookup_requests) as lookup_requests,
        sum(requested_tokens) as requested_tokens,
        sum(hit_tokens) as hit_tokens,
        sum(stored_tokens) as stored_tokens,
        sum(stored_chunks) as stored_chunks,
        sum(loaded_chunks) as loaded_chunks,
        sum(evicted_chunks) as evicted_chunks,
        sum(read_bytes) as read_bytes,
        sum(write_bytes) as write_bytes,
        sum(failures) as failures

    from grown

    where minute_at >= getvariable('window_start') and minute_at < getvariable('window_end')

    group by target, tier, minute_at

)

select * from minutes
