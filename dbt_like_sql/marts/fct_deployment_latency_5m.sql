-- How long requests took over a deployment, one row per deployment, vantage, metric, bounds and five minutes.
with

latencies as (

    select * from fct_latency_5m

),

replicas as (

    select target, period_at, deployment from fct_replica_load_5m

),

placed as (

    select
        coalesce(replicas.deployment, dim_targets.deployment) as deployment,
        latencies.*

    from latencies

    left join replicas using (target, period_at)

    left join dim_targets using (target)

),

merged as (

    -- Buckets add up only where their bounds agree and they were measured at one vantage.
    select
        deployment,
        vantage,
        metric,
        is_proxy,
        bounds_id,
        period_at,
        count(distinct target) as replica_count,
        sum(observation_count) as observation_count,
        sum(observation_sum) as observation_sum,
        histogram_merge(list(bucket_increments)) as bucket_increments

    from placed

    where deployment is not null

    group by deployment, vantage, metric, is_proxy, bounds_id, period_at

),

measured as (

    select
        merged.*,
        count(*) over (partition by deployment, vantage, metric, is_proxy, period_at) as bounds_count,
        ratio(observation_sum, observation_count) as mean_value,
        known(histogram_quantile(0.5, upper_bounds, bucket_increments)) as p50_value,
        histogram_quantile_interval(0.5, upper_bounds, bucket_increments).lower as p50_lower,
        histogram_quantile_interval(0.5, upper_bounds, bucket_increments).upper as p50_upper,
        known(histogram_quantile(0.95, upper_bounds, bucket_increments)) as p95_value,
        histogram_quantile_interval(0.95, upper_bounds, bucket_increments).lower as p95_lower,
        histogram_quantile_interval(0.95, upper_bounds, bucket_increments).upper as p95_upper,
        known(histogram_quantile(0.99, upper_bounds, bucket_increments)) as p99_value,
        histogram_quantile_interval(0.99, upper_bounds, bucket_increments).lower as p99_lower,
        histogram_quantile_interval(0.99, upper_bounds, bucket_increments).upper as p99_upper

    from merged

    left join stg_histogram_bounds using (bounds_id)

)

select * from measured
