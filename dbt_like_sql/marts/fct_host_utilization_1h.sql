-- How busy and full each host was, one row per host and hour.
with

rows_in as (

    select *, utc_step(3600, period_at) as hour_at
    from fct_host_utilization_5m
    where period_at >= getvariable('window_start') and period_at < getvariable('window_end')

),

periods as (

    select
        host,
        hour_at,
        arg_max(source, period_at) as source,
        arg_max(telemetry, period_at) as telemetry,
        arg_max(boot_id, period_at) as boot_id,
        arg_max(booted_at, period_at) as booted_at,
        max(boot_count) as boot_count,
        sum(sample_count)::bigint as sample_count,
        sum(observed_seconds) as observed_seconds,
        max(gap_seconds) as gap_seconds,
        max(cpu_count) as cpu_count,
        weighted_mean(load_1m_mean, sample_count) as load_1m_mean,
        max(processes_blocked_max) as processes_blocked_max,
        max(memory_total_bytes) as memory_total_bytes,
        weighted_mean(memory_available_mean_bytes, sample_count) as memory_available_mean_bytes,
        min(memory_available_min_bytes) as memory_available_min_bytes,
        max(swap_used_max_bytes) as swap_used_max_bytes,
        max(cgroup_cpu_limit_cores) as cgroup_cpu_limit_cores,
        max(cgroup_memory_limit_bytes) as cgroup_memory_limit_bytes,
        max(cgroup_memory_used_max_bytes) as cgroup_memory_used_max_bytes,
        sum(cpu_user_seconds) as cpu_user_seconds,
        sum(cpu_system_seconds) as cpu_system_seconds,
        sum(cpu_idle_seconds) as cpu_idle_seconds,
        sum(cpu_iowait_seconds) as cpu_iowait_seconds,
        sum(cpu_steal_seconds) as cpu_steal_seconds,
        sum(context_switches) as context_switches,
        sum(major_faults) as major_faults,
        sum(oom_kills) as oom_kills,
        sum(swap_in_bytes) as swap_in_bytes,
        sum(swap_out_bytes) as swap_out_bytes,
        sum(psi_cpu_some_seconds) as psi_cpu_some_seconds,
        sum(psi_memory_some_seconds) as psi_memory_some_seconds,
        sum(psi_memory_full_seconds) as psi_memory_full_seconds,
        sum(psi_io_some_seconds) as psi_io_some_seconds,
        sum(psi_io_full_seconds) as psi_io_full_seconds,
        sum(tcp_retransmits) as tcp_retransmits,
        sum(cgroup_cpu_throttled_seconds) as cgroup_cpu_throttled_seconds,
        sum(cgroup_cpu_throttled_periods) as cgroup_cpu_throttled_periods,
        sum(cgroup_oom_kills) as cgroup_oom_kills

    from rows_in

    group by host, hour_at

),

rated as (

    select
        *,
        cpu_user_seconds + cpu_system_seconds + coalesce(cpu_steal_seconds, 0) as cpu_busy_seconds,
        cpu_busy_seconds + cpu_idle_seconds + coalesce(cpu_iowait_seconds, 0) as cpu_time_seconds,
        ratio(cpu_user_seconds + cpu_system_seconds, cpu_time_seconds) as cpu_busy_ratio,
        ratio(cpu_iowait_seconds, cpu_time_seconds) as cpu_iowait_ratio,
        ratio(cpu_steal_seconds, cpu_time_seconds) as cpu_steal_ratio,
        1 - ratio(memory_available_min_bytes, memory_total_bytes) as memory_used_max_ratio,
        ratio(psi_cpu_some_seconds, observed_seconds) as psi_cpu_some_ratio,
        ratio(psi_memory_some_seconds, observed_seconds) as psi_memory_some_ratio,
        ratio(psi_io_some_seconds, observed_seconds) as psi_io_some_ratio,
        ratio(cgroup_cpu_throttled_seconds, observed_seconds) as cgroup_cpu_throttled_mean

    from periods

)

select * exclude (cpu_busy_seconds, cpu_time_seconds) from rated
