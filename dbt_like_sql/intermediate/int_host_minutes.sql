-- How busy and full each host was, one row per host and minute.
with

samples as (

    -- Ten minutes before the window, so that its first sample has one before it; a minute after it tells whether a
    -- fall lasts.
    select *
    from stg_host_samples
    where
        sampled_at >= getvariable('window_start') - interval 10 minute
        and sampled_at < getvariable('window_end') + interval 1 minute

),

counted as (

    -- Counters of two boots are never compared: partitioned by boot, the first sample of a boot has none before it.
    select *, list_sum([cpu_user_seconds_total, cpu_system_seconds_total, cpu_idle_seconds_total]) as counted
    from samples

),

placed as (

    select
        *,
        is_out_of_place(counted, max(counted) over minute_before, max(counted) over minute_after) as is_out_of_place

    from counted

    window
        by_time as (partition by host, boot_id order by sampled_at),
        minute_before as (by_time range between interval 1 minute preceding and interval 1 microsecond preceding),
        minute_after as (by_time range between interval 1 microsecond following and interval 1 minute following)

),

grown as (

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
        by_time as (partition by host, boot_id order by sampled_at),
        in_place as (partition by host, boot_id, is_out_of_place order by sampled_at)

),

minutes as (

    select
        host,
        minute_at,
        arg_max(source, sampled_at) as source,
        arg_max(telemetry, sampled_at) as telemetry,
        arg_max(boot_id, sampled_at) as boot_id,
        arg_max(booted_at, sampled_at) as booted_at,
        count(distinct boot_id) as boot_count,
        count(*) as sample_count,
        sum(gap_seconds) as observed_seconds,
        max(gap_seconds) as gap_seconds,
        max(cpu_count) as cpu_count,
        avg(load_1m) as load_1m_mean,
        max(processes_blocked) as processes_blocked_max,
        max(memory_total_bytes) as memory_total_bytes,
        avg(memory_available_bytes) as memory_available_mean_bytes,
        min(memory_available_bytes) as memory_available_min_bytes,
        max(swap_total_bytes) as swap_total_bytes,
        max(swap_used_bytes) as swap_used_max_bytes,
        max(cgroup_cpu_limit_cores) as cgroup_cpu_limit_cores,
        max(cgroup_memory_limit_bytes) as cgroup_memory_limit_bytes,
        max(cgroup_memory_used_bytes) as cgroup_memory_used_max_bytes,
        sum(cpu_user_seconds) as cpu_user_seconds,
        sum(cpu_system_seconds) as cpu_system_seconds,
        sum(cpu_idle_seconds) as cpu_idle_seconds,
        sum(cpu_iowait_seconds) as cpu_iowait_seconds,
        sum(cpu_steal_seconds) as cpu_steal_seconds,
        sum(context_switches) as context_switches,
        sum(swap_in_bytes) as swap_in_bytes,
        sum(swap_out_bytes) as swap_out_bytes,
        sum(major_faults) as major_faults,
        sum(oom_kills) as oom_kills,
        sum(psi_cpu_some_seconds) as psi_cpu_some_seconds,
        sum(psi_memory_some_seconds) as psi_memory_some_seconds,
        sum(psi_memory_full_seconds) as psi_memory_full_seconds,
        sum(psi_io_some_seconds) as psi_io_some_seconds,
        sum(psi_io_full_seconds) as psi_io_full_seconds,
        sum(tcp_retransmits) as tcp_retransmits,
        sum(cgroup_cpu_throttled_seconds) as cgroup_cpu_throttled_seconds,
        sum(cgroup_cpu_throttled_periods) as cgroup_cpu_throttled_periods,
        sum(cgroup_oom_kills) as cgroup_oom_kills

    from grown

    where minute_at >= getvariable('window_start') and minute_at < getvariable('window_end')

    group by host, minute_at

)

select * from minutes
