-- How busy, full, hot and well each GPU was, one row per host, GPU, MIG instance and five minutes.
with

rows_in as (

    select *, utc_step(300, minute_at) as period_at
    from int_gpu_minutes
    where minute_at >= getvariable('window_start') and minute_at < getvariable('window_end')

),

periods as (

    select
        host,
        gpu_uuid,
        mig_instance,
        period_at,
        arg_max(source, minute_at) as source,
        arg_max(telemetry, minute_at) as telemetry,
        arg_max(name, minute_at) as name,
        arg_max(mig_profile, minute_at) as mig_profile,
        arg_max(gpu_index, minute_at) as gpu_index,
        arg_max(pci_bus_id, minute_at) as pci_bus_id,
        arg_max(numa_node, minute_at) as numa_node,
        arg_max(driver_version, minute_at) as driver_version,
        arg_max(owner, minute_at) as owner,
        arg_max(health_last, minute_at) as health_last,
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
        quantile_cont(gpu_utilization_mean_ratio, 0.95) as gpu_utilization_p95_ratio,
        quantile_cont(sm_active_mean_ratio, 0.95) as sm_active_p95_ratio,
        quantile_cont(dram_active_mean_ratio, 0.95) as dram_active_p95_ratio,
        arg_max(memory_total_bytes, minute_at) as memory_total_bytes,
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
        arg_max(power_limit_watts, minute_at) as power_limit_watts,
        weighted_mean(sm_clock_mean_mhz, sample_count) as sm_clock_mean_mhz,
        max(sm_clock_max_mhz) as sm_clock_max_mhz,
        bit_or(clock_event_reasons) as clock_event_reasons,
        bool_or(is_row_remap_pending) as is_row_remap_pending,
        bool_or(is_row_remap_failed) as is_row_remap_failed,
        arg_max(xid_last, minute_at) as xid_last,
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

    group by host, gpu_uuid, mig_instance, period_at

)

select * from periods
