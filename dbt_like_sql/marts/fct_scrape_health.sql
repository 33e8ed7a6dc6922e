-- How well each target can be read now, one row per target.
with

minutes as (

    select * from int_scrape_minutes

),

newest as (

    select max(last_scraped_at) as collected_at from minutes

),

health as (

    select
        target,
        arg_max(deployment, minute_at) as deployment,
        arg_max(source, minute_at) as source,
        arg_max(engine, minute_at) as engine,
        arg_max(engine_version, minute_at) as engine_version,
        arg_max(vantage, minute_at) as vantage,
        arg_max(is_up_last, minute_at) as is_up,
        max(last_changed_at) as since_at,
        max(last_scraped_at) as last_scraped_at,
        max(last_up_at) as last_up_at,
        ratio(
            sum(up_count) filter (minute_at > (select collected_at from newest) - interval 1 hour),
            sum(scrape_count - coalesce(idle_count, 0))
                filter (minute_at > (select collected_at from newest) - interval 1 hour)
        ) as up_1h_ratio,
        ratio(
            sum(up_count) filter (minute_at > (select collected_at from newest) - interval 1 day),
            sum(scrape_count - coalesce(idle_count, 0))
                filter (minute_at > (select collected_at from newest) - interval 1 day)
        ) as up_24h_ratio,
        arg_max(error_kind_last, minute_at) as error_kind_last,
        arg_max(error_detail_last, minute_at) as error_detail_last,
        arg_max(breaker_state_last, minute_at) as breaker_state_last,
        arg_max(duration_mean_seconds, minute_at) as duration_mean_seconds,
        arg_max(clock_skew_seconds, minute_at) as clock_skew_seconds,
        arg_max(unknown_family_count, minute_at) as unknown_family_count,
        arg_max(process_started_at, minute_at) as process_started_at

    from minutes

    group by target

),

final as (

    select
        health.*,
        epoch(newest.collected_at) - epoch(health.last_up_at) as lag_seconds

    from health

    cross join newest

)

select * from final
