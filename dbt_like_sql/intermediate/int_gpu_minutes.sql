-- How busy, full, hot and well each GPU was, one row per host, GPU, MIG instance and minute.
with

samples as (

    -- Ten minutes before the window, so that its first sample has one before it; a minute after it tells whether a
    -- fall lasts.
    select *
    from stg_gpu_samples
    where
        sampled_at >= getvariable('window_start') - interval 10 minute
        and sampled_at < getvariable('window_end') + interval 1 minute

),

counted as (

    -- Energy never stands still and never wraps; where it is not told, no reading is called out of place.
    select *, energy_joules_total as counted
    from samples

),

placed as (

    select
        *,
        is_out_of_place(counted, max(counted) over minute_before, max(counted) over minute_after) as is_out_of_place

    from counted

    window
        by_time as (partition by host, gpu_uuid, mig_instance order by sampled_at),
        minute_before as (by_time range between interval 1 minute preceding and interval 1 microsecond preceding),
        minute_after as (by_time range between interval 1 microsecond following and interval 1 minute following)

),

grown as (

    -- Driver counters start again from zero with the driver.
    -- A counter that one reading lacks has grown since the last reading that has it.
    select
        *,
        utc_step(60, sampled_at) as minute_at,
        epoch(sampled_at) - epoch(lag(sampled_at) over by_time) as gap_seconds,
        case when not is_out_of_place then
            counter_increase(lag(columns('(.+)_total$') ignore nulls) over in_place, columns('(.+)_total$'))
        end as '\1'

    from placed

    window
        by_time as (partition by host, gpu_uuid, mig_instance order by sampled_at),
        in_place as (partition by host, gpu_uuid, mig_instance, is_out_of_place order by sampled_at)

),

minutes as (

    select
        host,
        gpu_uuid,
        mig_instance,
        minute_at,
        arg_max(source, sampled_at) as source,
        arg_max(telemetry, sampled_at) as telemetry,
        arg_max(name, sampled_at) as name,
        arg_max(mig_profile, sampled_at) as mig_profile,
        arg_max(gpu_index, sampled_at) as gpu_index,
        arg_max(pci_bus_id, sampled_at) as pci_bus_id,
        arg_max(numa_node, sampled_at) as numa_node,
        arg_max(driver_version, sampled_at) as driver_version,
        arg_max(owner, sampled_at) as owner,
        arg_max(health, sampled_at) as health_last,
        count(*) filter (health <> 'ok') as unhealthy_count,
        arg_max(recovery_action, sampled_at) as recovery_action,
        count(*) as sample_count,
        sum(gap_seconds) as observed_seconds,
        max(gap_seconds) as gap_seconds,
        avg(gpu_utilization_ratio) as gpu_utilization_mean_ratio,
        max(coalesce(gpu_utilization_max_ratio, gpu_utilization_ratio)) as gpu_utilization_max_ratio,
        avg(memory_bandwidth_utilization_ratio) as memory_bandwidth_utilization_mean_ratio,
        avg(encoder_utilization_ratio) as encoder_utilization_mean_ratio,
        avg(decoder_utilization_ratio) as decoder_utilization_mean_ratio,
        avg(graphics_active_ratio) as graphics_active_mean_ratio,
        avg(sm_active_ratio) as sm_active_mean_ratio,
        max(sm_active_ratio) as sm_active_max_ratio,
        avg(sm_occupancy_ratio) as sm_occupancy_mean_ratio,
        avg(tensor_active_ratio) as tensor_active_mean_ratio,
        max(tensor_active_ratio) as tensor_active_max_ratio,
        avg(dram_active_ratio) as dram_active_mean_ratio,
        max(dram_active_ratio) as dram_active_max_ratio,
        arg_max(memory_total_bytes, sampled_at) as memory_total_bytes,
        avg(memory_used_bytes) as memory_used_mean_bytes,
        max(memory_used_bytes) as memory_used_max_bytes,
        min(memory_free_bytes) as memory_free_min_bytes,
        max(memory_reserved_bytes) as memory_reserved_bytes,
        avg(temperature_celsius) as temperature_mean_celsius,
        max(temperature_celsius) as temperature_max_celsius,
        max(memory_temperature_celsius) as memory_temperature_max_celsius,
        min(temperature_margin_celsius) as temperature_margin_min_celsius,
        max(slowdown_temperature_celsius) as slowdown_temperature_celsius,
        avg(power_watts) as power_mean_watts,
        max(power_watts) as power_max_watts,
        arg_max(power_limit_watts, sampled_at) as power_limit_watts,
        arg_max(power_default_limit_watts, sampled_at) as power_default_limit_watts,
        avg(sm_clock_mhz) as sm_clock_mean_mhz,
        max(sm_clock_max_mhz) as sm_clock_max_mhz,
        bit_or(clock_event_reasons) as clock_event_reasons,
        max(remapped_rows_uncorrected) as remapped_rows_uncorrected,
        bool_or(is_row_remap_pending) as is_row_remap_pending,
        bool_or(is_row_remap_failed) as is_row_remap_failed,
        arg_max(xid_last, sampled_at) as xid_last,
        avg(pcie_tx_bytes_per_second) as pcie_tx_mean_bytes_per_second,
        avg(pcie_rx_bytes_per_second) as pcie_rx_mean_bytes_per_second,
        max(pcie_link_generation) as pcie_link_generation,
        max(pcie_link_width) as pcie_link_width,
        max(pcie_link_generation_max) as pcie_link_generation_max,
        max(pcie_link_width_max) as pcie_link_width_max,
        avg(nvlink_bytes_per_second) as nvlink_mean_bytes_per_second,
        max(process_count) as process_count_max,
        sum(energy_joules) as energy_joules,
        sum(power_throttle_seconds) as power_throttle_seconds,
        sum(thermal_throttle_seconds) as thermal_throttle_seconds,
        sum(hardware_slowdown_seconds) as hardware_slowdown_seconds,
        sum(ecc_corrected) as ecc_corrected,
        sum(ecc_uncorrected) as ecc_uncorrected,
        sum(xid) as xid,
        sum(pcie_replay) as pcie_replay,
        sum(pcie_tx_bytes) as pcie_tx_bytes,
        sum(pcie_rx_bytes) as pcie_rx_bytes,
        sum(nvlink_tx_bytes) as nvlink_tx_bytes,
        sum(nvlink_rx_bytes) as nvlink_rx_bytes,
        sum(nvlink_errors) as nvlink_errors

    from grown

    where minute_at >= getvariable('window_start') and minute_at < getvariable('window_end')

    group by host, gpu_uuid, mig_instance, minute_at

)

select * from minutes
