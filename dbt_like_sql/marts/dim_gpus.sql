-- Every GPU seen within the retention, one row per host, GPU and MIG instance.
with

hours as (

    select * from fct_gpu_utilization_1h

),

gpus as (

    select
        host,
        gpu_uuid,
        mig_instance,
        arg_max(name, hour_at) as name,
        arg_max(mig_profile, hour_at) as mig_profile,
        arg_max(gpu_index, hour_at) as gpu_index,
        arg_max(pci_bus_id, hour_at) as pci_bus_id,
        arg_max(numa_node, hour_at) as numa_node,
        arg_max(driver_version, hour_at) as driver_version,
        arg_max(memory_total_bytes, hour_at) as memory_total_bytes,
        arg_max(power_limit_watts, hour_at) as power_limit_watts,
        arg_max(health_last, hour_at) as health_last,
        arg_max(owner, hour_at) as owner,
        arg_max(telemetry, hour_at) as telemetry,
        arg_max(source, hour_at) as source,
        min(hour_at) as first_seen_at,
        max(hour_at) as last_seen_at

    from hours

    group by host, gpu_uuid, mig_instance

)

select * from gpus
