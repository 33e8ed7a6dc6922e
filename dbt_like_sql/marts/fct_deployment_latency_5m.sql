-- How long requests took over a deployment, one row per deployment, vantage, metric, bounds and five minutes.
with

latencies as (

    select * from fct_latency_5m

),

replicas as (

    select target, period_at, deployment from fct_replica_load_5m

),

fleet as (

    select target, deployment from stg_fleet_targets

),

placed as (

    -- The deployment it had then; where no scrape told, the one fleet.yaml gives it now.
    select
        coalesce(replicas.deployment, fleet.deployment) as deployment,
        latencies.*

    from latencies

    left join replicas using (target, period_at)

    left join fleet using (target)

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

bounded as (

    select merged.*, histogram_repaired(upper_bounds, bucket_increments) as repaired
    from merged
    left join stg_histogram_bounds using (bounds_id)

),

measured as (

    select
        * exclude (repaired),
        count(*) over (partition by deployment, vantage, metric, is_proxy, period_at) as bounds_count,
        ratio(observation_sum, observation_count) as mean_value,
        unnest(repaired_summary(repaired))

    from bounded

)

select * from measured
