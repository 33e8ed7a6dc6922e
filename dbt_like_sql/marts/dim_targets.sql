-- Every target that fleet.yaml names or that was ever scraped, one row per target.
with

fleet as (

    select * from stg_fleet_targets

),

health as (

    select * from fct_scrape_health

),

deployments as (

    select * from stg_fleet_deployments

),

joined as (

    select
        coalesce(fleet.target, health.target) as target,
        case when fleet.target is not null then fleet.deployment else health.deployment end as deployment,
        fleet.host,
        fleet.url,
        coalesce(fleet.source, health.source) as source,
        fleet.target is not null as is_in_fleet,
        coalesce(health.engine, fleet.engine) as engine,
        health.engine_version,
        health.vantage,
        health.is_up,
        health.last_up_at

    from fleet

    full join health on health.target = fleet.target

),

final as (

    select
        joined.*,
        deployments.model,
        deployments.gpu,
        deployments.gpus_per_replica,
        deployments.price_usd_per_gpu_hour

    from joined

    left join deployments using (deployment)

)

select * from final
