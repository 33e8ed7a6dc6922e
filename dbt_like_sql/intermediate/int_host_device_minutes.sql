-- What each disk, network interface and file system did, one row per host, kind, device and minute.
with

samples as (

    -- Ten minutes more than the window, so that its first sample has one before it.
    select *
    from stg_host_devices
    where
        sampled_at >= getvariable('window_start') - interval 10 minute
        and sampled_at < getvariable('window_end')

),

grown as (

    select
        *,
        utc_step(60, sampled_at) as minute_at,
        epoch(sampled_at) - epoch(lag(sampled_at) over by_time) as gap_seconds,
        counter_increase(lag(read_bytes_total ignore nulls) over by_time, read_bytes_total) as read_bytes,
        counter_increase(lag(write_bytes_total ignore nulls) over by_time, write_bytes_total) as write_bytes,
        counter_increase(lag(reads_total ignore nulls) over by_time, reads_total) as reads,
        counter_increase(lag(writes_total ignore nulls) over by_time, writes_total) as writes,
        counter_increase(lag(read_seconds_total ignore nulls) over by_time, read_seconds_total) as read_seconds,
        counter_increase(lag(write_seconds_total ignore nulls) over by_time, write_seconds_total) as write_seconds,
        counter_increase(lag(busy_seconds_total ignore nulls) over by_time, busy_seconds_total) as busy_seconds,
        counter_increase(lag(errors_total ignore nulls) over by_time, errors_total) as errors,
        counter_increase(lag(drops_total ignore nulls) over by_time, drops_total) as drops

    from samples

    window by_time as (partition by host, kind, device, boot_id order by sampled_at)

),

minutes as (

    select
        host,
        kind,
        device,
        minute_at,
        count(*) as sample_count,
        sum(gap_seconds) as observed_seconds,
        max(gap_seconds) as gap_seconds,
        arg_max(size_bytes, sampled_at) as size_bytes,
        min(available_bytes) as available_min_bytes,
        sum(read_bytes) as read_bytes,
        sum(write_bytes) as write_bytes,
        sum(reads) as reads,
        sum(writes) as writes,
        sum(read_seconds) as read_seconds,
        sum(write_seconds) as write_seconds,
        sum(busy_seconds) as busy_seconds,
        sum(errors) as errors,
        sum(drops) as drops

    from grown

    where minute_at >= getvariable('window_start')

    group by host, kind, device, minute_at

)

select * from minutes
