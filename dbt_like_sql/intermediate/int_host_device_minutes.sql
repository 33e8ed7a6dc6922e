-- What each disk, network interface and file system did, one row per host, kind, device and minute.
with

samples as (

    -- Ten minutes before the window, so that its first sample has one before it; a minute after it tells whether a
    -- fall lasts.
    select *
    from stg_host_devices
    where
        sampled_at >= getvariable('window_start') - interval 10 minute
        and sampled_at < getvariable('window_end') + interval 1 minute

),

counted as (

    select *, list_sum(list_value(*columns('_total$'))) as counted
    from samples

),

placed as (

    select
        *,
        is_out_of_place(counted, max(counted) over minute_before, max(counted) over minute_after) as is_out_of_place

    from counted

    window
        by_time as (partition by host, kind, device, boot_id order by sampled_at),
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
        by_time as (partition by host, kind, device, boot_id order by sampled_at),
        in_place as (partition by host, kind, device, boot_id, is_out_of_place order by sampled_at)

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

    where minute_at >= getvariable('window_start') and minute_at < getvariable('window_end')

    group by host, kind, device, minute_at

)

select * from minutes
