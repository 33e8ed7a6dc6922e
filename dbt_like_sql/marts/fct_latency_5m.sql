-- How long requests took, one row per target, metric, bounds and five minutes.
with

counted as (

    select *, utc_step(300, minute_at) as period_at
    from int_latency_minutes
    where minute_at >= getvariable('window_start') and minute_at < getvariable('window_end')

),

merged as (

    -- Ranks of one replica and its minutes add up; other bounds are another row.
    select
        target,
        metric,
        bounds_id,
        period_at,
        arg_max(vantage, minute_at) as vantage,
        arg_max(source_metric, minute_at) as source_metric,
        bool_or(is_proxy) as is_proxy,
        max(gap_seconds) as gap_seconds,
        sum(observation_count) as observation_count,
        sum(observation_sum) as observation_sum,
        histogram_merge(list(bucket_increments)) as bucket_increments

    from counted

    group by target, metric, bounds_id, period_at

),

bounded as (

    select merged.*, histogram_repaired(upper_bounds, bucket_increments) as repaired
    from merged
    left join stg_histogram_bounds using (bounds_id)

),

measured as (

    select
        * exclude (repaired),
        ratio(observation_sum, observation_count) as mean_value,
        unnest(repaired_summary(repaired))

    from bounded

)

select * from measured
