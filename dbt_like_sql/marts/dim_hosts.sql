-- Every host that fleet.yaml names or that was seen within the retention, one row per host.
with

fleet as (

    select * from stg_fleet_hosts

),

hours as (

    select
        host,
        arg_max(source, hour_at) as source,
        arg_max(telemetry, hour_at) as telemetry,
        arg_max(cpu_count, hour_at) as cpu_count,
        arg_max(memory_total_bytes, hour_at) as memory_total_bytes,
        arg_max(boot_id, hour_at) as boot_id,
        arg_max(booted_at, hour_at) as booted_at,
        min(hour_at) as first_seen_at,
        max(hour_at) as last_seen_at

    from fct_host_utilization_1h

    group by host

),

gpus as (

    select host, count(distinct gpu_uuid) as gpu_count from dim_gpus group by host

),

final as (

    select
        coalesce(fleet.host, hours.host) as host,
        fleet.host is not null as is_in_fleet,
        fleet.is_local,
        coalesce(fleet.source, hours.source) as source,
        hours.* exclude (host, source),
        gpus.gpu_count

    from fleet

    full join hours on hours.host = fleet.host

    left join gpus on gpus.host = coalesce(fleet.host, hours.host)

)

select * from final
