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

    -- A quantile is known no better than its bucket: the interval holds it whatever the definition.
    select
        * exclude (repaired),
        ratio(observation_sum, observation_count) as mean_value,
        known(repaired_quantile(0.5, repaired)) as p50_value,
        repaired_interval(0.5, repaired) as p50_interval,
        known(repaired_quantile(0.95, repaired)) as p95_value,
        repaired_interval(0.95, repaired) as p95_interval,
        known(repaired_quantile(0.99, repaired)) as p99_value,
        repaired_interval(0.99, repaired) as p99_interval

    from bounded

),

final as (

    select
        * exclude (p50_interval, p95_interval, p99_interval),
        p50_interval.lower as p50_lower,
        p50_interval.upper as p50_upper,
        p95_interval.lower as p95_lower,
        p95_interval.upper as p95_upper,
        p99_interval.lower as p99_lower,
        p99_interval.upper as p99_upper

    from measured

)

select * from final
