-- How well each target could be read, one row per target and minute.
with

scrapes as (

    -- Ten minutes more than the window, so that a change of state has the scrape before it to compare with.
    select *
    from stg_scrapes
    where
        scraped_at >= getvariable('window_start') - interval 10 minute
        and scraped_at < getvariable('window_end')

),

compared as (

    select
        *,
        utc_step(60, scraped_at) as minute_at,
        lag(is_up) over (partition by target order by scraped_at) as was_up

    from scrapes

),

minutes as (

    select
        target,
        minute_at,
        arg_max(deployment, scraped_at) as deployment,
        arg_max(source, scraped_at) as source,
        arg_max(engine, scraped_at) as engine,
        arg_max(engine_version, scraped_at) as engine_version,
        arg_max(vantage, scraped_at) as vantage,
        count(*) as scrape_count,
        count(*) filter (is_up) as up_count,
        count(*) filter (error_kind = 'idle_slot') as idle_count,
        arg_max(is_up, scraped_at) as is_up_last,
        max(scraped_at) as last_scraped_at,
        max(scraped_at) filter (is_up) as last_up_at,
        max(scraped_at) filter (was_up is distinct from is_up) as last_changed_at,
        arg_max(error_kind, scraped_at) filter (not is_up) as error_kind_last,
        arg_max(error_detail, scraped_at) filter (not is_up) as error_detail_last,
        arg_max(breaker_state, scraped_at) as breaker_state_last,
        avg(duration_seconds) filter (is_up) as duration_mean_seconds,
        max(duration_seconds) filter (is_up) as duration_max_seconds,
        arg_max(page_bytes, scraped_at) filter (is_up) as page_bytes,
        max(unknown_family_count) as unknown_family_count,
        arg_max(clock_skew_seconds, scraped_at) filter (is_up) as clock_skew_seconds,
        arg_max(process_started_at, scraped_at) filter (is_up) as process_started_at

    from compared

    where minute_at >= getvariable('window_start')

    group by target, minute_at

)

select * from minutes
