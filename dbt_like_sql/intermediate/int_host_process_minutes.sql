-- What each engine process used of its host, one row per host, process and minute.
with

samples as (

    -- Ten minutes before the window, so that its first sample has one before it; a minute after it tells whether a
    -- fall lasts.
    select *
    from stg_host_processes
    where
        sampled_at >= getvariable('window_start') - interval 10 minute
        and sampled_at < getvariable('window_end') + interval 1 minute

),

counted as (

    select *, cpu_seconds_total as counted
    from samples

),

placed as (

    select
        *,
        is_out_of_place(counted, max(counted) over minute_before, max(counted) over minute_after) as is_out_of_place

    from counted

    window
        by_time as (partition by host, pid, process_started_at order by sampled_at),
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
        by_time as (partition by host, pid, process_started_at order by sampled_at),
        in_place as (partition by host, pid, process_started_at, is_out_of_place order by sampled_at)

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

    where minute_at >= getvariable('window_start') and minute_at < getvariable('window_end')

    group by host, pid, process_started_at, minute_at

)

select * from minutes
