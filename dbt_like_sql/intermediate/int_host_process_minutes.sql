-- What each engine process used of its host, one row per host, process and minute.
with

samples as (

    -- Ten minutes more than the window, so that its first sample has one before it.
    select *
    from stg_host_processes
    where
        sampled_at >= getvariable('window_start') - interval 10 minute
        and sampled_at < getvariable('window_end')

),

grown as (

    select
        *,
        utc_step(60, sampled_at) as minute_at,
        epoch(sampled_at) - epoch(lag(sampled_at) over by_time) as gap_seconds,
        counter_increase(lag(cpu_seconds_total ignore nulls) over by_time, cpu_seconds_total) as cpu_seconds,
        counter_increase(lag(run_queue_wait_seconds_total ignore nulls) over by_time, run_queue_wait_seconds_total)
            as run_queue_wait_seconds,
        counter_increase(lag(voluntary_switches_total ignore nulls) over by_time, voluntary_switches_total)
            as voluntary_switches,
        counter_increase(lag(involuntary_switches_total ignore nulls) over by_time, involuntary_switches_total)
            as involuntary_switches

    from samples

    window by_time as (partition by host, pid, process_started_at order by sampled_at)

),

minutes as (

    select
        host,
        pid,
        process_started_at,
        minute_at,
        count(*) as sample_count,
        sum(gap_seconds) as observed_seconds,
        max(gap_seconds) as gap_seconds,
        arg_max(name, sampled_at) as name,
        arg_max(role, sampled_at) as role,
        max(thread_count) as thread_count_max,
        max(resident_bytes) as resident_max_bytes,
        max(open_files) as open_files_max,
        sum(cpu_seconds) as cpu_seconds,
        sum(run_queue_wait_seconds) as run_queue_wait_seconds,
        sum(voluntary_switches) as voluntary_switches,
        sum(involuntary_switches) as involuntary_switches

    from grown

    where minute_at >= getvariable('window_start')

    group by host, pid, process_started_at, minute_at

)

select * from minutes
