-- How busy, full, hot and well each GPU was, one row per host, GPU, MIG instance and hour.
with

rows_in as (

    select *, utc_step(3600, period_at) as hour_at
    from fct_gpu_utilization_5m
    where period_at >= getvariable('window_start') and period_at < getvariable('window_end')

),

periods as (

    select
        host,
        gpu_uuid,
        mig_instance,
        hour_at,
        arg_max(source, period_at) as source,
        arg_max(telemetry, period_at) as telemetry,
        arg_max(name, period_at) as name,
        arg_max(mig_profile, period_at) as mig_profile,
        arg_max(gpu_index, period_at) as gpu_index,
        arg_max(pci_bus_id, period_at) as pci_bus_id,
        arg_max(numa_node, period_at) as numa_node,
        arg_max(driver_version, period_at) as driver_version,
        arg_max(owner, period_at) as owner,
        arg_max(health_last, period_at) as health_last,
        sum(unhealthy_count)::bigint as unhealthy_count,
        sum(sample_count)::bigint as sample_count,
        sum(observed_seconds) as observed_seconds,
        max(gap_seconds) as gap_seconds,
        weighted_mean(gpu_utilization_mean_ratio, sample_count) as gpu_utilization_mean_ratio,
        weighted_mean(memory_bandwidth_utilization_mean_ratio, sample_count) as memory_bandwidth_utilization_mean_ratio,
        weighted_mean(encoder_utilization_mean_ratio, sample_count) as encoder_utilization_mean_ratio,
        weighted_mean(decoder_utilization_mean_ratio, sample_count) as decoder_utilization_mean_ratio,
        weighted_mean(graphics_active_mean_ratio, sample_count) as graphics_active_mean_ratio,
        weighted_mean(sm_active_mean_ratio, sample_count) as sm_active_mean_ratio,
        weighted_mean(sm_occupancy_mean_ratio, sample_count) as sm_occupancy_mean_ratio,
        weighted_mean(tensor_active_mean_ratio, sample_count) as tensor_active_mean_ratio,
        weighted_mean(dram_active_mean_ratio, sample_count) as dram_active_mean_ratio,
        max(gpu_utilization_max_ratio) as gpu_utilization_max_ratio,
        max(sm_active_max_ratio) as sm_active_max_ratio,
        max(tensor_active_max_ratio) as tensor_active_max_ratio,
        max(dram_active_max_ratio) as dram_active_max_ratio,
        max(gpu_utilization_p95_ratio) as gpu_utilization_p95_ratio,
        max(sm_active_p95_ratio) as sm_active_p95_ratio,
        max(dram_active_p95_ratio) as dram_active_p95_ratio,
        arg_max(memory_total_bytes, period_at) as memory_total_bytes,
        weighted_mean(memory_used_mean_bytes, sample_count) as memory_used_mean_bytes,
        max(memory_used_max_bytes) as memory_used_max_bytes,
        min(memory_free_min_bytes) as memory_free_min_bytes,
        max(memory_reserved_bytes) as memory_reserved_bytes,
        weighted_mean(temperature_mean_celsius, sample_count) as temperature_mean_celsius,
        max(temperature_max_celsius) as temperature_max_celsius,
        max(memory_temperature_max_celsius) as memory_temperature_max_celsius,
        min(temperature_margin_min_celsius) as temperature_margin_min_celsius,
        max(slowdown_temperature_celsius) as slowdown_temperature_celsius,
        weighted_mean(power_mean_watts, sample_count) as power_mean_watts,
        max(power_max_watts) as power_max_watts,
        arg_max(power_limit_watts, period_at) as power_limit_watts,
        weighted_mean(sm_clock_mean_mhz, sample_count) as sm_clock_mean_mhz,
        max(sm_clock_max_mhz) as sm_clock_max_mhz,
        bit_or(clock_event_reasons) as clock_event_reasons,
        bool_or(is_row_remap_pending) as is_row_remap_pending,
        bool_or(is_row_remap_failed) as is_row_remap_failed,
        arg_max(xid_last, period_at) as xid_last,
        max(process_count_max) as process_count_max,
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

    from rows_in

    group by host, gpu_uuid, mig_instance, hour_at

)

select * from periods
