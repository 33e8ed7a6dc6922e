-- What each KV-cache tier held and moved, one row per target, tier and minute.
with

steps as (

    select * from scrape_steps(getvariable('window_start'), getvariable('window_end'))

),

samples as not materialized (

    select *
    from stg_kv_tier_samples
    where scraped_at >= getvariable('window_start') - interval 1 hour and scraped_at < getvariable('window_end')

),

before as (

    select samples.*
    from steps
    inner join samples
        on samples.target = steps.target and samples.scraped_at = steps.previous_at

),

grown as (

    select
        now_is.*,
        steps.minute_at,
        case when before.target is not null then steps.gap_seconds end as gap_seconds,
        counter_step(before.lookup_requests_total, now_is.lookup_requests_total, steps.is_restart) as lookup_requests,
        counter_step(before.requested_tokens_total, now_is.requested_tokens_total, steps.is_restart)
            as requested_tokens,
        counter_step(before.hit_tokens_total, now_is.hit_tokens_total, steps.is_restart) as hit_tokens,
        counter_step(before.stored_tokens_total, now_is.stored_tokens_total, steps.is_restart) as stored_tokens,
        counter_step(before.stored_chunks_total, now_is.stored_chunks_total, steps.is_restart) as stored_chunks,
        counter_step(before.loaded_chunks_total, now_is.loaded_chunks_total, steps.is_restart) as loaded_chunks,
        counter_step(before.evicted_chunks_total, now_is.evicted_chunks_total, steps.is_restart) as evicted_chunks,
        counter_step(before.read_bytes_total, now_is.read_bytes_total, steps.is_restart) as read_bytes,
        counter_step(before.write_bytes_total, now_is.write_bytes_total, steps.is_restart) as write_bytes,
        counter_step(before.failures_total, now_is.failures_total, steps.is_restart) as failures

    from steps

    inner join samples as now_is
        on now_is.target = steps.target and now_is.scraped_at = steps.scraped_at

    left join before
        on
            before.target = steps.target
            and before.scraped_at = steps.previous_at
            and before.tier = now_is.tier

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

    group by target, tier, minute_at

)

select * from minutes
